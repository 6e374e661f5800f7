"""Versions: finished adapters, which of them is current, and where each came from.

A version is a folder that is complete before it gets its name. `latest` moves by one rename, and the adapter's files in
the model directory are links through it, so that a reader meets the old adapter or the new one and nothing between.
Torch-free: the trainer writes a candidate, the daemon promotes it.

The lineage (`daemon.lineage`) is the authority on which numbers were used and which version is current.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import to_builtins

import guard
from daemon.errors import DropforgeError, NotFound
from daemon.evaluation.values import GateAction
from daemon.job import Job, RunResult, utc_now
from daemon.lineage import HELD, PROMOTED, ROLLED_BACK, VERSION_NAME, append_event, number_of, read_lineage
from daemon.lineage import newest_number as newest_in_lineage
from daemon.memory.promotion import keep_memory
from daemon.memory.store import HELD_OUT_NAME, ROWS_NAME
from daemon.run_dir import run_dir_of
from daemon.text import escape
from guard.atomic import fsync_dir, fsync_tree, make_folder_durable, rename_durable, write_atomic
from guard.digest import digest_file
from guard.json_text import parse_json
from guard.lock import require_lock

if TYPE_CHECKING:  # a trainer has no settings, and what reads them takes time to import
    from daemon.config import Settings

VERSIONS = "versions"
LATEST = "latest"
RECORD = "training_record.json"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
CARD = "README.md"  # for people, who may edit it
COARSEST_CLOCK_SECONDS = 2.5  # a folder whose times moved longer ago than this moves them at its next change
ONLY_IN_RECORD = ("evaluation",)  # what a version's line in the lineage leaves out of its record


class CandidateLost(DropforgeError):
    """A finished run's adapter is gone, or is not what the run wrote: only the run can make it again."""


@dataclass(frozen=True, kw_only=True)
class Version:
    """One finished adapter."""

    name: str  # 0001, 0002, ...
    path: Path
    record: Mapping[str, Any] = field(default_factory=dict)  # training_record.json: job, dataset, losses, parent

    @property
    def digest(self) -> str:
        """BLAKE3 of the adapter's weights, hex; what a run that continues this version depends on."""
        return digest_file(self.path / "adapter_model.safetensors").blake3_hex


def newest_number(model_dir: Path) -> int:
    """The highest version number that was ever used here, as far as lineage and folders tell; 0 before the first.

    For those who ask every second: it costs the same however many there were. Raises OSError.
    """
    return max(newest_in_lineage(model_dir), _newest_folder(model_dir))


_newest_folders: dict[
    Path, tuple[tuple[int, ...], int]
] = {}  # by the versions' folder: its times, and what they are of
MOST_FOLDERS = 16


def _newest_folder(model_dir: Path) -> int:
    """The highest number of a version's folder; listed again only when the times of their folder have moved."""
    folder = model_dir / VERSIONS
    try:
        found = folder.stat()
    except FileNotFoundError:
        return 0
    times = (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns)
    known = _newest_folders.get(folder)
    if known is not None and known[0] == times:
        return known[1]
    newest = max(map(int, _version_names(model_dir)), default=0)
    # A name that comes within the same clock tick as the listing moves no time.
    if time.time() - max(found.st_mtime, found.st_ctime) > COARSEST_CLOCK_SECONDS:
        if len(_newest_folders) >= MOST_FOLDERS:
            _newest_folders.clear()
        _newest_folders[folder] = times, newest
    return newest


def list_versions(model_dir: Path) -> list[Version]:
    """Return all versions, oldest first."""
    return [read_version(model_dir / VERSIONS / name) for name in sorted(_version_names(model_dir), key=int)]


def _version_names(model_dir: Path) -> list[str]:
    """The names of the versions' folders, in no order. Raises OSError."""
    folder = model_dir / VERSIONS
    entries = os.scandir(folder) if folder.is_dir() else ()
    return [entry.name for entry in entries if VERSION_NAME.fullmatch(entry.name) and entry.is_dir()]


