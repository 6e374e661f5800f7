"""One run, in this process: what it computes, what it refuses, and what it says about itself."""

from __future__ import annotations

import json
import math
import struct
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from daemon.curves import read_curves
from daemon.dataset.rows import iter_rows
from daemon.job import FailureKind, MemoryMeasure, Outcome, RunResult, RunSpec
from daemon.limits import LimitSettings, plan_refusal
from daemon.recipe import Recipe
from daemon.trainer import loop
from daemon.trainer.arguments import training_arguments
from daemon.trainer.attention import PACKED, use_packed
from daemon.trainer.callbacks import ScalarWriter, is_spike
from daemon.trainer.check import verdict
from daemon.trainer.collate import Collator, Example, Examples, flatten, pad, plan, with_targets
from daemon.trainer.errors import RunFailure
from daemon.trainer.loop import held_out_loss
from daemon.trainer.loss import Objective
from daemon.trainer.tokenise import tokenise
from daemon.versions import promote
from tests.support.inprocess import Wish, events, recipe, rows, specify, train
from tests.support.tokens import itself


def example(size: int, seed: int) -> Example:
    ids = torch.randint(10, 500, (size,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Example(input_ids=ids, learned=((size // 3, size),), line=seed, content_digest="")


def adapted(base: Path, **config: Any) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **config),
    )
    for name, tensor in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(tensor, std=0.02)
    return model


def test_flattened_passes_compute_what_padded_ones_do(tiny_base: Path) -> None:
    """Loss and every gradient, within float tolerance."""
    examples = [example(size, size) for size in (30, 7, 19, 2, 30)]
    gradients, losses = [], []
    for flat in (False, True):
        model = adapted(tiny_base)
        if flat:
            assert use_packed(model, examples)
            assert model.get_base_model().config._attn_implementation == PACKED
        batch = flatten(examples) if flat else pad(examples, 0)
        loss = model(**batch, num_items_in_batch=50).loss
        loss.backward()
        losses.append(float(loss))
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("config", [{}, {"modules_to_save": ["lm_head"]}])
def test_scoring_trained_positions_alone_computes_what_scoring_all_does(
    tiny_base: Path, flat: bool, config: dict[str, Any]
) -> None:
    """Loss and every gradient, over a step of several passes; and the held-out loss."""
    examples = [example(size, size) for size in (30, 7, 19, 2, 30)]
    gradients, losses, held_out = [], [], []
    for selects in (False, True):
        model, objective = adapted(tiny_base, **config), Objective()
        assert not selects or objective.select_trained(model, examples)
        collator = Collator(pad_token_id=0, budget_tokens=40, flat=flat and use_packed(model, examples))
        passes = collator(examples)["passes"]
        assert len(passes) > 1
        loss = sum(objective.loss(model, one, over=50, takes_count=True) for one in passes)
        loss.backward()
        losses.append(float(loss))
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        held_out.append(held_out_loss(model, examples, collator, objective, Wish()))  # type: ignore[arg-type]
        # Whoever asks for logits still gets all of them.
        assert model(torch.tensor([[5, 6, 7]])).logits.shape[1] == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-6)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-7)


def test_a_pass_with_nothing_to_learn_has_no_loss_and_zero_gradients(tiny_base: Path) -> None:
    model, objective = adapted(tiny_base), Objective()
    assert objective.select_trained(model, [example(12, 1), example(9, 2)])
    loss = objective.loss(model, with_targets(pad([example(9, 2)], 0, silent=True)), over=50)
    loss.backward()
    assert float(loss) == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)


