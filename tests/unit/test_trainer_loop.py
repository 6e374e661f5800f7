"""The training loop over a real Trainer with a model as small as one can be: memory, evaluations, numbers of each step."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerState, TrainingArguments

from daemon.job import FailureKind, HeldOutPoint, MemoryMeasure
from daemon.run_dir import RunWriter, read_events
from daemon.trainer.collate import Collator, Example
from daemon.trainer.errors import RunFailure
from daemon.trainer.loop import RunTrainer, held_out_loss
from daemon.trainer.loss import Objective
from daemon.trainer.selection import Selection
from tests.support.inprocess import Wish
from tests.unit.test_trainer_loss import Network


def rows(*lengths: int) -> list[Example]:
    return [
        Example(input_ids=[at % 8 + 1 for at in range(size)], learned=((0, size),), line=size, content_digest="")
        for size in lengths
    ]


class Limited(Network):
    """A model on a device with memory for so many positions at a time; twice as many once it is checkpointed."""

    def __init__(self, positions: int = 10**9) -> None:
        super().__init__()
        self.positions = positions
        self.passes: list[int] = []

    def forward(self, input_ids: torch.Tensor, **others: Any) -> Any:
        self.passes.append(input_ids.numel())
        if input_ids.numel() > self.positions:
            raise torch.OutOfMemoryError("no memory")
        return super().forward(input_ids, **others)

    def enable_input_require_grads(self) -> None:
        self.embed.weight.requires_grad_(True)

    def gradient_checkpointing_enable(self, **_: Any) -> None:
        self.positions *= 2


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def trainer_of(run_dir: Path, model: Network, examples: list[Example], **options: Any) -> RunTrainer:
    arguments = TrainingArguments(
        output_dir=str(run_dir / "out"),
        per_device_train_batch_size=len(examples),
        max_steps=10,
        use_cpu=True,
        report_to=[],
        eval_strategy="steps" if options.get("held_out") else "no",
    )
    return RunTrainer(
        model=model,
        args=arguments,
        examples=examples,
        collator=Collator(pad_token_id=0, budget_tokens=options.pop("budget", 1000)),
        objective=Objective(),
        tokenizer=None,
        grouped=False,
        writer=RunWriter(run_dir),
        **options,
    )


def step(trainer: RunTrainer, examples: list[Example]) -> float:
    return float(trainer.training_step(trainer.model, trainer._collator(examples)))


def gradient(model: Network) -> torch.Tensor:
    assert model.head.weight.grad is not None
    return model.head.weight.grad.clone()


def told(run_dir: Path, name: str) -> list[dict[str, Any]]:
    return [data for event, data in read_events(run_dir) if event == name]


def test_a_step_is_divided_until_it_fits_and_computes_the_same(run_dir: Path) -> None:
    """Loss and gradients are those of one pass, nothing of the passes that failed is left, and the next step fits at once."""
    examples = rows(8, 8, 8, 8)
    whole = Limited()
    due = step(trainer_of(run_dir, whole, examples), examples)
    model = Limited(16)
    trainer = trainer_of(run_dir, model, examples, budget=64)
    assert step(trainer, examples) == pytest.approx(due, rel=1e-5)
    assert torch.allclose(gradient(model), gradient(whole), atol=1e-6)
    assert model.passes == [32, 16, 16]
    assert [(data["budget_tokens"], data["passes"]) for data in told(run_dir, "run.passes_halved")] == [(16, 2)]
    model.passes.clear()
    step(trainer, examples)
    assert model.passes == [16, 16]


def test_a_row_that_does_not_fit_alone_is_checkpointed_once_then_given_up(run_dir: Path) -> None:
    examples = rows(8, 4)
    model = Limited(4)
    trainer = trainer_of(run_dir, model, examples, budget=16, gradient_checkpointing_on_oom=True)
    step(trainer, examples)
    assert [data["longest_row"] for data in told(run_dir, "run.gradient_checkpointing_enabled")] == [8]
    model.positions = 4
    with pytest.raises(RunFailure, match="a row of 8 tokens does not fit") as caught:
        step(trainer, examples)
    assert caught.value.kind is FailureKind.OUT_OF_MEMORY
    assert caught.value.tried == (MemoryMeasure.ONE_ROW, MemoryMeasure.GRADIENT_CHECKPOINTING)
    plain = trainer_of(run_dir, Limited(4), examples, budget=16)
    with pytest.raises(RunFailure) as caught:
        step(plain, examples)
    assert caught.value.tried == (MemoryMeasure.ONE_ROW,)


def test_each_step_s_numbers_come_in_order_and_once(run_dir: Path) -> None:
    examples = rows(8, 4)
    trainer = trainer_of(run_dir, Limited(), examples)
    losses = []
    for number, stop in ((1, False), (2, True)):
        losses.append(step(trainer, examples))
        trainer._grad_norm = torch.tensor(2.5) if number == 2 else None
        trainer.state.global_step = number
        trainer.record_step(stop=stop)
    found = trainer.completed_steps(wait=False)  # on a CPU nothing is waited for
    assert [(one.number, one.stop, one.tokens, one.grad_norm) for one in found] == [
        (1, False, 12, 0.0),
        (2, True, 12, 2.5),
    ]
    assert [one.loss for one in found] == pytest.approx(losses)
    assert trainer.completed_steps(wait=True) == []
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    assert trainer.floating_point_ops({"tokens": 12}) == 6 * 12 * parameters


# -- evaluations


@pytest.fixture
def evaluated(run_dir: Path) -> RunTrainer:
    """A Trainer that evaluates after every second of ten steps, and ends after two without improvement."""
    selection = Selection(every=2, total_steps=10, load_best=True, patience=2)
    return trainer_of(run_dir, Limited(), rows(8), held_out=rows(6, 5), selection=selection)


def at(trainer: RunTrainer, step_number: int, loss: float, monkeypatch: pytest.MonkeyPatch) -> TrainerState:
    """Evaluate after a step, with that loss; returns the state."""
    trainer.state.global_step, trainer.state.max_steps = step_number, 10
    trainer.control.should_save = False
    monkeypatch.setattr(trainer, "_evaluate_now", lambda now: HeldOutPoint(step=now, loss=loss))
    trainer.evaluate()
    return trainer.state


def test_a_new_best_is_saved_and_the_run_ends_when_nothing_gets_better(
    evaluated: RunTrainer, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    for number, loss in ((2, 3.0), (4, 2.0), (6, 2.5), (8, 2.0)):
        state = at(evaluated, number, loss, monkeypatch)
        control = evaluated.control
        seen.append((control.should_save, control.should_training_stop, state.best_global_step))
    assert seen == [(True, False, 2), (True, False, 4), (False, False, 4), (True, True, 4)]
    assert evaluated.stopped_early
    assert [(point.step, point.loss) for point in evaluated.held_out_points] == [(2, 3.0), (4, 2.0), (6, 2.5), (8, 2.0)]
    assert [entry["eval_loss"] for entry in evaluated.state.log_history] == [3.0, 2.0, 2.5, 2.0]
    assert [(data["step"], data["best_step"]) for data in told(run_dir, "run.evaluated")] == [
        (2, 2),
        (4, 4),
        (6, 4),
        (8, 4),
    ]
    progress = json.loads((run_dir / "progress.json").read_text())
    assert (progress["held_out_loss"], progress["best_step"]) == (3.0, 2)  # the later ones came within its 0.2 s


def test_a_stop_is_not_delayed_by_an_evaluation_but_the_last_step_has_its_own(
    evaluated: RunTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated.stopping = True
    at(evaluated, 4, 1.0, monkeypatch)
    assert evaluated.held_out_points == ()
    at(evaluated, 10, 1.0, monkeypatch)
    assert [point.step for point in evaluated.held_out_points] == [10]


def test_a_resumed_run_knows_the_evaluations_of_before_and_makes_up_for_the_one_that_a_stop_kept_away(
    evaluated: RunTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tmp_path / "checkpoint-6"
    checkpoint.mkdir()
    state = TrainerState(log_history=[{"eval_loss": 3.0, "step": 2}, {"eval_loss": 2.0, "step": 4}], epoch=1.0)
    state.save_to_json(str(checkpoint / "trainer_state.json"))
    loaded: list[Path] = []
    monkeypatch.setattr(evaluated, "load_weights", loaded.append)
    monkeypatch.setattr(evaluated, "_evaluate_now", lambda now: HeldOutPoint(step=now, loss=1.0))
    evaluated._catch_up(checkpoint, 5)  # none is due
    assert (loaded, [point.step for point in evaluated.held_out_points]) == ([], [2, 4])
    evaluated._catch_up(checkpoint, 4)  # it was made
    assert (loaded, [point.step for point in evaluated.held_out_points]) == ([], [2, 4])
    evaluated._catch_up(checkpoint, 6)
    assert (loaded, [point.step for point in evaluated.held_out_points]) == ([checkpoint], [2, 4, 6])
    evaluated.take_up(state)
    assert [entry["step"] for entry in state.log_history] == [2, 4, 6]
    assert (state.best_metric, state.best_global_step) == (1.0, 6)


def test_a_checkpoint_of_the_last_step_or_of_an_end_by_evaluations_trains_no_further(
    evaluated: RunTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(evaluated, "load_weights", lambda path: loaded.append(path.name))
    monkeypatch.setattr(evaluated, "train", lambda **_: pytest.fail("it trains"))
    plan: Any = SimpleNamespace(total_steps=10)
    history = [{"eval_loss": loss, "step": 2 * number} for number, loss in enumerate((1.0, 2.0, 2.0), start=1)]
    for number, told_before in ((10, [{"eval_loss": 1.0, "step": 10}]), (6, history)):
        checkpoint = tmp_path / f"checkpoint-{number}"
        checkpoint.mkdir()
        TrainerState(log_history=told_before).save_to_json(str(checkpoint / "trainer_state.json"))
        assert evaluated.run(checkpoint, plan) == number
    assert loaded == ["checkpoint-10", "checkpoint-6"]


# -- held-out rows


def test_the_held_out_loss_is_the_mean_of_a_trained_token_however_rows_are_divided() -> None:
    model, examples = Limited(), rows(9, 5, 3)
    losses = [
        held_out_loss(model, examples, Collator(pad_token_id=0, budget_tokens=budget), Objective(), None)  # type: ignore[arg-type]
        for budget in (1000, 9)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    one = Collator(pad_token_id=0, budget_tokens=1000).passes(examples)[0]
    found, _ = Objective().token_losses(model, one)
    assert len(found) == 8 + 4 + 2
    assert losses[0] == pytest.approx(float(found.detach().mean()), rel=1e-5)
    assert model.training


def test_there_is_no_held_out_loss_without_rows_without_trained_tokens_or_when_a_stop_is_requested() -> None:
    model, collator, objective = Limited(), Collator(pad_token_id=0, budget_tokens=100), Objective()
    silent = [Example(input_ids=[1, 2], learned=(), line=1, content_digest="")]
    stop = Wish()
    for examples in ([], silent):
        assert held_out_loss(model, examples, collator, objective, stop) is None  # type: ignore[arg-type]
    assert held_out_loss(model, rows(4), collator, objective, stop) is not None  # type: ignore[arg-type]
    stop.requested = True
    model.passes.clear()
    assert held_out_loss(model, rows(4), collator, objective, stop) is None  # type: ignore[arg-type]
    assert model.passes == []
    assert held_out_loss(model, rows(4), collator, objective, None) is not None  # type: ignore[arg-type]


def test_a_held_out_loss_that_is_no_number_fails_the_run() -> None:
    model = Limited()
    torch.nn.init.constant_(model.head.weight, float("nan"))
    with pytest.raises(RunFailure, match="not finite") as caught:
        held_out_loss(model, rows(4), Collator(pad_token_id=0, budget_tokens=100), Objective(), None)  # type: ignore[arg-type]
    assert caught.value.kind is FailureKind.DIVERGED
