"""Holds: why nothing is launched although jobs are ready. A person paused the queue, a folder has no room or no access.

A hold burns no attempt and goes by itself when its reason goes.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from daemon import root_identity, versions
from daemon.base_identity import base_problem, find_base
from daemon.config import ExecutorSettings, Settings
from daemon.errors import DropforgeError, StoreError, TryLater, is_no_space
from daemon.lineage import LINEAGE
from daemon.processes import account_name
from daemon.recipe import Recipe
from daemon.run_dir import RUNS_NAME
from daemon.text import escape, format_bytes
from guard.json_text import parse_json
from guard.layout import LOCK_NAME

TRAINING_PACKAGES = ("torch", "transformers", "peft", "accelerate")
PAUSED_KEY = "paused"  # of the store's controls: {"mode": "now" | "after_job", "at": ..., "reason": ...}
FALLBACK_ADAPTER_BYTES = 64 * 2**20  # when neither a version nor the base model's configuration is known
OPTIMIZER_COPIES = 2  # AdamW keeps two values a weight
RECORDS_BYTES, RECORDS_INODES = 2**20, 64  # the least for the records of a run: its reports, events, the queue itself
EXTRAS_BYTES = 32 * 2**20  # tokenizer, configuration, records
_NOT_EXECUTED = frozenset(
    {errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.ENOEXEC, errno.ELOOP, errno.ELIBBAD, errno.ETXTBSY}
)

Evidence = tuple[Any, ...]


class HoldKind(StrEnum):
    """What holds the queue."""

    PAUSED = "paused"
    IDENTITY = "identity"
    BASE = "base"
    TRAINER = "trainer"
    UNWRITABLE = "unwritable"
    STORE = "store"
    INTERNAL = "internal"
    NO_SPACE = "no_space"
    SCHEDULE = "schedule"
    GPU = "gpu"


# What only a person mends: who does not wait for one, gives up.
FOR_A_PERSON = frozenset({HoldKind.IDENTITY, HoldKind.BASE, HoldKind.TRAINER})


@dataclass(frozen=True, kw_only=True)
class Hold:
    """One reason to wait."""

    kind: HoldKind
    reason: str


def hold_of(error: DropforgeError | OSError) -> Hold:
    """Return the hold of a machine that refused to read or record something now."""
    if is_no_space(error):
        kind = HoldKind.NO_SPACE
    elif isinstance(error, OSError | TryLater):
        kind = HoldKind.UNWRITABLE
    else:
        kind = HoldKind.STORE if isinstance(error, StoreError) else HoldKind.INTERNAL
    sentence = error.sentence if isinstance(error, DropforgeError) else escape(str(error), most=1000)
    return Hold(kind=kind, reason=f"{sentence}; it is tried again until it can be done")


def paused(control: Mapping[str, Any] | None) -> Hold | None:
    """Return the hold of a queue that was paused."""
    if not control:
        return None
    why = f": {control['reason']}" if control.get("reason") else ""
    return Hold(kind=HoldKind.PAUSED, reason=f"paused by a person at {control.get('at', '?')}{why}; `dropforge resume`")


def contradicted(settings: Settings) -> Hold | None:
    """The hold of a root whose parts do not belong together, or whose current version cannot be told."""
    reason = root_identity.contradiction(root_identity.read_parts(settings))
    if not reason:
        try:
            versions.current_version(settings.model_dir)
        except DropforgeError as error:
            reason = f"{error.sentence}; {error.hint}"
        except OSError:
            return None  # a folder that cannot be entered is the next hold's matter
    return Hold(kind=HoldKind.IDENTITY, reason=reason) if reason else None


def unusable_base(settings: Settings, recipe: Recipe) -> Hold | None:
    """Return the hold of a root whose base model no run can begin with.

    Once there is a version, the trainer looks: it knows what that was trained on.
    """
    if os.path.lexists(settings.model_dir / versions.LATEST):
        return None
    problem = base_problem(recipe.model)
    return None if problem is None else Hold(kind=HoldKind.BASE, reason=f"{problem.message}; {problem.hint}")


def unusable_trainer(settings: Settings) -> Hold | None:
    """Return the hold of a root whose trainer could not even be started: its program or its packages are not there."""
    command = settings.executor.command
    program = command[0] if command else ""
    if not _is_program(program):
        what = f"the trainer's program {escape(program) or '(none)'} is not there, or is no program"
        hint = "bring it back; or set [executor] command, and restart"
        return Hold(kind=HoldKind.TRAINER, reason=f"{what}; {hint}")
    if command != ExecutorSettings().command:
        return None  # it has packages of its own
    missing = [name for name in TRAINING_PACKAGES if find_spec(name) is None]
    if missing:
        what = f"the trainer's packages are not installed here: {', '.join(missing)}"
        return Hold(kind=HoldKind.TRAINER, reason=f"{what}; `{sys.executable} -m pip install 'dropforge[train]'`")
    return None


def _is_program(name: str) -> bool:
    """Whether there is such a program; one that cannot be looked at is not said to be missing."""
    places = [Path(name)] if os.sep in name else [Path(folder, name) for folder in os.get_exec_path() if name]
    for path in places:
        try:
            if (found := path.stat()).st_mode & 0o111 and stat.S_ISREG(found.st_mode):
                return True
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            return True
    return False


def refused_program(settings: Settings, error: OSError) -> str:
    """Say that the trainer's program could not be executed, and what to do; empty when another thing failed.

    What the kernel says counts: modes alone know nothing of a mount's noexec, of capabilities, or of a script's interpreter.
    """
    program = settings.executor.command[0] if settings.executor.command else ""
    if error.filename != program or error.errno not in _NOT_EXECUTED:
        return ""
    why = (error.strerror or str(error)).lower()
    hint = f"let {account_name(os.geteuid())} execute it; or set [executor] command, and restart"
    return f"the trainer's program {escape(program)} cannot be executed: {why}; {hint}"


def program_evidence(settings: Settings) -> Evidence:
    """What decides whether the trainer's program can be executed, cheap to compare; empty where it cannot be looked at."""
    program = settings.executor.command[0] if settings.executor.command else ""
    found = Path(shutil.which(program) or program).absolute()
    try:
        itself, parents = found.stat(), [folder.stat() for folder in found.parents]
        flags = os.statvfs(found).f_flag
    except OSError as error:
        return (error.errno,)
    ways = ((folder.st_mode, folder.st_uid, folder.st_gid) for folder in parents)
    return (str(found), itself.st_ino, itself.st_ctime_ns, flags & os.ST_NOEXEC, *ways)