def current_version(model_dir: Path) -> Version | None:
    """Return the version that `latest` names, None before the first.

    Raises DropforgeError when the link leads astray, or is missing although versions were made: going on from the base model
    would forget them all.
    """
    link = model_dir / LATEST
    try:
        target = os.readlink(link)
    except FileNotFoundError:
        if read_lineage(model_dir).current or list_versions(model_dir):
            raise DropforgeError(
                operation="find the current version",
                subject=link,
                cause="the link is missing, and versions were made here",
                hint="`dropforge rollback N` makes version N the current one",
            ) from None
        return None
    except OSError as error:
        raise DropforgeError(
            operation="read",
            subject=link,
            cause=f"it is not a link ({error.strerror})",
            hint="move it away; `dropforge rollback N` makes version N the current one",
        ) from error
    folder, _, name = target.rpartition("/")
    try:
        leads_to_version = folder == VERSIONS and bool(VERSION_NAME.fullmatch(name)) and (model_dir / target).is_dir()
    except OSError as error:  # a folder on the way that may not be entered
        raise DropforgeError(
            operation="read",
            subject=model_dir / target,
            cause=str(error.strerror),
            hint=f"let this user enter {model_dir / VERSIONS}",
        ) from error
    if not leads_to_version:
        raise DropforgeError(
            operation="follow",
            subject=link,
            cause=f"it leads to {escape(target)}, which is no version",
            hint="bring that folder back, or make version N current with `dropforge rollback N`",
        )
    return read_version(model_dir / VERSIONS / name)


def repair_latest(model_dir: Path) -> Version | None:
    """Point `latest` at the version that the lineage says is current, when the link is lost or leads astray.

    Returns the version when something was mended; the caller holds the model lock. Raises DropforgeError when the lineage does
    not tell, or its version is gone too.
    """
    require_lock(model_dir, "repair `latest`")
    try:
        current_version(model_dir)
        return None
    except DropforgeError as error:
        name = read_lineage(model_dir).current
        found = {version.name: version for version in list_versions(model_dir)}
        if name not in found or ((model_dir / LATEST).exists() and not (model_dir / LATEST).is_symlink()):
            raise error
        point_latest(model_dir, found[name])
        return found[name]


def find_version(model_dir: Path, name: str) -> Version:
    """Return the version called `name`, with or without leading zeros. Raises NotFound."""
    for version in list_versions(model_dir):
        if version.name.lstrip("0") == name.lstrip("0"):
            return version
    raise NotFound(
        operation="find version", subject=name, cause="there is none", hint="`dropforge versions` lists them"
    )


def promotion_record(version: Version) -> Mapping[str, Any]:
    """Return what was noted when a version was promoted: by the lineage, or by its own record where that has no line."""
    return read_lineage(version.path.parent.parent).recorded().get(version.name) or version.record


def line_of(version: Version | None) -> tuple[list[Mapping[str, Any]], str]:
    """Return what was noted at the promotion of a version and of all that it goes back to, newest first.

    And a sentence where the line cannot be followed to its beginning, empty where it can.
    """
    line: list[Mapping[str, Any]] = []
    if version is None:
        return line, ""
    model_dir = version.path.parent.parent
    noted = {**{found.name: found.record for found in list_versions(model_dir)}, **read_lineage(model_dir).recorded()}
    name: Any = version.name
    while name is not None:
        record = noted.pop(name, None)  # once: a line that leads back into itself ends there
        if not record:
            return line, f"version {escape(str(name))} is not known here: what was learned before it is not rehearsed"
        line.append(record)
        name = record.get("parent")
    return line, ""


def learned_by(model_dir: Path, dataset_digest: str) -> list[str]:
    """Return the versions whose weights have learned a dataset, themselves or by way of their parents, oldest first."""
    noted = {**{found.name: found.record for found in list_versions(model_dir)}, **read_lineage(model_dir).recorded()}
    learned: dict[str, bool] = {}
    for name in sorted(noted, key=number_of):
        record = noted[name]
        own = record.get("dataset_digest") == dataset_digest
        learned[name] = own or learned.get(str(record.get("parent")), False)
    return [name for name, has in learned.items() if has]


