"""Checkpoints of a model directory. One definition of "intact" serves resume, rotation, verify and clear.

INTACT: the seal verifies. TORN: no seal, and not whole. UNSEALED: no seal, but whole: what a plain script
wrote. ALTERED: the seal is there, and something does not agree with it.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Final

from .atomic import PathLike, rename_durable
from .completeness import why_incomplete
from .digest import digest_file
from .errors import GuardError, NotFound, SealBroken, SealKeyMissing, StorageError, explain_os_error, storage_errors
from .fingerprint import Fingerprint
from .layout import TRASH_PREFIX, ensure_staging, unused_name
from .seal import SEAL_NAME, Seal, Tree, list_tree, read_seal, write_seal

# The Trainer's own rule: it resumes from the highest number, whatever else the folder is.
CHECKPOINT_NAME: Final = re.compile(r"checkpoint-(\d+)")


class CheckpointState(StrEnum):
    """What a look at a checkpoint and its seal found."""

    INTACT = "intact"
    TORN = "torn"
    ALTERED = "altered"
    UNSEALED = "unsealed"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One checkpoint folder and what its seal proves.

    `reason` says why it is not intact; `needs_key`, that only a key could tell; `fingerprint` is the sealed one, None when
    no seal verifies.
    """

    path: Path
    step: int
    state: CheckpointState
    reason: str = ""
    size_bytes: int = 0
    fingerprint: Fingerprint | None = None
    needs_key: bool = False

    @property
    def is_intact(self) -> bool:
        """Whether the seal verifies."""
        return self.state is CheckpointState.INTACT

    def belongs_to(self, fingerprint: Fingerprint) -> bool:
        """Intact, and sealed by the very run that `fingerprint` describes."""
        return self.is_intact and self.fingerprint is not None and self.fingerprint.same_run(fingerprint)


@dataclass(frozen=True, kw_only=True)
class Stray:
    """Something named like a checkpoint that is none.

    It is reported and not touched.
    """

    path: Path
    reason: str


def list_checkpoints(model_dir: PathLike) -> tuple[list[tuple[int, Path]], list[Stray]]:
    """List the checkpoint folders as (step, path) by step, and strays.

    A model directory that does not exist has none. Raises StorageError.
    """
    found: list[tuple[int, Path]] = []
    strays: list[Stray] = []
    try:
        with storage_errors("list", model_dir), os.scandir(model_dir) as entries:
            for entry in entries:
                if (match := CHECKPOINT_NAME.fullmatch(entry.name)) is None:
                    continue
                if entry.is_dir(follow_symlinks=False):
                    found.append((int(match[1]), Path(model_dir, entry.name)))
                else:
                    what = "a symbolic link" if entry.is_symlink() else "not a folder"
                    strays.append(Stray(path=Path(model_dir, entry.name), reason=f"it is {what}"))
    except StorageError as exc:
        if isinstance(exc.__cause__, FileNotFoundError):
            return [], []
        raise
    return sorted(found), sorted(strays, key=lambda stray: stray.path.name)


def scan_checkpoints(model_dir: PathLike, *, key: bytes | None = None, digests: bool = False) -> tuple[Checkpoint, ...]:
    """Every checkpoint folder, ascending by step (900 before 2600); structural unless `digests`."""
    found = (_verify_listed(path, key=key, digests=digests) for _, path in list_checkpoints(model_dir)[0])
    return tuple(checkpoint for checkpoint in found if checkpoint is not None)


def _verify_listed(path: Path, *, key: bytes | None, digests: bool) -> Checkpoint | None:
    """None when it went away since it was listed: who only looks holds no lock, and rotation goes on."""
    try:
        return verify_checkpoint(path, key=key, digests=digests)
    except NotFound:
        return None


def scan_until_resumable(
    model_dir: PathLike, *, fingerprint: Fingerprint, key: bytes | None = None, digests: bool = True
) -> tuple[Checkpoint, ...]:
    """Verify from the newest down to the first that `fingerprint` can resume from.

    Returns them ascending by step.
    The older ones are not looked at: a decision does not depend on them, and there may be thousands.
    `digests` are taken of those alone whose seal is of this run.
    """
    seen: list[Checkpoint] = []
    for _, path in reversed(list_checkpoints(model_dir)[0]):
        checkpoint = _verify_listed(path, key=key, digests=False)
        if checkpoint is not None and digests and checkpoint.belongs_to(fingerprint):
            checkpoint = _verify_listed(path, key=key, digests=True)
        if checkpoint is None:
            continue
        seen.append(checkpoint)
        if checkpoint.belongs_to(fingerprint):
            break
    return tuple(reversed(seen))


def newest_intact(
    model_dir: PathLike, *, fingerprint: Fingerprint | None = None, key: bytes | None = None
) -> Checkpoint | None:
    """Return the newest checkpoint whose seal and digests verify; with `fingerprint`, of this run."""
    for _, path in reversed(list_checkpoints(model_dir)[0]):
        for digests in (False, True):  # structure first: it is cheap, and finds most of what is wrong
            checkpoint = _verify_listed(path, key=key, digests=digests)
            if checkpoint is None or not checkpoint.is_intact:
                break
            if fingerprint is not None and not checkpoint.belongs_to(fingerprint):
                break
        else:
            return checkpoint
    return None