def test_a_model_that_says_other_things_to_fewer_positions_is_left_as_it_was(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose logits depend on one another across positions, and one that ignores shifted labels."""
    model, objective = adapted(tiny_base), Objective()
    head = model.get_base_model().get_output_embeddings()
    mixing = head.register_forward_hook(lambda _module, _inputs, logits: logits - logits.mean(dim=1, keepdim=True))
    assert not objective.select_trained(model, [example(12, 1), example(9, 2)])
    mixing.remove()
    assert not head._forward_pre_hooks
    known = model.get_base_model().loss_function
    monkeypatch.setattr(
        type(model.get_base_model()),
        "loss_function",
        lambda self, *, shift_labels=None, **kwargs: known(**kwargs),
    )
    assert not objective.select_trained(model, [example(12, 1), example(9, 2)])


def test_a_model_that_mixes_flattened_rows_is_noticed_and_left_as_it_was(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from daemon.trainer import attention

    model = adapted(tiny_base)
    monkeypatch.setattr(
        attention, "flatten", lambda rows: {k: v for k, v in flatten(rows).items() if "cu_seq" not in k}
    )
    assert not use_packed(model, [example(12, 1), example(9, 2)])
    assert model.get_base_model().config._attn_implementation == "sdpa"


def test_rows_beyond_a_models_window_are_noticed_before_the_run(tiny_base: Path) -> None:
    """The rows that are tried are short; one of the run is longer than the window that packed attention has not."""
    model = adapted(tiny_base)
    for layer in model.get_base_model().model.layers:
        layer.self_attn.forward = partial(layer.self_attn.forward, sliding_window=64)
    assert not use_packed(model, [example(12, 1), example(65, 2)])
    assert use_packed(model, [example(12, 1), example(64, 2)])


def test_held_out_loss_does_not_depend_on_how_rows_are_divided(tiny_base: Path) -> None:
    model = adapted(tiny_base)
    examples = [example(size, size) for size in (30, 7, 19, 2, 64, 33)]
    losses = [
        held_out_loss(
            model, examples, Collator(pad_token_id=0, budget_tokens=budget, pass_tokens=price), Objective(), Wish()
        )  # type: ignore[arg-type]
        for budget, price in ((10_000, 10_000), (64, 1), (200, 30))
    ]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


@pytest.fixture(scope="module")
def finished(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunSpec, RunResult]:
    """A run over 40 rows, one of which has nothing to learn."""
    content = rows(40)
    content[5]["messages"] = content[5]["messages"][:-1]
    spec = specify(tmp_path_factory.mktemp("finished"), content, tiny_base)
    return spec, train(spec)


def test_a_run_tells_what_it_does(finished: tuple[RunSpec, RunResult]) -> None:
    spec, result = finished
    assert result.outcome is Outcome.SUCCEEDED
    assert result.steps_run == result.steps_planned >= 4
    assert result.dropped_rows == 1
    assert any("lines 6" in warning for warning in result.warnings)
    assert result.held_out_after is not None
    assert result.held_out_before is not None
    assert result.held_out_after < result.held_out_before
    assert result.trained_share is not None
    assert 0.05 < result.trained_share < 0.95
    assert result.steady_tokens_per_second is not None
    table = events(spec, "run.planned")[0]["arithmetic"]
    assert f"{result.rows:,} trained" in table
    assert "tokens a step" in table
    assert f"{result.steps_planned:,} = 1 epochs x ceil({result.rows} / 8)" in table
    spent = events(spec, "run.trained")[0]  # how little it is, the benchmark measures
    assert 0 < spent["bookkeeping_share"] < 0.2
    assert 0 < spent["sealing_share"] < 1  # the last step's checkpoint
    stepped = events(spec, "run.stepped")
    assert all(event["tokens_per_second"] > 0 for event in stepped)
    curves = read_curves(Path(spec.run_dir))
    assert [step for step, _ in curves.loss] == list(range(1, result.steps_run + 1))
    assert [round(loss, 6) for _, loss in curves.held_out_loss] == [
        round(loss, 6) for loss in (result.held_out_before, result.held_out_after)
    ]
    assert curves.total_steps == result.steps_planned
    # A card, a configuration, weights in safetensors, and nothing that would be unpickled.
    candidate = Path(result.candidate or "")
    names = {path.name for path in candidate.iterdir()}
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    card = (candidate / "README.md").read_text()
    assert spec.dataset.digest in card
    assert f"{result.held_out_after:.4f}" in card


def test_a_run_is_refused_beyond_the_limits_by_the_figures_that_check_foresees(
    finished: tuple[RunSpec, RunResult], tmp_path: Path
) -> None:
    spec, result = finished
    told = verdict(Path(spec.dataset.path), spec.dataset.format, Recipe.model_validate(spec.recipe))
    assert told["steps"] == result.steps_planned
    for name, figure in (("max_steps", told["steps"]), ("max_tokens", told["run_tokens"])):
        limits = {name: figure - 1}
        folders = {"run_dir": str(tmp_path / name), "model_dir": str(tmp_path / "model")}
        with pytest.raises(RunFailure) as refused:
            train(replace(spec, limits=limits, **folders))
        assert refused.value.kind is FailureKind.CONFIG
        assert refused.value.message == plan_refusal(
            told["steps"], told["run_tokens"], LimitSettings.model_validate(limits)
        )


def test_a_run_leaves_curves_that_tensorboard_reads(finished: tuple[RunSpec, RunResult]) -> None:
    pytest.importorskip("tensorboardX")
    spec, result = finished
    curves = scalars(next(Path(spec.run_dir, "tensorboard").iterdir()))
    assert [step for step, tag, _ in curves if tag == "train/loss"] == list(range(1, result.steps_run + 1))
    assert [value for _, tag, value in curves if tag == "held_out/loss"] == pytest.approx(
        [result.held_out_before, result.held_out_after], rel=1e-4
    )


def test_the_event_file_is_whole_after_each_write(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    ScalarWriter(tmp_path).write(300, {"a": 1.5})
    assert scalars(next(tmp_path.iterdir())) == [(300, "a", 1.5)]


def test_a_run_without_tensorboardx_goes_on_and_says_so_once(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    spec = specify(tmp_path, rows(16), tiny_base)
    assert train(spec).outcome is Outcome.SUCCEEDED
    assert [event["hint"] for event in events(spec, "run.scalars_not_written")] == ["pip install tensorboardX"]
    assert not (tmp_path / "run" / "tensorboard").exists()


def scalars(path: Path) -> list[tuple[int, str, float]]:
    """(step, tag, value) of an event file, its checksums verified; by tensorboardX's own definitions."""
    from tensorboardX.crc32c import crc32c
    from tensorboardX.proto.event_pb2 import Event

    def verified(data: bytes, masked: bytes) -> bytes:
        value = (struct.unpack("<I", masked)[0] - 0xA282EAD8) & 0xFFFFFFFF
        assert (value << 15 | value >> 17) & 0xFFFFFFFF == crc32c(data)
        return data

    data, at, found = path.read_bytes(), 0, []
    while at < len(data):
        (size,) = struct.unpack("<Q", verified(data[at : at + 8], data[at + 8 : at + 12]))
        event = Event.FromString(verified(data[at + 12 : at + 12 + size], data[at + 12 + size : at + 16 + size]))
        at += 16 + size
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return found


@pytest.mark.parametrize("where", ["loss", "gradient norm", "weight"])
def test_the_first_number_that_is_not_finite_ends_the_run_and_nothing_is_kept(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    spec = specify(tmp_path, rows(40), tiny_base, {"training": {"save_steps": 1}})
    if where == "loss":
        compute = loop.RunTrainer.compute_loss

        def poisoned(self: Any, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
            loss = compute(self, model, inputs, *args, **options)
            return loss * math.nan if self.state.global_step == 2 else loss

        monkeypatch.setattr(loop.RunTrainer, "compute_loss", poisoned)
    elif where == "gradient norm":
        norm = loop.RunTrainer._get_grad_norm

        def infinite(self: Any, *args: Any, **options: Any) -> Any:
            found = norm(self, *args, **options)
            self._grad_norm = torch.tensor(math.inf) if self.state.global_step == 2 else found
            return self._grad_norm

        monkeypatch.setattr(loop.RunTrainer, "_get_grad_norm", infinite)
    else:
        run = loop.RunTrainer.run

        def breaking(self: Any, *args: Any) -> int:
            steps = run(self, *args)
            next(p for name, p in self.model.named_parameters() if "lora_B" in name).data[0, 0] = math.nan
            return steps

        monkeypatch.setattr(loop.RunTrainer, "run", breaking)
    with pytest.raises(RunFailure) as caught:
        train(spec)
    assert caught.value.kind is FailureKind.DIVERGED
    if where != "weight":
        assert f"the {where} became" in caught.value.message
        assert "at step 3" in caught.value.message
        sealed = {path.name for path in (tmp_path / "model").glob("checkpoint-*")}
        assert "checkpoint-3" not in sealed
    assert not list((tmp_path / "model").glob("**/candidate-*"))


def test_an_adapter_that_learned_nothing_is_no_success(tiny_base: Path, tmp_path: Path) -> None:
    spec = specify(tmp_path, rows(16), tiny_base, {"training": {"learning_rate": 1e-45}})
    with pytest.raises(RunFailure, match=r"left the adapter as it was|lora_B is zero"):
        train(spec)


def test_a_loss_spike_is_a_warning_with_its_step(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = loop.RunTrainer.compute_loss

    def spiking(self: Any, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        loss = compute(self, model, inputs, *args, **options)
        return loss * 5 if self.state.global_step == 13 else loss

    monkeypatch.setattr(loop.RunTrainer, "compute_loss", spiking)
    tables = {"training": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 15}}
    spec = specify(tmp_path, rows(40), tiny_base, {**tables, "data": {"max_length": 64, "held_out_fraction": 0.0}})
    result = train(spec)
    assert result.spikes == (14,)
    assert any("spiked at step 14" in warning for warning in result.warnings)
    assert events(spec, "run.loss_spiked")[0]["step"] == 14


def test_several_gpus_in_sight_are_no_reason_to_cut_batches_in_pieces(tiny_base: Path, tmp_path: Path) -> None:
    """transformers would wrap the model in DataParallel and multiply the batch."""
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", per_device_train_batch_size=8)
    args._n_gpu = 4
    trainer = loop.RunTrainer(
        model=adapted(tiny_base),
        args=args,
        examples=[example(12, 1)],
        collator=Collator(pad_token_id=0, budget_tokens=100),
        objective=Objective(),
        tokenizer=None,
        grouped=False,
    )
    assert trainer.args.n_gpu == 1
    assert trainer._train_batch_size == 8


def test_noise_is_no_spike() -> None:
    usual = [2.0 + 0.1 * math.sin(step * 2.4) for step in range(40)]
    assert not any(is_spike(loss, usual[:at]) for at, loss in enumerate(usual))
    assert is_spike(6.0, usual)
    assert not is_spike(6.0, usual[:5])  # too early to know what is usual


def test_when_memory_runs_out_a_step_is_divided_further_and_computes_the_same(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First smaller passes, then gradient checkpointing, and only then out_of_memory."""
    tables = {"training": {"max_steps": 3}, "data": {"held_out_fraction": 0.0}}
    expected = train(specify(tmp_path / "plenty", rows(24), tiny_base, tables))
    compute = loop.RunTrainer.compute_loss
    most: dict[str, Any] = {"tokens": 320, "checkpointed": False}

    def scarce(self: Any, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        checkpointed = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        if inputs["input_ids"].numel() > most["tokens"] or (most["checkpointed"] and not checkpointed):
            raise torch.OutOfMemoryError("no memory")
        return compute(self, model, inputs, *args, **options)

    monkeypatch.setattr(loop.RunTrainer, "compute_loss", scarce)
    spec = specify(tmp_path / "scarce", rows(24), tiny_base, tables)
    result = train(spec)
    assert events(spec, "run.passes_halved")
    assert result.train_loss == pytest.approx(expected.train_loss, rel=1e-4)
    assert result.lora_norm == pytest.approx(expected.lora_norm, rel=1e-2)

    most["checkpointed"] = True
    spec = specify(tmp_path / "scarcer", rows(24), tiny_base, tables)
    result = train(spec)
    assert events(spec, "run.gradient_checkpointing_enabled")
    assert result.train_loss == pytest.approx(expected.train_loss, rel=1e-4)

    most["tokens"] = 8
    with pytest.raises(RunFailure) as caught:
        train(specify(tmp_path / "none", rows(24), tiny_base, tables))
    assert caught.value.kind is FailureKind.OUT_OF_MEMORY
    assert caught.value.tried == (MemoryMeasure.ONE_ROW, MemoryMeasure.GRADIENT_CHECKPOINTING)


@pytest.mark.parametrize(
    "lora",
    [
        {"use_dora": True},
        {"use_rslora": True, "r": 4},
        {"modules_to_save": ["lm_head"]},
        {"lora_dropout": 0.1, "bias": "lora_only"},
        {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 7},
    ],
)
def test_kinds_of_adapters_are_trained_and_load(tiny_base: Path, tmp_path: Path, lora: dict[str, Any]) -> None:
    """peft gives the loaded adapter the loss that the run said it has."""
    from peft import PeftModel

    tables = {"lora": lora, "training": {"max_steps": 4}, "data": {"held_out_fraction": 0.2}}
    result = train(specify(tmp_path, rows(40), tiny_base, tables))
    assert result.outcome is Outcome.SUCCEEDED
    config = json.loads((Path(result.candidate or "") / "adapter_config.json").read_text())
    layers = {name.rpartition(".")[2] for name in config.pop("target_modules")}
    all_linear = {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"}
    assert layers == set(lora.get("target_modules", all_linear))
    assert {name: config[name] for name in lora if name != "target_modules"} == {
        name: value for name, value in lora.items() if name != "target_modules"
    }
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), result.candidate)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    data = recipe(tiny_base, tables).data
    examples = tokenise(iter_rows(tmp_path / "rows.jsonl", "messages", data), tokenizer, data, read=itself)
    collator = Collator(pad_token_id=tokenizer.pad_token_id, budget_tokens=1000)
    loss = held_out_loss(loaded, examples.held_out, collator, Objective(), Wish())  # type: ignore[arg-type]
    assert loss == pytest.approx(result.held_out_after, rel=1e-4)


@pytest.mark.parametrize("count", [1, 5])
def test_fewer_rows_than_a_batch_train_one_step(tiny_base: Path, tmp_path: Path, count: int) -> None:
    content = rows(count, name="gsm8k_pairs.jsonl")
    result = train(specify(tmp_path, content, tiny_base, format_="prompt_completion"))
    assert (result.outcome, result.steps_run, result.steps_planned) == (Outcome.SUCCEEDED, 1, 1)


def test_an_adapter_of_another_shape_is_refused_with_both_ways_out(tiny_base: Path, tmp_path: Path) -> None:
    first = specify(tmp_path, rows(10), tiny_base)
    promote(Path(first.model_dir), Path(train(first).candidate or ""), job_id="one", record={})
    with pytest.raises(RunFailure, match="r 16 -> 4") as caught:
        train(specify(tmp_path, rows(10, start=10), tiny_base, {"lora": {"r": 4}}))
    assert caught.value.kind is FailureKind.CONFIG
    assert "start_from" in caught.value.hint
    from_base = {"lora": {"r": 4}, "training": {"start_from": "base"}}
    assert train(specify(tmp_path, rows(10, start=20), tiny_base, from_base)).outcome is Outcome.SUCCEEDED


def test_numbers_go_where_the_recipe_reports_them(tiny_base: Path, tmp_path: Path) -> None:
    """A reporter without its package is named before anything is done; TensorBoard needs none."""
    spec = specify(tmp_path, rows(16), tiny_base, {"training": {"report_to": ["tensorboard", "neptune"]}})
    with pytest.raises(RunFailure, match="report_to names neptune") as caught:
        train(spec)
    assert caught.value.kind is FailureKind.CONFIG
    assert not list((tmp_path / "model").iterdir())
    chosen = recipe(tiny_base, {"training": {"report_to": ["tensorboard", "wandb"]}})
    planned = plan(
        Examples(train=[example(9, 1)], held_out=[], train_rows=1, held_out_rows=0, dropped_lines=()), chosen.training
    )
    assert training_arguments(chosen, planned, tmp_path, "float32").report_to == ["wandb"]


@pytest.mark.parametrize(
    ("steps", "asked", "logged"), [(9, 10, 1), (60, 10, 3), (1000, 10, 10), (1000, 100, 50), (9, 1, 1)]
)
def test_a_run_of_few_steps_logs_often_enough_for_a_curve(
    tiny_base: Path, tmp_path: Path, steps: int, asked: int, logged: int
) -> None:
    chosen = recipe(tiny_base, {"training": {"logging_steps": asked}})
    examples = Examples(train=[example(9, 1)], held_out=[], train_rows=1, held_out_rows=0, dropped_lines=())
    planned = replace(plan(examples, chosen.training), total_steps=steps)
    assert training_arguments(chosen, planned, tmp_path, "float32").logging_steps == logged