def named_base(version: Version) -> tuple[str, str]:
    """Return name and commit of the base model as the adapter's own configuration has them; "" for what it lacks."""
    try:
        config = parse_json((version.path / ADAPTER_FILES[0]).read_bytes())
        return str(config.get("base_model_name_or_path") or ""), str(config.get("revision") or "")
    except (OSError, ValueError, AttributeError):
        return "", ""


def damage(version: Version, digest_of: Callable[[str], str | None] | None = None) -> tuple[str, ...]:
    """Say what of a version is not as it was promoted, a sentence each; empty when all of it is.

    The card does not count. A version of before its files were recorded is judged by its adapter alone, or by nothing.
    `digest_of` tells the digest of a file, None when it lacks that; without it the files are read. Raises OSError.
    """
    if not version.record:
        return (f"version {version.name} has no {RECORD} that can be read",)
    record = promotion_record(version)
    files = record.get("files")
    recorded = files if isinstance(files, Mapping) else {}
    if not recorded and record.get("adapter_digest"):
        recorded = {"adapter_model.safetensors": record["adapter_digest"]}
    found = []
    for name, promoted in sorted(recorded.items()):
        if name == CARD:
            continue
        digest = digest_of(name) if digest_of is not None else _digest_in(version.path / Path(name).name)
        if digest is None:
            found.append(f"version {version.name} lacks {escape(name)}")
        elif digest != promoted:
            found.append(f"version {version.name}: {escape(name)} is not the file that was promoted")
    return tuple(found)


def _digest_in(path: Path) -> str | None:
    return digest_file(path).blake3_hex if path.is_file() else None


def promote(model_dir: Path, candidate: Path, *, job_id: str, record: Mapping[str, Any]) -> Version:
    """Make the adapter in `candidate` the next version and the current one; the caller holds the model lock.

    One whose record says why it is `held` becomes a version, and not the current one.

    Can be repeated: after a crash at any point the same call carries on where the first one stopped. Raises CandidateLost
    when the candidate is incomplete, not the one whose `adapter_digest` is in the record, or gone without having become a
    version; DropforgeError.
    """
    version = (
        None if candidate.is_dir() else _of_job(model_dir, job_id, record.get("adapter_digest"))
    )  # the rename is what makes it a version
    if version is None:
        missing = [name for name in ADAPTER_FILES if not (candidate / name).is_file()]
        if missing:
            raise CandidateLost(operation="promote", subject=candidate, cause=f"{', '.join(missing)} is missing")
        for leftover in candidate.glob(".*.tmp"):  # of a record that was being written when its writer died
            leftover.unlink()
        # One whose promotion failed half-way is part of the line all the same.
        _record_promotions(model_dir, _version_names(model_dir))
        name = f"{newest_number(model_dir) + 1:04d}"  # never one that was used, also when its folder is gone
        parent = current_version(model_dir)
        full = {
            "version": name,
            "job": job_id,
            "parent": parent.name if parent else None,
            "parent_digest": parent.digest if parent else None,
            "created_at": utc_now(),
        }
        files = {path.name: digest_file(path).blake3_hex for path in sorted(candidate.iterdir()) if path.name != RECORD}
        if record.get("adapter_digest") not in (None, files["adapter_model.safetensors"]):
            cause = "adapter_model.safetensors is not the file that the run wrote"
            raise CandidateLost(operation="promote", subject=candidate, cause=cause)
        write_atomic(candidate / RECORD, json.dumps({**full, **record, "files": files}, indent=1))
        fsync_tree(candidate)
        folder = model_dir / VERSIONS
        make_folder_durable(folder)
        rename_durable(candidate, folder / name)
        version = read_version(folder / name)
    if (
        _record_promotions(model_dir, [version.name]) == version.name
    ):  # else it was promoted long ago: `latest` never moves back
        point_latest(model_dir, version)
    return version


