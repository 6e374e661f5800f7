"""Checkpoints: what counts as one, in which order, sealing, keys, rotation."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import guard
from guard import CheckpointState, checkpoints
from guard.checkpoints import list_checkpoints
from tests.unit.guard.conftest import make_checkpoint, make_fingerprint

KEY, OTHER_KEY = b"k" * 32, b"o" * 32


def sealed(folder: Path, step: int, key: bytes | None = None, **changes: object) -> Path:
    path = make_checkpoint(folder / f"checkpoint-{step}", step)
    guard.seal_checkpoint(path, step=step, fingerprint=make_fingerprint(**changes), key=key)
    return path


def steps(folder: Path) -> list[int]:
    return [checkpoint.step for checkpoint in guard.scan_checkpoints(folder)]


def test_they_are_sorted_by_number_not_by_name(tmp_path: Path) -> None:
    for step in (2600, 900, 10, 0):
        make_checkpoint(tmp_path / f"checkpoint-{step}", step)
    assert steps(tmp_path) == [0, 10, 900, 2600]


def test_only_the_trainer_s_names_are_checkpoints(tmp_path: Path) -> None:
    for name in (
        "checkpoint-",
        "checkpoint-1a",
        "checkpoint-5.bak",
        "xcheckpoint-5",
        "Checkpoint-5",
        "checkpoint--5",
    ):
        (tmp_path / name).mkdir()
    make_checkpoint(tmp_path / "checkpoint-5", 5)
    assert steps(tmp_path) == [5]
    # What the Trainer would pick has to be seen, however odd.
    make_checkpoint(tmp_path / "checkpoint-007", 7)
    assert steps(tmp_path) == [5, 7]


def test_symlinks_and_plain_files_of_that_name_are_reported_and_left_alone(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    sealed(outside, 5)
    folder = tmp_path / "model"
    sealed(folder, 1)
    (folder / "checkpoint-5").symlink_to(outside / "checkpoint-5")
    (folder / "checkpoint-6").write_text("a file")
    (folder / "checkpoint-7").symlink_to("nowhere")
    found, strays = guard.list_checkpoints(folder)
    assert [step for step, _ in found] == [1]
    assert [(stray.path.name, stray.reason) for stray in strays] == [
        ("checkpoint-5", "it is a symbolic link"),
        ("checkpoint-6", "it is not a folder"),
        ("checkpoint-7", "it is a symbolic link"),
    ]
    newest = guard.newest_intact(folder)
    assert newest is not None
    assert newest.step == 1


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("trainer_state.json", None, "trainer_state.json is missing"),
        ("trainer_state.json", b"{", "trainer_state.json cannot be read"),
        ("trainer_state.json", b'{"global_step": 7}', "trainer_state.json is of step 7"),
        ("adapter_model.safetensors", None, "it holds no weights"),
        ("adapter_model.safetensors", b"short", "adapter_model.safetensors is cut short"),
        ("adapter_model.safetensors", b"\xff" * 20, "adapter_model.safetensors is cut short"),
        ("optimizer.pt", None, "optimizer.pt is missing"),
        ("optimizer.pt", b"", "optimizer.pt is empty"),
        ("optimizer.pt", b"PK\x03\x04 cut", "optimizer.pt is cut short"),
        ("scheduler.pt", None, "scheduler.pt is missing"),
    ],
)
def test_without_a_seal_what_is_not_whole_is_torn(tmp_path: Path, name: str, data: bytes | None, reason: str) -> None:
    path = make_checkpoint(tmp_path / "checkpoint-10", 10)
    assert guard.verify_checkpoint(path).state is CheckpointState.UNSEALED
    if data is None:
        (path / name).unlink()
    else:
        (path / name).write_bytes(data)
    found = guard.verify_checkpoint(path)
    assert found.state is CheckpointState.TORN
    assert found.reason == f"seal.json is missing, and {reason}"


def test_an_empty_folder_is_torn_and_a_missing_one_not_found(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-5").mkdir()
    assert guard.verify_checkpoint(tmp_path / "checkpoint-5").state is CheckpointState.TORN
    with pytest.raises(guard.NotFound):
        guard.verify_checkpoint(tmp_path / "checkpoint-6")


def test_a_seal_says_whose_every_byte_is(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "checkpoint-10", 10)
    (path / "deep" / "er").mkdir(parents=True)
    (path / "deep" / "er" / "ünï\ncode").write_bytes(b"x")
    found = guard.seal_checkpoint(path, step=10, fingerprint=make_fingerprint())
    document = json.loads((path / "seal.json").read_text())
    assert document["step"] == 10
    assert guard.Fingerprint.from_json(document["fingerprint"]) == make_fingerprint()
    for name, entry in document["files"].items():
        assert entry == {
            "size_bytes": (path / name).stat().st_size,
            "blake3": guard.digest_file(path / name).blake3_hex,
        }
    assert found == guard.verify_checkpoint(path)
    assert found.size_bytes == sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    assert found.belongs_to(make_fingerprint(training__save_steps=99))
    assert not found.belongs_to(make_fingerprint(lora__r=99))


def test_sealing_twice_is_sealing_once(tmp_path: Path) -> None:
    path = sealed(tmp_path, 10)
    first = (path / "seal.json").read_bytes()
    (path / ".seal.json.123-0.tmp").write_text("left by a crash")
    guard.seal_checkpoint(path, step=10, fingerprint=make_fingerprint())
    assert (path / "seal.json").read_bytes() == first
    assert guard.verify_checkpoint(path).is_intact


def test_what_cannot_be_sealed_is_refused(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "checkpoint-10", 10)
    with pytest.raises(guard.SealBroken, match="of step 10, not 11"):
        guard.seal_checkpoint(path, step=11, fingerprint=make_fingerprint())
    (path / "link").symlink_to("README.md")
    with pytest.raises(guard.SealBroken, match="neither a file nor a folder"):
        guard.seal_checkpoint(path, step=10, fingerprint=make_fingerprint())
    (tmp_path / "checkpoint-11").mkdir()
    with pytest.raises(guard.SealBroken, match="empty"):
        guard.seal_checkpoint(tmp_path / "checkpoint-11", step=11, fingerprint=make_fingerprint())
    with pytest.raises(guard.NotFound):
        guard.seal_checkpoint(tmp_path / "checkpoint-12", step=12, fingerprint=make_fingerprint())
    assert not list(tmp_path.rglob("seal.json"))


def test_the_same_step_of_an_earlier_attempt_gives_way_and_is_kept(tmp_path: Path) -> None:
    sealed(tmp_path, 10)
    staging = tmp_path / ".staging"
    make_checkpoint(staging / "checkpoint-10", 10, seed=5)
    guard.seal_checkpoint(
        staging / "checkpoint-10", step=10, fingerprint=make_fingerprint(), into=tmp_path / "checkpoint-10"
    )
    assert guard.verify_checkpoint(tmp_path / "checkpoint-10").is_intact
    assert [path.name for path in staging.iterdir()] == ["replaced-checkpoint-10"]


def test_a_key_makes_the_seal_proof_against_intent(tmp_path: Path) -> None:
    """Who can write files but has no key can make a plain seal; it does not pass where a key is required."""
    path = sealed(tmp_path, 10, key=KEY)
    assert guard.verify_checkpoint(path, key=KEY).is_intact
    for key, reason in (
        (None, "with a key, and none was given"),
        (OTHER_KEY, "does not verify under this key"),
    ):
        found = guard.verify_checkpoint(path, key=key)
        assert found.state is CheckpointState.ALTERED
        assert reason in found.reason
    (path / "adapter_config.json").write_text("{}")
    guard.seal_checkpoint(path, step=10, fingerprint=make_fingerprint())
    assert guard.verify_checkpoint(path).is_intact
    forged = guard.verify_checkpoint(path, key=KEY)
    assert forged.state is CheckpointState.ALTERED
    assert "sealed without a key" in forged.reason


def test_a_key_file_must_be_ours_alone(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(KEY + b"\n")
    path.chmod(0o600)
    assert guard.load_key(path) == KEY
    for mode in (0o640, 0o604, 0o660, 0o601):
        path.chmod(mode)
        with pytest.raises(guard.UsageError, match=f"others can use it \\(mode 0{mode:o}\\)") as error:
            guard.load_key(path)
        assert error.value.exit_code == 2
    path.chmod(0o600)
    path.write_bytes(b"short\n")
    with pytest.raises(guard.UsageError, match="holds 5 bytes"):
        guard.load_key(path)
    for wrong in (tmp_path / "nothing", tmp_path):
        with pytest.raises(guard.UsageError):
            guard.load_key(wrong)
    if os.geteuid() == 0:
        path.write_bytes(KEY)
        os.chown(path, 65_534, 65_534)
        with pytest.raises(guard.UsageError, match="belongs to user 65534"):
            guard.load_key(path)


def test_a_seal_that_is_no_file_is_no_seal(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "checkpoint-10", 10)
    for make in (Path.mkdir, os.mkfifo, lambda seal: seal.symlink_to("adapter_config.json")):
        make(path / "seal.json")
        assert guard.verify_checkpoint(path).state is CheckpointState.ALTERED
        shutil.rmtree(path / "seal.json") if make is Path.mkdir else (path / "seal.json").unlink()


def test_rotation_keeps_the_newest_and_touches_nothing_that_is_not_this_run_s(tmp_path: Path) -> None:
    for step in (1, 2, 3, 900, 2600):
        sealed(tmp_path, step)
    sealed(tmp_path, 4, lora__r=99)
    make_checkpoint(tmp_path / "checkpoint-5", 5)
    shutil.rmtree(sealed(tmp_path, 6) / "optimizer.pt", ignore_errors=True)
    (tmp_path / "checkpoint-6" / "optimizer.pt").unlink()
    removed = guard.rotate(tmp_path, keep=2)
    assert [path.name for path in removed] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert steps(tmp_path) == [4, 5, 6, 900, 2600]
    assert list((tmp_path / ".staging").iterdir()) == []
    assert guard.rotate(tmp_path, keep=5) == ()
    with pytest.raises(ValueError, match="never removed"):
        guard.rotate(tmp_path, keep=0)


def test_rotation_for_a_run_leaves_a_foreign_run_alone_whose_steps_are_higher(tmp_path: Path) -> None:
    """A script that seals in place beside the checkpoints of somebody else: those are not its own to remove."""
    for step in (800, 900):
        sealed(tmp_path, step, lora__r=99)
    for step in (1, 2, 3):
        sealed(tmp_path, step)
    removed = guard.rotate(tmp_path, keep=1, fingerprint=make_fingerprint())
    assert [path.name for path in removed] == ["checkpoint-1", "checkpoint-2"]
    assert steps(tmp_path) == [3, 800, 900]
    assert guard.rotate(tmp_path, keep=1, fingerprint=make_fingerprint(lora__r=7)) == ()


def test_rotation_does_not_count_a_torn_newest_as_one_of_those_to_keep(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        sealed(tmp_path, step)
    (tmp_path / "checkpoint-3" / "optimizer.pt").unlink()
    guard.rotate(tmp_path, keep=1)
    assert steps(tmp_path) == [2, 3]
    newest = guard.newest_intact(tmp_path, fingerprint=make_fingerprint())
    assert newest is not None
    assert newest.step == 2


def test_rotation_does_not_follow_symlinks_out_of_a_checkpoint(tmp_path: Path) -> None:
    """A sealed checkpoint cannot hold one, so such a folder is altered and stays."""
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("x")
    for step in (1, 2):
        sealed(tmp_path, step)
    (tmp_path / "checkpoint-1" / "link").symlink_to(tmp_path / "precious")
    assert guard.rotate(tmp_path, keep=1) == ()
    assert (tmp_path / "precious" / "file").exists()


def test_a_scan_for_what_can_be_resumed_looks_no_further_than_it_has_to(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        sealed(tmp_path, step)
    (tmp_path / "checkpoint-4" / "optimizer.pt").unlink()
    seen = guard.scan_until_resumable(tmp_path, fingerprint=make_fingerprint())
    assert [(checkpoint.step, checkpoint.state.value) for checkpoint in seen] == [
        (3, "intact"),
        (4, "altered"),
    ]
    assert len(guard.scan_until_resumable(tmp_path, fingerprint=make_fingerprint(lora__r=99))) == 4
    assert guard.newest_intact(tmp_path / "nothing") is None


def test_rotation_spares_the_step_that_it_is_told_to_beside_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        sealed(tmp_path, step)
    assert [path.name for path in guard.rotate(tmp_path, keep=1, spared=(2,))] == ["checkpoint-1", "checkpoint-3"]
    assert steps(tmp_path) == [2, 4]
    assert [path.name for path in guard.rotate(tmp_path, keep=1)] == ["checkpoint-2"]


@pytest.mark.parametrize(
    ("damage", "state", "reason"),
    [
        (lambda path: (path / "optimizer.pt").unlink(), "altered", "optimizer.pt is missing"),
        (lambda path: (path / "added").write_text(""), "altered", "added was added"),
        (lambda path: (path / "empty").mkdir(), "altered", "folders were added or removed"),
        (lambda path: (path / "link").symlink_to("x"), "altered", "link is neither a file nor a folder"),
        (lambda path: (path / "adapter_config.json").write_text("{}"), "altered", "adapter_config.json has 2 bytes instead of 26"),
        (lambda path: (path / "seal.json").unlink(), "unsealed", "seal.json is missing; it is complete otherwise"),
        (lambda path: shutil.copytree(path, path.with_name("checkpoint-11")), "altered", "its seal is of step 10"),
        (lambda path: path.with_name("checkpoint-11").write_text(""), "torn", "it is not a folder"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(tmp_path: Path, damage: Callable[[Path], object], state: str, reason: str) -> None:
    path = sealed(tmp_path, 10)
    damage(path)
    other = path.with_name("checkpoint-11")
    found = guard.verify_checkpoint(other if other.exists() else path, digests=False)
    assert (found.state.value, found.reason) == (state, reason)
    assert not found.belongs_to(make_fingerprint())
    if state != "torn":
        assert found.size_bytes == size_of(found.path)


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and not file.is_symlink())


def test_a_checkpoint_by_another_name_has_the_step_of_its_seal(tmp_path: Path) -> None:
    path = sealed(tmp_path, 10).rename(tmp_path / "copy")
    found = guard.verify_checkpoint(path)
    assert (found.step, found.is_intact) == (10, True)
    (path / "seal.json").unlink()
    assert guard.verify_checkpoint(path).step == 0
    with pytest.raises(guard.NotFound, match="no such checkpoint"):
        guard.verify_checkpoint(tmp_path / "checkpoint-10")


def test_strays_are_named_and_what_is_no_folder_cannot_be_listed(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-9").write_text("")
    (tmp_path / "checkpoint-10").symlink_to("nowhere")
    (tmp_path / "notes").write_text("")
    found, strays = list_checkpoints(tmp_path)
    assert found == []
    assert [(stray.path.name, stray.reason) for stray in strays] == [
        ("checkpoint-10", "it is a symbolic link"),
        ("checkpoint-9", "it is not a folder"),
    ]
    assert list_checkpoints(tmp_path / "nothing") == ([], [])
    with pytest.raises(guard.StorageError):
        list_checkpoints(tmp_path / "notes")


def test_one_that_goes_away_while_others_are_looked_at_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who only looks holds no lock: rotation may go on."""
    for step in (1, 2, 3):
        sealed(tmp_path, step)
    real = checkpoints.verify_checkpoint

    def verify(path: Path, **options: Any) -> guard.Checkpoint:
        if path.name == "checkpoint-3" and path.exists():
            shutil.rmtree(path)
        return real(path, **options)

    monkeypatch.setattr(checkpoints, "verify_checkpoint", verify)
    looks: list[Callable[[], list[int]]] = [
        lambda: [item.step for item in guard.scan_checkpoints(tmp_path)],
        lambda: [item.step for item in guard.scan_until_resumable(tmp_path, fingerprint=make_fingerprint())],
        lambda: [item.step for item in [guard.newest_intact(tmp_path)] if item is not None],
    ]
    for look, steps_seen in zip(looks, ([1, 2], [2], [2]), strict=True):
        if not (tmp_path / "checkpoint-3").exists():
            sealed(tmp_path, 3)
        assert look() == steps_seen


