"""Versions: finished adapters, which of them is current, and where each came from.

A version is a folder that is complete before it gets its name. `latest` moves by one rename, and the adapter's files in
the model directory are links through it, so that a reader meets the old adapter or the new one and nothing between.
Torch-free: the trainer writes a candidate, the daemon promotes it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import guard
from daemon.errors import DropforgeError, NotFound
from daemon.job import Job, RunResult, utc_now
from guard.atomic import append_line_durable, fsync_dir, fsync_tree, rename_durable, write_atomic
from guard.digest import digest_file
from guard.lock import require_lock

if TYPE_CHECKING:  # a trainer has no settings, and what reads them takes time to import
    from daemon.config import Settings

VERSIONS = "versions"
LATEST = "latest"
LINEAGE = "lineage.jsonl"
RECORD = "training_record.json"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_NAME = re.compile(r"\d{4,}")


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


def list_versions(model_dir: Path) -> list[Version]:
    """Return all versions, oldest first."""
    folder = model_dir / VERSIONS
    names = sorted((entry.name for entry in os.scandir(folder)), key=len) if folder.is_dir() else []
    versions = [_version(folder / name) for name in names if _NAME.fullmatch(name) and (folder / name).is_dir()]
    return sorted(versions, key=lambda version: int(version.name))


def current_version(model_dir: Path) -> Version | None:
    """Return the version that `latest` names, None before the first.

    Raises DropforgeError when the link leads to no version.
    """
    link = model_dir / LATEST
    try:
        target = os.readlink(link)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DropforgeError(
            operation="read",
            subject=link,
            cause=f"it is not a link ({error.strerror})",
            hint="remove it; the next promotion makes it again",
        ) from error
    folder, _, name = target.rpartition("/")
    try:
        leads_to_version = folder == VERSIONS and bool(_NAME.fullmatch(name)) and (model_dir / target).is_dir()
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
            cause=f"it leads to {target!r}, which is no version",
            hint=f"`ln -sfn versions/NNNN {link}` points it at one that exists",
        )
    return _version(model_dir / VERSIONS / name)


def find_version(model_dir: Path, name: str) -> Version:
    """Return the version called `name`, with or without leading zeros. Raises NotFound."""
    for version in list_versions(model_dir):
        if version.name == name or (name.isdecimal() and int(version.name) == int(name)):
            return version
    raise NotFound(
        operation="find version", subject=name, cause="there is none", hint="`dropforge versions` lists them"
    )


def promote(model_dir: Path, candidate: Path, *, job_id: str, record: Mapping[str, Any]) -> Version:
    """Make the adapter in `candidate` the next version and the current one; the caller holds the model lock.

    Can be repeated: after a crash at any point the same call carries on where the first one stopped. Raises
    DropforgeError when the candidate is incomplete, or gone without having become a version.
    """
    version = None if candidate.is_dir() else _of_job(model_dir, job_id)  # the rename is what makes it a version
    if version is None:
        missing = [name for name in ADAPTER_FILES if not (candidate / name).is_file()]
        if missing:
            raise DropforgeError(
                operation="promote", subject=candidate, cause=f"{', '.join(missing)} is missing", hint="retry the job"
            )
        for leftover in candidate.glob(".*.tmp"):  # of a record that was being written when its writer died
            leftover.unlink()
        existing = list_versions(model_dir)
        for earlier in existing:  # one whose promotion failed for good half-way is part of the line all the same
            _record_lineage(model_dir, earlier)
        name = f"{int(existing[-1].name) + 1 if existing else 1:04d}"
        parent = current_version(model_dir)
        full = {"version": name, "job": job_id, "parent": parent.name if parent else None, "created_at": utc_now()}
        write_atomic(candidate / RECORD, json.dumps({**full, **record}, indent=1))
        fsync_tree(candidate)
        folder = model_dir / VERSIONS
        folder.mkdir(exist_ok=True)
        fsync_dir(model_dir)
        rename_durable(candidate, folder / name)
        version = _version(folder / name)
    _record_lineage(model_dir, version)
    point_latest(model_dir, version)
    return version


def promote_result(settings: Settings, job: Job, result: RunResult, log: Any) -> Version:
    """Make a run's candidate the current version, under the model lock; a crash in between is repaired by the next call.

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
    with guard.ModelLock(model_dir, owner="promotion"):
        version = promote(model_dir, Path(result.candidate or ""), job_id=job.id, record=record)
        guard.mark_finished(model_dir, version.name)
        _purge(settings, log)
    return version


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


def rollback(model_dir: Path, name: str) -> Version:
    """Make the version called `name` the current one; the caller holds the model lock. A no-op when it is already.

    The lineage is written first: after a crash between the two, the same call carries on. Raises NotFound.
    """
    require_lock(model_dir, "roll back")
    version, replaced = find_version(model_dir, name), current_version(model_dir)
    if replaced is not None and replaced.name == version.name:
        return version
    line = {"event": "rolled_back", "version": version.name, "replaced": replaced.name if replaced else None}
    append_line_durable(model_dir / LINEAGE, json.dumps({**line, "at": utc_now()}))
    point_latest(model_dir, version)
    return version


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


def _version(path: Path) -> Version:
    try:
        record = json.loads((path / RECORD).read_bytes())
    except (OSError, ValueError):
        record = {}
    return Version(name=path.name, path=path, record=record if isinstance(record, dict) else {})


def _of_job(model_dir: Path, job_id: str) -> Version | None:
    mine = [version for version in list_versions(model_dir) if version.record.get("job") == job_id]
    return mine[-1] if mine else None


def _record_lineage(model_dir: Path, version: Version) -> None:
    path = model_dir / LINEAGE
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
            if entry.get("version") == version.name and entry.get("event") == "promoted":
                return
        except (ValueError, AttributeError):
            continue  # a line torn by a crash; append_line_durable ends it and the record follows
    append_line_durable(path, json.dumps({"event": "promoted", **version.record}))


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
