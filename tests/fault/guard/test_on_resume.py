"""What the Trainer does on resume when something changed, and that under the guard the run is right or
refused.

The first half of each test is the unguarded Trainer. It notices when upstream changes: then the table of the
design has to be read again. The second half is the same event under the guard.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import guard  # noqa: E402  only where the Trainer is installed
from guard import VerdictKind  # noqa: E402  see above
from guard.cli import main  # noqa: E402  see above
from tests.fault.guard.tiny import Seen, make_trainer, save_base_model, write_rows  # noqa: E402  see above
from tests.support.sound_model import assert_model_dir_sound  # noqa: E402  see above

PEAK = 1e-3  # the learning rate of make_trainer; linear over 4 steps


class Lab:
    """The base model, a dataset of 16 rows (4 steps), and what a plain and a guarded run over it left
    behind.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.base = save_base_model(root / "base")
        self.rows = write_rows(root / "rows.jsonl", 16)
        self.finished = root / "finished"
        make_trainer(base=self.base, dataset=self.rows, output_dir=self.finished)[0].train()
        self.half_way = shutil.copytree(self.finished, root / "half-way")
        shutil.rmtree(self.half_way / "checkpoint-4")
        self.guarded_finished = root / "guarded-finished"
        self.run_guarded(self.guarded_finished)
        self.guarded_half_way = shutil.copytree(self.guarded_finished, root / "guarded-half-way")
        shutil.rmtree(self.guarded_half_way / "checkpoint-4")

    def resume_unguarded(self, directory: Path, **changes: Any) -> tuple[Any, Any, Seen]:
        """`train(resume_from_checkpoint=True)`, as scripts do. Returns trainer, result, and what ran."""
        arguments = {"base": self.base, "dataset": self.rows, **changes}
        trainer, seen = make_trainer(output_dir=directory, **arguments)
        return trainer, trainer.train(resume_from_checkpoint=True), seen

    def run_guarded(
        self, directory: Path, *, staged: bool = True, log: Any = None, **changes: Any
    ) -> tuple[guard.PreparedRun, Seen]:
        """The same Trainer under the guard."""
        arguments: dict[str, Any] = {"base": self.base, "dataset": self.rows, **changes}
        output_dir = directory / ".staging" if staged else directory
        trainer, seen = make_trainer(output_dir=output_dir, **arguments)
        run = guard.fingerprint_trainer(trainer, dataset_path=arguments["dataset"])
        with guard.ModelLock(directory, owner="test"):
            prepared = guard.prepare_run(
                directory, fingerprint=run, dataset_path=arguments["dataset"], lora_config={"r": 4}, log=log
            )
            trainer.add_callback(guard.SealCallback(prepared, keep=3))
            trainer.train(resume_from_checkpoint=prepared.resume_from)
        assert_model_dir_sound(directory)
        return prepared, seen


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Path], Path]:
    return lambda source: shutil.copytree(source, tmp_path / source.name, symlinks=True)


def test_nothing_changed_is_resumed_where_it_stopped(lab: Lab, copy: Callable[[Path], Path]) -> None:
    """The control: under the guard a resume runs exactly the missing steps, with the schedule of the whole
    run.
    """
    _, _, unguarded = lab.resume_unguarded(copy(lab.half_way))
    prepared, guarded = lab.run_guarded(copy(lab.guarded_half_way))
    assert prepared.verdict.kind is VerdictKind.RESUME
    assert guarded.learning_rates == unguarded.learning_rates == {3: pytest.approx(5e-4), 4: pytest.approx(2.5e-4)}