def evidence(settings: Settings, recipe: Recipe) -> Evidence:
    """What decides whether a run may start, cheap to compare: its base and start, and the stats of both folders' files."""
    base = find_base(recipe.model)
    folders = (settings.model_dir / versions.LATEST, base.path if base is not None else None)
    return (recipe.model, recipe.training.start_from, *map(_listing, folders))


def _listing(folder: Path | None) -> Evidence:
    """Where a folder is, and name, size, times and inode of each file in it; empty where it cannot be read."""
    if folder is None:
        return ()
    found: list[Any] = [os.path.realpath(folder)]
    try:
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            at = entry.stat()  # of what a link leads to: the Hub's cache consists of links
            found.append((entry.name, at.st_size, at.st_mtime_ns, at.st_ctime_ns, at.st_ino))
    except OSError:
        pass
    return tuple(found)


def unwritable(settings: Settings, job_id: str = "") -> Hold | None:
    """Return the hold of what a run cannot write to, clear or replace.

    That is a folder's mode, a file system that became read-only, or what another account left: a checkpoint that is not
    ours can be neither resumed from nor moved out of the way, whatever job comes. `job_id`: whose run directory counts.
    """
    model, runs = settings.model_dir, settings.state_dir / RUNS_NAME
    own = (*(model / name for name in ("versions", ".staging", ".cleared")), settings.state_dir, runs)
    for path in (model, *own, *_parts_of_runs(model), *((runs / job_id,) if job_id else ())):
        try:
            why = access_problem(path)
        except FileNotFoundError:
            continue  # the run makes it
        if why:
            return Hold(kind=HoldKind.UNWRITABLE, reason=f"{path} cannot be used: {why}; waits until it can")
    return None