def test_bytes_are_read_of_this_run_s_own_alone_and_only_where_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flip that only a digest shows; the digests of a foreign run's gigabytes decide nothing."""
    sealed(tmp_path, 1)
    flipped = sealed(tmp_path, 2) / "adapter_config.json"
    flipped.write_bytes(flipped.read_bytes().replace(b"8", b"9"))
    sealed(tmp_path, 3, lora__r=99)
    read: set[str] = set()
    real = checkpoints.digest_file
    monkeypatch.setattr(checkpoints, "digest_file", lambda path: (read.add(path.parent.name), real(path))[1])
    ours = make_fingerprint()

    def seen(**options: Any) -> list[tuple[int, str]]:
        found = guard.scan_until_resumable(tmp_path, fingerprint=ours, **options)
        return [(item.step, item.state.value) for item in found]

    assert seen(digests=False) == [(2, "intact"), (3, "intact")]
    assert read == set()
    assert seen() == [(1, "intact"), (2, "altered"), (3, "intact")]
    assert read == {"checkpoint-1", "checkpoint-2"}
    newest = guard.newest_intact(tmp_path, fingerprint=ours)
    assert newest is not None
    assert newest.step == 1
    assert read == {"checkpoint-1", "checkpoint-2"}
    newest = guard.newest_intact(tmp_path)
    assert newest is not None
    assert newest.step == 3
    assert guard.newest_intact(tmp_path, fingerprint=make_fingerprint(lora__r=7)) is None
    assert [item.state.value for item in guard.scan_checkpoints(tmp_path, digests=True)] == [
        "intact",
        "altered",
        "intact",
    ]


def test_only_a_missing_key_needs_one(tmp_path: Path) -> None:
    path = sealed(tmp_path, 10, key=KEY)
    assert guard.verify_checkpoint(path).needs_key
    assert not guard.verify_checkpoint(path, key=OTHER_KEY).needs_key
    assert guard.newest_intact(tmp_path, key=KEY) is not None
    assert guard.newest_intact(tmp_path) is None
    seen = guard.scan_until_resumable(tmp_path, fingerprint=make_fingerprint(), key=KEY)
    assert [item.is_intact for item in seen] == [True]


def test_a_rotation_with_nothing_to_remove_leaves_no_trace(tmp_path: Path) -> None:
    assert guard.rotate(tmp_path, keep=1) == ()
    sealed(tmp_path, 1)
    assert guard.rotate(tmp_path, keep=1) == ()
    assert not (tmp_path / ".staging").exists()