@pytest.mark.parametrize("count", [16, 8])
def test_a_smaller_or_equal_dataset_after_a_finished_run(
    lab: Lab, copy: Callable[[Path], Path], tmp_path: Path, count: int
) -> None:
    """Unguarded: no step, loss 0.0, no exception. Guarded: every step."""
    other = write_rows(tmp_path / "other.jsonl", count, seed=1)
    _, result, seen = lab.resume_unguarded(copy(lab.finished), dataset=other)
    assert seen.steps == []
    assert result.training_loss == 0.0

    prepared, guarded = lab.run_guarded(copy(lab.guarded_finished), dataset=other)
    assert prepared.verdict.kind is VerdictKind.STALE
    assert prepared.verdict.reasons[0].startswith("Dataset changed: ")
    assert guarded.steps == list(range(1, count // 4 + 1))


def test_a_larger_dataset(lab: Lab, copy: Callable[[Path], Path], tmp_path: Path) -> None:
    """Unguarded: only the steps past the old counter. Guarded: all eight."""
    larger = write_rows(tmp_path / "larger.jsonl", 32, seed=1)
    _, _, seen = lab.resume_unguarded(copy(lab.finished), dataset=larger)
    assert seen.steps == [5, 6, 7, 8]

    prepared, guarded = lab.run_guarded(copy(lab.guarded_finished), dataset=larger)
    assert prepared.verdict.kind is VerdictKind.STALE
    assert guarded.steps == list(range(1, 9))


def test_gradient_accumulation_doubled_half_way(lab: Lab, copy: Callable[[Path], Path]) -> None:
    """Unguarded: no step at all. Guarded: the two steps that the new arithmetic plans."""
    _, result, seen = lab.resume_unguarded(copy(lab.half_way), gradient_accumulation_steps=2)
    assert seen.steps == []
    assert result.training_loss == 0.0

    prepared, guarded = lab.run_guarded(copy(lab.guarded_half_way), gradient_accumulation_steps=2)
    assert prepared.verdict.kind is VerdictKind.STALE
    assert prepared.verdict.reasons == ("training.global_batch_size: 4 -> 8",)
    assert guarded.steps == [1, 2]


def test_the_same_global_batch_in_other_factors_is_resumed(lab: Lab, copy: Callable[[Path], Path]) -> None:
    """Half the batch, twice the accumulation: the same steps, so the checkpoint stays good."""
    prepared, guarded = lab.run_guarded(
        copy(lab.guarded_half_way), per_device_train_batch_size=2, gradient_accumulation_steps=2
    )
    assert prepared.verdict.kind is VerdictKind.RESUME
    assert guarded.steps == [3, 4]


@pytest.mark.parametrize(
    ("changes", "reason", "first_rates"),
    [
        ({"learning_rate": 5e-3}, "training.learning_rate: 0.001 -> 0.005", [5e-3, 3.75e-3]),
        ({"weight_decay": 0.1}, "training.weight_decay: 0 -> 0.1", [PEAK, 0.75 * PEAK]),
        ({"lr_scheduler_type": "constant"}, "training.lr_scheduler_type: linear -> constant", [PEAK, PEAK]),
    ],
    ids=["learning rate", "weight decay", "scheduler"],
)
def test_an_optimizer_setting_changed(
    lab: Lab, copy: Callable[[Path], Path], changes: dict[str, Any], reason: str, first_rates: list[float]
) -> None:
    """Unguarded: the checkpoint's values win in silence. Guarded: a new run, with what was asked for."""
    trainer, _, seen = lab.resume_unguarded(copy(lab.half_way), **changes)
    assert seen.learning_rates[3] == pytest.approx(5e-4)  # the old schedule's value, whatever was asked for
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.0}
    assert trainer.lr_scheduler.base_lrs == [PEAK, PEAK]

    prepared, guarded = lab.run_guarded(copy(lab.guarded_half_way), **changes)
    assert prepared.verdict.kind is VerdictKind.STALE
    assert prepared.verdict.reasons == (reason,)
    assert guarded.steps == [1, 2, 3, 4]
    assert [guarded.learning_rates[1], guarded.learning_rates[2]] == pytest.approx(first_rates)


@pytest.mark.parametrize(
    ("lora", "reason"),
    [
        ({"lora_alpha": 32}, "LoRA alpha: 8 -> 32"),
        ({"lora_dropout": 0.5}, "LoRA dropout: 0 -> 0.5"),
        ({"use_rslora": True}, "LoRA use_rslora: false -> true"),
    ],
    ids=["alpha", "dropout", "rsLoRA"],
)
def test_an_adapter_setting_changed(lab: Lab, copy: Callable[[Path], Path], lora: dict[str, Any], reason: str) -> None:
    """Unguarded: accepted in silence. Guarded: a new run, and the reason."""
    _, _, seen = lab.resume_unguarded(copy(lab.half_way), lora=lora)
    assert seen.steps == [3, 4]

    prepared, guarded = lab.run_guarded(copy(lab.guarded_half_way), lora=lora)
    assert prepared.verdict.kind is VerdictKind.STALE
    assert prepared.verdict.reasons == (reason,)
    assert guarded.steps == [1, 2, 3, 4]


def test_other_base_weights(lab: Lab, copy: Callable[[Path], Path], tmp_path: Path) -> None:
    """Unguarded: the adapter goes onto other weights in silence. Guarded: a new run, and the reason."""
    other = save_base_model(tmp_path / "base", seed=7)
    _, _, seen = lab.resume_unguarded(copy(lab.half_way), base=other)
    assert seen.steps == [3, 4]

    prepared, guarded = lab.run_guarded(copy(lab.guarded_half_way), base=other)
    assert prepared.verdict.kind is VerdictKind.STALE
    assert len(prepared.verdict.reasons) == 1
    assert prepared.verdict.reasons[0].startswith("model.digest: ")
    assert guarded.steps == [1, 2, 3, 4]


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt"])
def test_optimizer_or_scheduler_missing(lab: Lab, copy: Callable[[Path], Path], name: str) -> None:
    """Unguarded: both are dropped and the learning rate jumps to its peak. Guarded: from the checkpoint
    before.
    """
    directory = copy(lab.half_way)
    (directory / "checkpoint-2" / name).unlink()
    _, _, seen = lab.resume_unguarded(directory)
    assert seen.learning_rates == {3: pytest.approx(PEAK), 4: pytest.approx(0.75 * PEAK)}

    directory = copy(lab.guarded_finished)
    (directory / "checkpoint-4" / name).unlink()
    prepared, guarded = lab.run_guarded(directory)
    assert prepared.resume_from == directory / "checkpoint-2"
    assert prepared.verdict.reasons == (f"checkpoint-4 is altered: {name} is missing",)
    assert guarded.learning_rates == {3: pytest.approx(5e-4), 4: pytest.approx(2.5e-4)}


def test_the_newest_checkpoint_torn(lab: Lab, copy: Callable[[Path], Path]) -> None:
    """Unguarded: it is chosen, and every retry fails the same way. Guarded: from the one before, and said
    so.
    """

    def tear(directory: Path) -> Path:
        weights = directory / "checkpoint-4" / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-50])
        return directory

    directory = tear(copy(lab.finished))
    for _ in range(2):
        with pytest.raises(Exception, match="deserializing header"):
            lab.resume_unguarded(directory)

    events: dict[str, dict[str, Any]] = {}
    directory = tear(copy(lab.guarded_finished))
    prepared, guarded = lab.run_guarded(directory, log=events.__setitem__)
    assert prepared.resume_from == directory / "checkpoint-2"
    assert guarded.steps == [3, 4]
    assert "adapter_model.safetensors has" in events["guard.checkpoint_passed_over"]["reason"]


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt"])
def test_one_bit_flipped(lab: Lab, copy: Callable[[Path], Path], name: str) -> None:
    """Unguarded: it loads in silence. Guarded: found before anything is loaded."""

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        # In optimizer.pt the middle lies in the bytes of a tensor; the end of the archive holds its
        # directory.
        data[len(data) - 20 if path.suffix == ".safetensors" else len(data) // 2] ^= 1
        path.write_bytes(data)

    directory = copy(lab.half_way)
    flip(directory / "checkpoint-2" / name)
    _, _, seen = lab.resume_unguarded(directory)
    assert seen.steps == [3, 4]

    directory = copy(lab.guarded_finished)
    flip(directory / "checkpoint-4" / name)
    prepared, guarded = lab.run_guarded(directory)
    assert prepared.resume_from == directory / "checkpoint-2"
    assert prepared.verdict.reasons == (f"checkpoint-4 is altered: the content of {name} changed",)
    assert guarded.steps == [3, 4]


def test_a_loss_that_is_not_a_number(lab: Lab, tmp_path: Path) -> None:
    """Unguarded: logged as a number, "success", NaN weights saved. Guarded: refused, and nothing is
    sealed.
    """
    settings: dict[str, Any] = {"base": lab.base, "dataset": lab.rows, "learning_rate": 1e38}
    trainer, _ = make_trainer(output_dir=tmp_path / "plain", **settings)
    result = trainer.train()
    assert math.isfinite(result.training_loss)
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "plain" / "checkpoint-4" / "adapter_model.safetensors")
    assert not all(torch.isfinite(tensor).all() for tensor in saved.values())

    with pytest.raises(guard.WeightsNotFinite, match="the run has diverged"):
        lab.run_guarded(tmp_path / "guarded", learning_rate=1e38)
    assert guard.scan_checkpoints(tmp_path / "guarded") == ()


