"""Whether a file was trained before: the same bytes, read in the same way.

Settings of `[data]` decide which words of a file are learned. A file that was trained under others is not a duplicate:
what would be learned of it now was not learned then.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from daemon.dataset.rows import Format
from daemon.job import Dataset, Job
from daemon.recipe import DataSettings


def find_duplicate(trained: Iterable[Job], dataset: Dataset, data: DataSettings) -> Job | None:
    """Return the first job that learned the same words; None when none did. `trained`: jobs of the same bytes."""
    return next((job for job in trained if not changed_settings(job, dataset, data)), None)


def changed_settings(job: Job, dataset: Dataset, data: DataSettings) -> list[str]:
    """Name the settings under which a job of the same bytes learned other words."""
    before = _data_settings(job)
    if job.dataset is None or before is None:
        return []  # only the bytes are known, and they are the same
    was, now = _reading(before, job.dataset), _reading(data, dataset)
    if job.result is not None and job.result.truncated_rows:
        was["max_length"], now["max_length"] = before.max_length, data.max_length
    return [f"{key} = {json.dumps(was[key])}, now {json.dumps(now[key])}" for key in was if was[key] != now[key]]


def _data_settings(job: Job) -> DataSettings | None:
    """The settings that a job was queued with; None when this version cannot read them."""
    try:
        return DataSettings.model_validate((job.recipe or {})["data"])
    except (KeyError, ValidationError):
        return None


def _reading(data: DataSettings, dataset: Dataset) -> dict[str, Any]:
    """What decides which words of the file are learned."""
    train_on = "assistant" if data.train_on == "auto" else data.train_on
    if train_on == "completion" and dataset.format != Format.PROMPT_COMPLETION:
        train_on = "assistant"
    columns = data.columns.model_dump(exclude_none=True) if dataset.format == Format.COLUMNS else {}
    is_pair = dataset.format == Format.PROMPT_COMPLETION or "prompt" in columns
    return {
        "train_on": train_on,
        "prompt_completion": data.prompt_completion if is_pair else None,
        "columns": columns,
        "format": dataset.format,
        "rows": dataset.rows,
    }
