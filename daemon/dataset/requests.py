"""Request and reply between the daemon and the child process that validates files."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from daemon.dataset.rows import Rules
from daemon.dataset.validate import DatasetChanged, DatasetReport, RejectedDataset, scan_dataset
from daemon.errors import RejectedData
from daemon.job import Dataset, Priority
from guard.atomic import fsync_tree

PROGRESS_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class SidecarRequest:
    """A sidecar to read before its file, and what it is checked against."""

    path: str
    recipe: Mapping[str, Any]  # the root's; see daemon.recipe.Recipe
    limits: Mapping[str, Any]  # see daemon.limits.LimitSettings


@dataclass(frozen=True, kw_only=True)
class SidecarWish:
    """What a sidecar asks for, checked."""

    priority: Priority | None = None
    force: bool = False
    overrides: Mapping[str, Any] = field(default_factory=dict)
    ignored: str = ""  # why it was not used at all; then the rest is empty


@dataclass(frozen=True, kw_only=True)
class Request:
    """One file to validate. `rules` are those of the root; a sidecar may change them."""

    job_id: str
    path: str
    rules: Rules
    durable: bool = False  # what lies in its folder is made durable, whether it passes or not
    refusal: tuple[str, str] | None = None  # why it is refused whatever its rows are, and what to do
    sidecar: SidecarRequest | None = None


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The result; `kind` says which of the other fields are set."""

    job_id: str
    kind: str  # progress | passed | rejected | changed | failed
    bytes_read: int = 0
    dataset: Dataset | None = None
    report: DatasetReport | None = None
    message: str = ""
    hint: str = ""
    wish: SidecarWish | None = None  # of its sidecar, when it has one that can be used


def answer(request: Request, report_progress: Callable[[Reply], None]) -> Reply:
    """Validate the file, and make it durable where that is wanted. Never raises: every outcome has a reply."""
    if request.refusal is not None:
        message, hint = request.refusal
        reply = Reply(job_id=request.job_id, kind="failed", message=message, hint=hint)
    else:
        reply = _validate(request, report_progress)
    if request.durable and reply.kind != "changed":
        try:
            fsync_tree(Path(request.path).parent)
        except OSError as error:
            if reply.kind == "passed":  # else the reason why it is refused stands
                reason = f"it could not be made durable: {error.strerror or type(error).__name__}"
                hint = "see that the disk is sound and has room, then retry the job or drop the file again"
                return Reply(job_id=request.job_id, kind="failed", message=reason, hint=hint)
    return reply


def _validate(request: Request, report_progress: Callable[[Reply], None]) -> Reply:
    reported_at = time.monotonic()

    def progress(count: int) -> None:
        nonlocal reported_at
        if (now := time.monotonic()) - reported_at >= PROGRESS_SECONDS:
            reported_at = now
            report_progress(Reply(job_id=request.job_id, kind="progress", bytes_read=count))

    try:
        wish, rules = _read_sidecar(request)
    except RejectedData as error:
        return Reply(job_id=request.job_id, kind="rejected", message=error.sentence, hint=error.hint)
    except OSError as error:
        reason = f"it cannot be read: {error.strerror or type(error).__name__}"
        return Reply(job_id=request.job_id, kind="failed", message=reason)
    return replace(_scan(request, rules, progress), wish=wish)


def _read_sidecar(request: Request) -> tuple[SidecarWish | None, Rules]:
    """What the sidecar asks for, and the rules that it leaves in force. Raises RejectedSidecar, OSError."""
    if request.sidecar is None:
        return None, request.rules
    # Only here: the settings' machinery would double what a process that reads rows imports, and few files have one.
    from daemon.dataset.sidecar import ForeignSidecar, read_sidecar
    from daemon.limits import LimitSettings
    from daemon.recipe import Recipe

    path, data_owner = Path(request.sidecar.path), Path(request.path).lstat().st_uid
    recipe = Recipe.model_validate(request.sidecar.recipe)
    limits = LimitSettings.model_validate(request.sidecar.limits)
    try:
        found = read_sidecar(path, recipe, limits, data_owner=data_owner)
    except ForeignSidecar as error:
        return SidecarWish(ignored=str(error)), request.rules
    wish = SidecarWish(priority=found.priority, force=found.force, overrides=found.overrides)
    return wish, Rules.of(recipe.with_overrides(found.overrides).data, limits)


def _scan(request: Request, rules: Rules, progress: Callable[[int], None]) -> Reply:
    try:
        scan = scan_dataset(request.path, rules, progress=progress)
    except RejectedDataset as error:
        return Reply(job_id=request.job_id, kind="rejected", report=error.report)
    except DatasetChanged as error:
        return Reply(job_id=request.job_id, kind="changed", message=error.sentence)
    except MemoryError:
        return Reply(job_id=request.job_id, kind="failed", message="a row needs too much memory")
    except OSError as error:
        reason = f"it cannot be read: {error.strerror or type(error).__name__}"
        return Reply(job_id=request.job_id, kind="failed", message=reason)
    except Exception as error:  # a fault of ours; the file is refused, and the next one gets its turn
        traceback.print_exc(file=sys.stderr)
        reason = f"its rows could not be checked: {type(error).__name__} inside Dropforge; its log has the details"
        return Reply(job_id=request.job_id, kind="failed", message=reason)
    return Reply(job_id=request.job_id, kind="passed", dataset=scan.dataset, report=scan.report)