# -- the callback itself


def test_resuming_otherwise_than_decided_is_refused_before_the_first_step(
    lab: Lab, copy: Callable[[Path], Path]
) -> None:
    """A script that passes True (or nothing) in spite of the verdict does not get to its first step."""
    directory = copy(lab.guarded_half_way)
    trainer, seen = make_trainer(base=lab.base, dataset=lab.rows, output_dir=directory / ".staging")
    run = guard.fingerprint_trainer(trainer, dataset_path=lab.rows)
    with guard.ModelLock(directory, owner="test"):
        prepared = guard.prepare_run(directory, fingerprint=run, dataset_path=lab.rows, lora_config={})
        trainer.add_callback(guard.SealCallback(prepared))
        with pytest.raises(guard.RunRefused, match="starts at step 0, and step 2 was decided"):
            trainer.train()
    assert seen.steps == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"save_only_model": True}, "save_only_model"), ({"output_dir": "elsewhere"}, "writes to")],
    ids=["save_only_model", "another output_dir"],
)
def test_a_trainer_whose_checkpoints_could_not_be_resumed_is_refused(
    lab: Lab, tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    settings = {"output_dir": tmp_path / "model", **arguments}
    if settings["output_dir"] == "elsewhere":
        settings["output_dir"] = tmp_path / "elsewhere"
    trainer, seen = make_trainer(base=lab.base, dataset=lab.rows, **settings)
    run = guard.fingerprint_trainer(trainer, dataset_path=lab.rows)
    trainer.add_callback(guard.SealCallback(model_dir=tmp_path / "model", fingerprint=run))
    with pytest.raises(guard.RunRefused, match=message):
        trainer.train()
    assert seen.steps == []


def test_a_plain_script_is_sealed_in_place_and_rotated(lab: Lab, tmp_path: Path) -> None:
    """output_dir is the model directory: sealed where they are, without pickled arguments, the newest two
    kept.
    """
    directory = tmp_path / "model"
    trainer, _ = make_trainer(base=lab.base, dataset=lab.rows, output_dir=directory, save_steps=1)
    run = guard.fingerprint_trainer(trainer, dataset_path=lab.rows)
    sealed: list[guard.Checkpoint] = []
    trainer.add_callback(guard.SealCallback(model_dir=directory, fingerprint=run, keep=2, on_sealed=sealed.append))
    trainer.train()
    assert [checkpoint.step for checkpoint in sealed] == [1, 2, 3, 4]
    assert [(c.step, c.state.value) for c in guard.scan_checkpoints(directory, digests=True)] == [
        (3, "intact"),
        (4, "intact"),
    ]
    assert not list(directory.rglob("training_args.bin"))


def test_a_directory_of_a_plain_script_is_sealed_verified_refused_and_cleared(
    lab: Lab, copy: Callable[[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command on what a real, unguarded Trainer left; once sealed, the guarded Trainer goes on from
    there.
    """
    directory = copy(lab.half_way)
    (state,) = {checkpoint.state for checkpoint in guard.scan_checkpoints(directory)}
    assert state is guard.CheckpointState.UNSEALED
    trainer, _ = make_trainer(base=lab.base, dataset=lab.rows, output_dir=directory)
    run = guard.fingerprint_trainer(trainer, dataset_path=lab.rows)
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(run.to_json()))

    def command(*arguments: object) -> int:
        return main([str(argument) for argument in arguments])

    options = ("--dataset", lab.rows, "--recipe", recipe)
    assert command("check", directory, *options) == 3
    assert command("seal", directory / "checkpoint-2", *options) == 0
    assert command("verify", directory) == 0
    assert command("check", directory, *options) == 0
    other = write_rows(tmp_path / "other.jsonl", 16, seed=1)
    assert command("check", directory, "--dataset", other) == 3
    assert "Dataset changed: " in capsys.readouterr().out

    prepared, seen = lab.run_guarded(copy_to(directory, tmp_path / "resumed"), staged=False)
    assert (prepared.verdict.kind, seen.steps) == (VerdictKind.RESUME, [3, 4])
    assert command("clear", directory, "--dataset", other) == 0
    assert guard.scan_checkpoints(directory) == ()


def test_another_tokenizer_is_another_run(lab: Lab, tiny_base: Path, tmp_path: Path) -> None:
    """Its files count when it came from a folder, and its chat template also when somebody set another one since."""
    from transformers import AutoTokenizer

    folder = copy_to(tiny_base, tmp_path / "base")
    trainer, _ = make_trainer(base=lab.base, dataset=lab.rows, output_dir=tmp_path / "out")

    def changed_since(old: guard.Fingerprint | None = None) -> tuple[guard.Fingerprint, list[str]]:
        new = guard.fingerprint_trainer(trainer, dataset_path=lab.rows)
        return new, [change.name for change in old.differences(new)] if old else []

    trainer.processing_class = AutoTokenizer.from_pretrained(folder)
    first, _ = changed_since()
    assert len(str(first.components["tokenizer.digest"])) == 64
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"vocab"', '"vocab" ', 1))
    second, names = changed_since(first)
    assert names == ["tokenizer.digest"]
    trainer.processing_class.chat_template = "{{ messages }}"
    assert changed_since(second)[1] == ["tokenizer.chat_template"]


def copy_to(source: Path, target: Path) -> Path:
    return shutil.copytree(source, target, symlinks=True)


def test_the_example_of_the_readme(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ten lines that protect somebody else's script: started twice, then with other rows."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "train.jsonl", 16)

    def run_script() -> tuple[guard.PreparedRun, Seen]:
        trainer, seen = make_trainer(base=lab.base, dataset=Path("train.jsonl"), output_dir=Path("out"))
        # -- the example
        run = guard.fingerprint_trainer(trainer, dataset_path="train.jsonl")
        with guard.ModelLock("out", owner="my script"):
            prepared = guard.prepare_run(
                "out",
                fingerprint=run,
                dataset_path="train.jsonl",
                lora_config=trainer.model.peft_config["default"],
            )
            print(prepared.verdict)
            trainer.add_callback(guard.SealCallback(prepared))
            trainer.train(resume_from_checkpoint=prepared.resume_from)
        # -- end of the example
        return prepared, seen

    first, seen = run_script()
    assert (first.verdict.kind, seen.steps) == (VerdictKind.FRESH, [1, 2, 3, 4])
    shutil.rmtree("out/checkpoint-4")
    second, seen = run_script()
    assert (second.verdict.kind, seen.steps) == (VerdictKind.RESUME, [3, 4])
    write_rows(tmp_path / "train.jsonl", 16, seed=9)
    third, seen = run_script()
    assert (third.verdict.kind, seen.steps) == (VerdictKind.STALE, [1, 2, 3, 4])
    assert_model_dir_sound(tmp_path / "out")


def test_the_table_has_every_field_of_peft_s_lora_config() -> None:
    """A field that a new peft brings is identity all the same, until somebody has thought about it."""
    from peft import LoraConfig

    missing = {f"lora.{name}" for name in LoraConfig(task_type="CAUSAL_LM").to_dict()} - {
        component.name for component in guard.COMPONENTS
    }
    assert missing == set()
