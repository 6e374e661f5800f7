"""A finished candidate becomes the current version."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import guard
from daemon import versions
from daemon.config import Settings
from daemon.job import Job, RunResult


def promote(settings: Settings, job: Job, result: RunResult, log: Any) -> versions.Version:
    """Candidate to current version, idempotent: a crash in between is repaired by the next call.

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
        version = versions.promote(model_dir, Path(result.candidate or ""), job_id=job.id, record=record)
        guard.mark_finished(model_dir, version.name)
        _purge(settings, log)
    return version


def _purge(settings: Settings, log: Any) -> None:
    """Delete cleared checkpoints that policy no longer keeps; a failure is told and changes nothing else."""
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