def promote_result(settings: Settings, job: Job, result: RunResult, log: Any) -> Version:
    """Make a run's candidate the current version, under the model lock; a crash in between is repaired by the next call.

    One that the gate holds becomes a version that is not current. What is kept of its dataset goes to the memory first: of
    a held one as well, so that its held-out rows stay untrained; nothing is rehearsed of what the line has not learned.

    Raises DropforgeError, GuardError, OSError; the candidate then stays where it is.
    """
    model_dir = settings.model_dir
    record: Mapping[str, Any] = {
        "dataset": job.dataset.name if job.dataset else job.name,
        "dataset_digest": job.dataset.digest if job.dataset else None,
        "rows": result.rows,
        "steps": result.steps_run,
        "held_out_before": result.held_out_before,
        "held_out_after": result.held_out_after,
        "train_loss": result.train_loss,
        "adapter_digest": result.adapter_digest,
    }
    if result.replayed:
        record = {**record, "replayed": {dataset.digest: dataset.rows for dataset in result.replayed}}
    if (evaluation := result.evaluation) is not None:
        record = {**record, "evaluation": to_builtins(evaluation)}
        if evaluation.action is GateAction.HELD:
            record = {**record, "held": list(evaluation.reasons)}
    if result.base is not None:  # what the run itself started from; a trainer of before that does not say
        record = {**record, "base": result.base, "parent": result.parent, "parent_digest": result.parent_digest}
    with guard.ModelLock(model_dir, owner="promotion"):
        _keep_memory(settings, job, log)
        version = promote(model_dir, Path(result.candidate or ""), job_id=job.id, record=record)
        guard.mark_finished(model_dir, version.name)
        _purge(settings, log)
    return version


def _keep_memory(settings: Settings, job: Job, log: Any) -> None:
    """Move what the run left of its dataset to the memory. Raises OSError."""
    placed = keep_memory(
        settings.state_dir,
        run_dir_of(settings.state_dir, job.id),
        settings.replay,
        file_is_deleted=settings.inbox.on_success == "delete",
    )
    for problem in placed.problems:
        log.error("memory.damaged", job=job.id, error=problem)
    if placed.memory is not None:
        meta = placed.memory.meta
        log.info(
            "memory.kept",
            job=job.id,
            digest=meta.digest,
            rows=meta.mark(ROWS_NAME).rows,
            held_out_rows=meta.mark(HELD_OUT_NAME).rows,
            discarded=meta.discarded,
        )
    if placed.shrunk:
        log.info("memory.shrunk", datasets=list(placed.shrunk), memory_bytes=settings.replay.memory_bytes)


def _purge(settings: Settings, log: Any) -> None:
    """Delete cleared checkpoints that policy no longer keeps; a failure is logged and changes nothing else."""
    policy = settings.guard
    try:
        purged = guard.purge_cleared(
            settings.model_dir,
            keep_sets=policy.keep_cleared_sets,
            keep_days=policy.keep_cleared_days,
            keep_bytes=policy.keep_cleared_bytes,
        )
    except (guard.GuardError, OSError) as error:
        log.error("guard.not_purged", error=str(error))
        return
    if purged.purged:
        log.info("guard.cleared_sets_purged", sets=list(purged.purged), size_bytes=purged.size_bytes)


def rollback(model_dir: Path, name: str, *, after_job: bool = False) -> Version:
    """Make the version called `name` the current one; the caller holds the model lock. A no-op when it is already.

    `after_job` is noted: it was asked for before the version that it replaces was made.

    The lineage is written first: after a crash between the two, the same call carries on. Raises NotFound, and DropforgeError
    when the version is not as it was promoted.
    """
    require_lock(model_dir, "roll back")
    version = find_version(model_dir, name)
    if version.name in read_lineage(model_dir).held():
        raise DropforgeError(
            operation="roll back to",
            subject=f"version {version.name}",
            cause="the gate holds it, so it was never current",
            hint=f"`dropforge promote {int(version.name)}` makes it current, `dropforge show` of its job says what it lost",
        )
    if found := damage(version):
        raise DropforgeError(
            operation="roll back to",
            subject=f"version {version.name}",
            cause="; ".join(found),
            hint="bring the version back from a backup, or roll back to another one",
        )
    try:
        replaced = current_version(model_dir)
    except DropforgeError:
        replaced = None  # this command is the way out of a `latest` that is lost
    if replaced is not None and replaced.name == version.name:
        return version
    append_event(
        model_dir,
        {
            "event": ROLLED_BACK,
            "version": version.name,
            "replaced": replaced.name if replaced else None,
            **({"after_job": replaced.record.get("job")} if after_job and replaced else {}),
            "at": utc_now(),
        },
    )
    point_latest(model_dir, version)
    return version


