"""Damage to a real checkpoint: every flip, cut, loss, addition and swap is found, and the run falls back.

Exhaustive over the files that the Trainer writes and the guard adds; property-based over positions.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import guard
from tests.fault.guard.tiny import make_trainer, save_base_model, write_rows
from tests.support.sound_model import assert_model_dir_sound

FILES = (
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "optimizer.pt",
    "rng_state.pth",
    "scheduler.pt",
    "seal.json",
    "trainer_state.json",
)
LONG_AGO = (1_000_000_000, 1_000_000_000)


class Run:
    """A model directory with the real checkpoints 2 and 4, and the run that they belong to."""

    def __init__(self, root: Path) -> None:
        self.dataset = write_rows(root / "rows.jsonl", 16)
        self.model_dir = root / "model"
        base = save_base_model(root / "base")
        trainer, _ = make_trainer(base=base, dataset=self.dataset, output_dir=self.model_dir / ".staging")
        self.fingerprint = guard.fingerprint_trainer(trainer, dataset_path=self.dataset)
        with guard.ModelLock(self.model_dir, owner="test"):
            trainer.add_callback(guard.SealCallback(self.prepare(self.model_dir)))
            trainer.train()
        self.newest = self.model_dir / "checkpoint-4"
        for path in self.model_dir.rglob("*"):
            os.utime(path, LONG_AGO)

    def prepare(self, model_dir: Path, log: Any = None) -> guard.PreparedRun:
        return guard.prepare_run(
            model_dir, fingerprint=self.fingerprint, dataset_path=self.dataset, lora_config={"r": 4}, log=log
        )

    @contextmanager
    def changed(self, name: str, data: bytes) -> Iterator[None]:
        """The file holds `data` for the block. Its times stay what they were: nothing may rely on them."""
        path = self.newest / name
        original = path.read_bytes()
        try:
            path.write_bytes(data)
            os.utime(path, LONG_AGO)
            yield
        finally:
            path.write_bytes(original)
            os.utime(path, LONG_AGO)

    def assert_found(self, *, structural: bool, what: object) -> None:
        """`verify` finds it (without digests, if it shows in names and sizes), and resume takes the one
        before.
        """
        found = guard.verify_checkpoint(self.newest)
        assert found.state in (guard.CheckpointState.ALTERED, guard.CheckpointState.TORN), what
        assert found.reason, what
        if structural:
            assert not guard.verify_checkpoint(self.newest, digests=False).is_intact, what
        verdict = guard.assess(self.model_dir, fingerprint=self.fingerprint)
        assert verdict.checkpoint is not None, what
        assert verdict.checkpoint.path == self.model_dir / "checkpoint-2", what
        assert [item.path for item in verdict.skipped] == [self.newest], what
        assert found.reason in verdict.reasons[0], what


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("damage"))


@pytest.fixture(autouse=True)
def _undamaged_before_and_after(run: Run) -> Iterator[None]:
    assert {path.name for path in run.newest.iterdir()} == set(FILES)
    assert guard.verify_checkpoint(run.newest).is_intact
    yield
    assert guard.verify_checkpoint(run.newest).is_intact


def flipped(data: bytes, position: int, bit: int) -> bytes:
    return data[:position] + bytes([data[position] ^ (1 << bit)]) + data[position + 1 :]


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_anywhere_is_found(run: Run, name: str) -> None:
    data = (run.newest / name).read_bytes()
    last = len(data) - 1
    for position, bit in itertools.product({0, 7, last // 4, last // 2, 3 * last // 4, last}, (0, 5, 7)):
        with run.changed(name, flipped(data, position, bit)):
            run.assert_found(structural=False, what=(name, position, bit))


def test_every_byte_of_the_seal_itself_matters(run: Run) -> None:
    """Also white space, also a digit of a note: the seal has one spelling."""
    data = (run.newest / "seal.json").read_bytes()
    path = run.newest / "seal.json"
    with run.changed("seal.json", data):
        for position in range(len(data)):
            path.write_bytes(flipped(data, position, position % 8))
            state = guard.verify_checkpoint(run.newest, digests=False).state
            assert state is guard.CheckpointState.ALTERED, position


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_flips_at_any_position_of_any_file(run: Run, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(FILES))
    content = bytearray((run.newest / name).read_bytes())
    positions = st.tuples(st.integers(0, len(content) - 1), st.integers(0, 7))
    for position, bit in data.draw(st.sets(positions, min_size=1, max_size=3)):
        content[position] ^= 1 << bit
    with run.changed(name, bytes(content)):
        run.assert_found(structural=False, what=name)


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_short_is_found_without_reading_it(run: Run, name: str) -> None:
    data = (run.newest / name).read_bytes()
    for length in (0, 1, len(data) // 2, len(data) - 1):
        with run.changed(name, data[:length]):
            run.assert_found(structural=True, what=(name, length))


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_cuts_and_additions_of_any_length(run: Run, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(FILES))
    content = (run.newest / name).read_bytes()
    length = data.draw(st.integers(0, len(content) - 1))
    more = data.draw(st.binary(min_size=1, max_size=20))
    with run.changed(name, content[:length]):
        run.assert_found(structural=True, what=(name, length))
    with run.changed(name, content + more):
        run.assert_found(structural=True, what=(name, more))


@pytest.mark.parametrize("name", FILES)
def test_a_removed_file_is_found(run: Run, name: str) -> None:
    path, aside = run.newest / name, run.newest.parent / "aside"
    path.rename(aside)
    try:
        if name == "seal.json":  # without its seal a whole checkpoint is UNSEALED, which nobody resumes from
            assert guard.verify_checkpoint(run.newest).state is guard.CheckpointState.UNSEALED
            verdict = guard.assess(run.model_dir, fingerprint=run.fingerprint)
            assert verdict.checkpoint is not None
            assert verdict.checkpoint.step == 2
        else:
            run.assert_found(structural=True, what=name)
    finally:
        aside.rename(path)


@pytest.mark.parametrize("name", ["extra.bin", ".hidden", "empty", "pytorch_model.bin", "training_args.bin"])
def test_an_added_file_is_found(run: Run, name: str) -> None:
    path = run.newest / name
    path.write_bytes(b"" if name == "empty" else b"x")
    try:
        run.assert_found(structural=True, what=name)
    finally:
        path.unlink()


def test_an_added_folder_or_symlink_is_found(run: Run) -> None:
    path = run.newest / "added"
    path.mkdir()
    run.assert_found(structural=True, what="an empty folder")
    (path / "inner").write_bytes(b"x")
    run.assert_found(structural=True, what="a folder with a file")
    shutil.rmtree(path)
    path.symlink_to("README.md")
    run.assert_found(structural=True, what="a symlink")
    path.unlink()


@pytest.mark.parametrize("name", FILES)
def test_a_file_replaced_by_a_symlink_to_its_own_content_is_found(run: Run, name: str) -> None:
    path, aside = run.newest / name, run.newest.parent / "aside"
    path.rename(aside)
    path.symlink_to(aside)
    try:
        run.assert_found(structural=True, what=name)
    finally:
        path.unlink()
        aside.rename(path)


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(FILES, 2)))
def test_two_swapped_files_are_found(run: Run, one: str, other: str) -> None:
    first, second = (run.newest / one).read_bytes(), (run.newest / other).read_bytes()
    with run.changed(one, second), run.changed(other, first):
        run.assert_found(structural=True, what=(one, other))


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_checkpoint_is_found(run: Run, name: str) -> None:
    mine, theirs = (run.model_dir / folder / name for folder in ("checkpoint-4", "checkpoint-2"))
    if mine.read_bytes() == theirs.read_bytes():
        assert name in (
            "README.md",
            "adapter_config.json",
            "rng_state.pth",
        )  # nothing of the step is in these
        return
    with run.changed(name, theirs.read_bytes()):
        run.assert_found(structural=False, what=name)


def test_two_checkpoints_under_swapped_names_are_found(run: Run) -> None:
    """Each is intact in itself; the step in the seal and the name disagree."""
    two, aside = run.model_dir / "checkpoint-2", run.model_dir / "aside"

    def swap() -> None:
        run.newest.rename(aside)
        two.rename(run.newest)
        aside.rename(two)

    swap()
    try:
        for checkpoint in guard.scan_checkpoints(run.model_dir):
            assert checkpoint.state is guard.CheckpointState.ALTERED
            assert "its seal is of step" in checkpoint.reason
        assert guard.assess(run.model_dir, fingerprint=run.fingerprint).kind is guard.VerdictKind.STALE
    finally:
        swap()


@pytest.mark.parametrize("name", FILES)
def test_prepare_falls_back_clears_the_damaged_one_and_says_so(run: Run, tmp_path: Path, name: str) -> None:
    model_dir = shutil.copytree(run.model_dir, tmp_path / "model")
    path = model_dir / "checkpoint-4" / name
    path.write_bytes(flipped(path.read_bytes(), path.stat().st_size // 2, 3))
    events: dict[str, dict[str, Any]] = {}
    with guard.ModelLock(model_dir, owner="test"):
        prepared = run.prepare(model_dir, log=events.__setitem__)
    assert prepared.resume_from == model_dir / "checkpoint-2"
    told = events["guard.checkpoint_passed_over"]
    assert told["path"] == str(model_dir / "checkpoint-4")
    assert name in told["reason"]
    assert told["resume_from"] == str(prepared.resume_from)
    assert events["guard.checkpoints_cleared"]["cleared"] == 1
    assert len(list(model_dir.glob(".cleared/*/checkpoint-4"))) == 1
    assert_model_dir_sound(model_dir)


def test_when_every_checkpoint_is_damaged_the_run_starts_over_and_keeps_them(run: Run, tmp_path: Path) -> None:
    model_dir = shutil.copytree(run.model_dir, tmp_path / "model")
    for step in (2, 4):
        (model_dir / f"checkpoint-{step}" / "optimizer.pt").write_bytes(b"")
    with guard.ModelLock(model_dir, owner="test"):
        prepared = run.prepare(model_dir)
    assert prepared.verdict.kind is guard.VerdictKind.STALE
    assert prepared.resume_from is None
    assert len(prepared.verdict.reasons) == 3
    assert len(list(model_dir.glob(".cleared/*/checkpoint-*"))) == 2


def test_nothing_is_unpickled_before_the_seal_has_verified(run: Run, tmp_path: Path) -> None:
    """A pickle that would write a file when it is loaded stands in for the optimizer, with and without a
    seal.
    """
    import pickle

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    model_dir = shutil.copytree(run.model_dir, tmp_path / "model")
    (model_dir / "checkpoint-4" / "optimizer.pt").write_bytes(pickle.dumps(Bomb()))
    (model_dir / "checkpoint-4" / "training_args.bin").write_bytes(pickle.dumps(Bomb()))
    for removed in (None, "seal.json"):
        if removed is not None:
            (model_dir / "checkpoint-4" / removed).unlink()
        guard.verify_checkpoint(model_dir / "checkpoint-4")
        verdict = guard.assess(model_dir, fingerprint=run.fingerprint)
        assert verdict.checkpoint is not None
        assert verdict.checkpoint.step == 2
    assert not (tmp_path / "exploded").exists()