def _parts_of_runs(model_dir: Path) -> Iterator[Path]:
    """Checkpoints, and the records that are written in place: what a run replaces or moves away in the model directory."""
    for folder in (model_dir, model_dir / ".staging"):
        with suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                is_record = entry.name in (LOCK_NAME, LINEAGE)
                if is_record or (
                    entry.is_dir(follow_symlinks=False) and entry.name.startswith(("checkpoint-", "candidate-"))
                ):
                    yield Path(entry.path)


def access_problem(path: Path) -> str:
    """Return why nothing can be read, made and renamed in a folder, or a file not read and written; empty when all can be.

    Raises FileNotFoundError when there is none.
    """
    try:
        found = path.stat()
        is_folder = stat.S_ISDIR(found.st_mode)
        if not is_folder and not stat.S_ISREG(found.st_mode):
            return "it is not a folder"
        if os.access(path, os.R_OK | os.W_OK | (os.X_OK if is_folder else 0)):
            return ""
        if os.statvfs(path).f_flag & os.ST_RDONLY:
            return "read-only file system"
    except FileNotFoundError:
        raise
    except OSError as error:
        return (error.strerror or str(error)).lower()
    if found.st_uid == os.geteuid():
        return "permission denied"
    return f"permission denied, it belongs to {account_name(found.st_uid)} (`chown -R {account_name(os.geteuid())} {path}` as root)"


def no_space(settings: Settings, recipe: Recipe) -> Hold | None:
    """Return the hold of a disk that a run would fill."""
    if (hold := no_room(settings)) is not None:
        return hold
    needed = bytes_needed(recipe, settings.model_dir) + settings.queue.min_free_bytes
    free = free_bytes(settings.model_dir)
    if free >= needed:
        return None
    return Hold(
        kind=HoldKind.NO_SPACE,
        reason=f"{settings.model_dir} has {format_bytes(free)} free, a run needs {format_bytes(needed)}; waits for free space",
    )


def no_room(settings: Settings) -> Hold | None:
    """Return the hold of a disk without room for records, whatever is trained."""
    for folder in (settings.state_dir, settings.model_dir, settings.inbox_dir):
        if why := exhausted(folder):
            return Hold(kind=HoldKind.NO_SPACE, reason=f"{folder} {why}; waits until there is more")
    return None


def exhausted(folder: Path) -> str:
    """Say what a file system has too little of even for records; empty when it has enough, or does not tell."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return ""
    if found.f_bavail * found.f_frsize < RECORDS_BYTES:
        return f"has {format_bytes(found.f_bavail * found.f_frsize)} free for records"
    if found.f_files > 0 and found.f_favail < RECORDS_INODES:
        return f"has room for {found.f_favail} more files"
    return ""


def free_bytes(path: Path) -> int:
    """Return the bytes that this user may still write on the file system of `path`."""
    stat = os.statvfs(path)
    return stat.f_bavail * stat.f_frsize


def bytes_needed(recipe: Recipe, model_dir: Path) -> int:
    """Return what a run has on disk at most at one time: its checkpoints, the one being staged, and the version.

    An adapter's size is that of the current version; before the first one it follows from base model and rank.
    """
    adapter = _current_adapter_bytes(model_dir) or _planned_adapter_bytes(recipe) or FALLBACK_ADAPTER_BYTES
    checkpoint = adapter * (1 + OPTIMIZER_COPIES) + EXTRAS_BYTES
    return checkpoint * (recipe.training.save_total_limit + 1) + adapter + EXTRAS_BYTES


def _current_adapter_bytes(model_dir: Path) -> int:
    try:
        return (model_dir / "latest" / "adapter_model.safetensors").stat().st_size
    except OSError:
        return 0


def _planned_adapter_bytes(recipe: Recipe) -> int:
    """r x (inputs + outputs) x 4 bytes over the linear layers of a Llama-like model; 0 when its shape is not known."""
    try:
        config = parse_json((Path(recipe.model.model_name_or_path) / "config.json").read_bytes())
        hidden, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
        inner = int(config.get("intermediate_size", 4 * hidden))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return 0
    attention = 4 * (hidden + hidden)  # q, k, v, o; k and v may be narrower
    feed_forward = 3 * (hidden + inner)  # gate, up, down
    return recipe.lora.r * layers * (attention + feed_forward) * 4