def record_restore(model_dir: Path, *, current: str | None, used: int, created_at: str) -> None:
    """Note that a backup of `created_at` was restored where versions up to `used` had been made: no number is used twice."""
    event = {"event": "restored", "version": current, "used": f"{used:04d}", "backup_of": created_at, "at": utc_now()}
    append_event(model_dir, event)


def mend_latest(settings: Settings, log: Any) -> None:
    """Bring `latest` back from the lineage where it is lost; what cannot be told holds the queue at the next dispatch."""
    try:
        with guard.ModelLock(settings.model_dir, owner="repair"):
            mended = repair_latest(settings.model_dir)
    except (DropforgeError, guard.GuardError, OSError):
        return
    if mended is not None:
        log.warning("version.latest_repaired", version=mended.name)


def point_latest(model_dir: Path, version: Version) -> None:
    """Swap `latest` to `version` and make the model directory's own links follow it.

    New links come first and dangle until the swap; links to files that the version lacks go last.
    """
    files = sorted(entry.name for entry in os.scandir(version.path) if entry.is_file(follow_symlinks=False))
    for name in files:
        _link(model_dir / name, f"{LATEST}/{name}")
    fsync_dir(model_dir)
    _link(model_dir / LATEST, f"{VERSIONS}/{version.name}")
    fsync_dir(model_dir)
    for entry in os.scandir(model_dir):
        if entry.is_symlink() and entry.name not in files and entry.name != LATEST:
            target = os.readlink(entry.path)
            if target == f"{LATEST}/{entry.name}":
                Path(entry.path).unlink()
    fsync_dir(model_dir)


def read_version(path: Path) -> Version:
    """Return the version in a folder; its record is empty where it cannot be read."""
    try:
        record = parse_json((path / RECORD).read_bytes())
    except (OSError, ValueError):
        record = {}
    return Version(name=path.name, path=path, record=record if isinstance(record, dict) else {})


def _of_job(model_dir: Path, job_id: str, adapter_digest: object) -> Version | None:
    """The version that a job's run became; of a job with two runs, the one with this adapter."""
    mine = [
        version
        for version in list_versions(model_dir)
        if version.record.get("job") == job_id
        and (adapter_digest is None or version.record.get("adapter_digest") in (None, adapter_digest))
    ]
    return mine[-1] if mine else None


def _record_promotions(model_dir: Path, names: Iterable[str]) -> str | None:
    """Append a line for each of these versions that the lineage does not have. Raises OSError.

    Returns the version that is the current one by the last line.
    """
    lineage = read_lineage(model_dir)
    known, current = lineage.recorded().keys() | lineage.discarded().keys(), lineage.current
    for name in sorted(names, key=int):
        if name not in known:
            version = read_version(model_dir / VERSIONS / name)
            is_held = bool(version.record.get("held"))
            record_event(model_dir, HELD if is_held else PROMOTED, version)
            current = current if is_held else name
    return current


def record_event(model_dir: Path, event: str, version: Version, **facts: Any) -> None:
    """Append what is known of a version to the lineage, as an event. Raises OSError."""
    record = {key: value for key, value in version.record.items() if key not in ONLY_IN_RECORD}
    append_event(model_dir, {"event": event, **record, **facts, "version": version.name})


def _link(path: Path, target: str) -> None:
    """Make `path` a link to `target` by one rename, whatever link was there. A real file is left alone."""
    if path.is_symlink() and os.readlink(path) == target:
        return
    if path.exists() and not path.is_symlink():
        raise DropforgeError(
            operation="link",
            subject=path,
            cause="a file that is not a link is in the way",
            hint="move it elsewhere; the model directory's own files lie in versions/",
        )
    beside = path.with_name(f".{path.name}.new")
    beside.unlink(missing_ok=True)
    beside.symlink_to(target)
    beside.replace(path)