def verify_checkpoint(path: PathLike, *, key: bytes | None = None, digests: bool = True) -> Checkpoint:
    """Compare a checkpoint with its seal.

    Structure first (names, sizes), then, with `digests`, every byte.
    Whatever is found in the folder is told by the state and the reason; nothing is unpickled. Raises
    NotFound.
    """
    folder = Path(path)
    match = CHECKPOINT_NAME.fullmatch(folder.name)
    named_step = int(match[1]) if match else None
    size_bytes, seal = 0, None

    def result(state: CheckpointState, reason: str = "") -> Checkpoint:
        step = named_step if named_step is not None else (seal.step if seal else 0)
        fingerprint = seal.fingerprint if seal is not None else None
        return Checkpoint(
            path=folder, step=step, state=state, reason=reason, size_bytes=size_bytes, fingerprint=fingerprint
        )

    try:
        if not stat.S_ISDIR(folder.lstat().st_mode):
            return result(CheckpointState.TORN, "it is not a folder")
        tree = list_tree(folder)
        size_bytes = tree.size_bytes
        try:
            seal = read_seal(folder, key=key)
        except FileNotFoundError:
            incomplete = why_incomplete(folder, step=named_step)
            if incomplete is None:
                return result(CheckpointState.UNSEALED, f"{SEAL_NAME} is missing; it is complete otherwise")
            return result(CheckpointState.TORN, f"{SEAL_NAME} is missing, and {incomplete}")
        except SealKeyMissing as exc:
            return replace(result(CheckpointState.ALTERED, exc.cause), needs_key=True)
        except SealBroken as exc:
            return result(CheckpointState.ALTERED, exc.cause)
        problem = _structural_problem(tree, seal, named_step)
        if problem is None and digests:
            problem = _content_problem(folder, seal)
    except FileNotFoundError as exc:
        if not os.path.lexists(folder):
            raise NotFound(operation="verify", path=folder, cause="there is no such checkpoint") from exc
        problem = explain_os_error(exc)
    except OSError as exc:
        problem = explain_os_error(exc)
    if problem is not None:
        return result(CheckpointState.ALTERED if seal is not None else CheckpointState.TORN, problem)
    return result(CheckpointState.INTACT)


def _structural_problem(tree: Tree, seal: Seal, named_step: int | None) -> str | None:
    if named_step is not None and seal.step != named_step:
        return f"its seal is of step {seal.step}"
    if tree.others:
        return f"{tree.others[0]} is neither a file nor a folder"
    for name, (size, _) in seal.files.items():
        if name not in tree.files:
            return f"{name} is missing"
        if tree.files[name] != size:
            return f"{name} has {tree.files[name]:,} bytes instead of {size:,}"
    extra = sorted(tree.files.keys() - seal.files.keys() - {SEAL_NAME})
    if extra:
        return f"{extra[0]} was added"
    if tree.folders != seal.folders:
        return "folders were added or removed"
    return None


def _content_problem(folder: Path, seal: Seal) -> str | None:
    for name, (_, expected) in seal.files.items():
        try:
            digest = digest_file(folder / name)
        except GuardError as exc:
            return f"{name}: {exc.cause}"
        if digest.blake3_hex != expected:
            return f"the content of {name} changed"
    return None


def seal_checkpoint(
    directory: PathLike,
    *,
    step: int,
    fingerprint: Fingerprint,
    key: bytes | None = None,
    into: PathLike | None = None,
) -> Checkpoint:
    """Seal a checkpoint; with `into`, move it there once it is sealed and durable.

    Until the rename nobody takes it for a checkpoint. What stands at `into` already (the same step of an
    earlier attempt) is moved to the staging folder first. Raises SealBroken, FileChanged, StorageError.
    """
    folder = Path(directory)
    seal = write_seal(folder, step=step, fingerprint=fingerprint, key=key)
    if into is not None:
        target = Path(into)
        with storage_errors("move into place", target):
            if os.path.lexists(target):
                aside = folder.with_name(unused_name(folder.parent, f"replaced-{target.name}"))
                rename_durable(target, aside)
            rename_durable(folder, target)
        folder = target
    size_bytes = seal.size_bytes + (folder / SEAL_NAME).stat().st_size
    return Checkpoint(
        path=folder, step=step, state=CheckpointState.INTACT, size_bytes=size_bytes, fingerprint=fingerprint
    )


def rotate(
    model_dir: PathLike,
    *,
    keep: int,
    fingerprint: Fingerprint | None = None,
    key: bytes | None = None,
    spared: Collection[int] = (),
) -> tuple[Path, ...]:
    """Remove all but the newest `keep` checkpoints of the run in progress, and those of the `spared` steps.

    Returns what was removed.
    That run is the one of `fingerprint`; without it, that of the newest checkpoint that is structurally
    intact. Checkpoints of other runs, and torn, altered or unsealed ones, are not touched: rotation is not a
    way to lose evidence.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}: the newest checkpoint is never removed")
    sealed = [checkpoint for checkpoint in scan_checkpoints(model_dir, key=key) if checkpoint.is_intact]
    run = fingerprint if fingerprint is not None or not sealed else sealed[-1].fingerprint
    if run is None:
        return ()
    mine = [checkpoint for checkpoint in sealed if checkpoint.belongs_to(run)]
    removed = [checkpoint.path for checkpoint in mine[:-keep] if checkpoint.step not in spared]
    if removed:
        with storage_errors("rotate the checkpoints in", model_dir):
            give_up(model_dir, removed)
    return tuple(removed)


def give_up(model_dir: PathLike, folders: Iterable[Path]) -> None:
    """Remove checkpoint folders, each renamed first.

    A folder that is half removed is never a checkpoint.
    """
    staging = ensure_staging(model_dir)
    for folder in folders:
        trash = staging / unused_name(staging, TRASH_PREFIX + folder.name)
        rename_durable(folder, trash)
        shutil.rmtree(trash)
