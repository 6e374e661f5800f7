"""The report beside a finished job's file: `report.txt` to read, `report.json` for programs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daemon.job import Dataset, Job, JobState, to_json
from daemon.text import escape
from guard.json_text import parse_json

if TYPE_CHECKING:  # most commands say something of a report, and none of those checks a dataset
    from daemon.dataset.validate import DatasetReport

REPORT_TEXT = "report.txt"
REPORT_JSON = "report.json"
REPORT_VERSION = 1
_LOG_LINES, _LOG_TAIL_BYTES = 20, 16 * 1024
_SHOWN_KEYS = 20  # unused keys in a text; the JSON has all
_SHOWN_LINES = 100  # numbers of skipped lines in the text; the JSON has up to a thousand


@dataclass(frozen=True, kw_only=True)
class TrainerLog:
    """A failed run's log: its path and last lines."""

    path: str
    last_lines: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> TrainerLog | None:
        """Read the end of a trainer's log; None when there is none."""
        try:
            with path.open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES))
                text = log.read().decode("utf-8", errors="replace")
        except OSError:
            return None
        lines = [escape(line, most=300) for line in text.splitlines() if line.strip()]
        return cls(path=str(path), last_lines=tuple(lines[-_LOG_LINES:]))


def report_json(
    job: Job, rows: DatasetReport | None, *, file_deleted: bool = False, trainer: TrainerLog | None = None
) -> str:
    """Render the report as one JSON object, with the facts of `report_text`."""
    value = {
        "schema_version": REPORT_VERSION,
        "job": job.id,
        "file": job.name,
        "source": job.source,
        "state": job.state.value,
        "reason": job.reason,
        "hint": job.advice,
        "duplicate_of": job.duplicate_of,
        "continues": job.continues,
        "version": job.version,
        "failure": job.failure,
        "dropped_at": job.created_at,
        "finished_at": job.finished_at or job.updated_at,
        "file_deleted": file_deleted,
        "dataset": job.dataset,
        "rows": rows,
        "owner": job.owner,
        "warnings": (*job.notes, *(job.result.warnings if job.result is not None else ())),
        "trainer": trainer,
        "retry": retry_command(job),
    }
    return to_json(value, indent=2) + "\n"


def report_text(
    job: Job, rows: DatasetReport | None, *, file_deleted: bool = False, trainer: TrainerLog | None = None
) -> str:
    """Render the report as plain text; nothing of the file or its name is left unescaped."""
    verdict = "duplicate, not trained" if job.duplicate_of else job.state.value
    lines = [
        f"{escape(job.name)}: {verdict}",
        "",
        f"  job       {job.id}",
        f"  dropped   {job.created_at} as {escape(job.source)}",
        f"  finished  {job.finished_at or job.updated_at}",
    ]
    if job.dataset is not None:
        found = job.dataset
        lines.append(f"  rows      {found.rows:,} ({found.format}), {found.size_bytes:,} bytes")
        lines.append(f"  BLAKE3    {found.digest}")
        lines += [f"  {label:<9} {text}" for label, text in remarks(found)]
    if job.continues:
        lines.append(f"  continues job {job.continues}, which took this name shortly before: rows that are appended to")
        lines.append("            a file in the inbox come as several jobs; write it elsewhere, then rename it in")
    if job.version:
        lines.append(f"  version   {job.version}")
    if job.reason:
        lines.append(f"  reason    {escape(job.reason, most=1000)}")
    if job.failure and job.state is JobState.FAILED:
        lines.append(f"  failure   {job.failure}")
    if job.advice:
        lines.append(f"  hint      {escape(job.advice, most=1000)}")
    lines += [f"  warning   {escape(note, most=1000)}" for note in job.notes]
    for warning in job.result.warnings if job.result is not None else ():
        lines.append(f"  warning   {escape(warning, most=1000)}")
    if file_deleted:
        lines.append('  the file was deleted after training, as on_success = "delete" says')
    if rows is not None:
        lines += ["", *rows_text(rows)]
    if trainer is not None:
        lines += ["", f"The trainer's last lines (all of them: {trainer.path}):"]
        lines += [f"  {line}" for line in trainer.last_lines] or ["  it wrote none"]
    if job.state in (JobState.FAILED, JobState.REJECTED, JobState.CANCELLED):
        lines += ["", "To try this file again as it is:", f"  {retry_command(job)}"]
        if job.duplicate_of:
            lines += ["or drop it with a sidecar that says `force = true`."]
    return "\n".join(lines) + "\n"


def rows_text(rows: DatasetReport) -> list[str]:
    """Render what the validation found, line by line."""
    lines = []
    scope = "" if rows.whole else " (the file was not read to its end)"
    lines.append(f"{rows.lines:,} lines, {rows.rows:,} good rows, {rows.bad_rows:,} bad ones{scope}.")
    for problem in rows.problems:
        lines.append(f"  line {problem.line}, column {problem.column}: {escape(problem.reason, most=300)}")
        if problem.excerpt:
            lines.append(f"      {problem.excerpt}")
    if rows.bad_rows > len(rows.problems):
        lines.append(f"  and {rows.bad_rows - len(rows.problems):,} more")
    if not rows.reason and rows.bad_lines:
        numbers = ", ".join(str(number) for number in rows.bad_lines[:_SHOWN_LINES])
        more = ", …" if rows.bad_rows > _SHOWN_LINES else ""
        lines.append(f'Left out of training (on_bad_rows = "skip"): lines {numbers}{more}')
    if rows.reason:
        lines += [f"{label}: {text}" for label, text in remarks(rows)]
    return lines


def remarks(found: Dataset | DatasetReport) -> list[tuple[str, str]]:
    """Return label and text of remarks on good rows: keys that are not used, warnings, how rows are read."""
    lines = []
    if found.unused_keys:
        lines.append(("not used", keys_text(found.unused_keys)))
    for warning in found.warnings:
        numbers = ", ".join(map(str, warning.lines))
        more = ", …" if warning.rows > len(warning.lines) else ""
        count = "1 row, line" if warning.rows == 1 else f"{warning.rows:,} rows, lines"
        lines.append(("warning", f"{warning.message}: {count} {numbers}{more}"))
    lines += [("note", note) for note in found.notes]
    return lines


def keys_text(unused: Mapping[str, int]) -> str:
    """Return keys with the number of rows that have them: `id (1,200 rows), source (1,200)`."""
    shown = list(unused.items())
    keys = [
        f"{escape(key, most=80)} ({rows:,}{'' if at else ' rows' if rows != 1 else ' row'})"
        for at, (key, rows) in enumerate(shown[:_SHOWN_KEYS])
    ]
    more = f", and {len(shown) - _SHOWN_KEYS} more" if len(shown) > _SHOWN_KEYS else ""
    return f"{', '.join(keys)}{more}"


def retry_command(job: Job) -> str:
    """Return the command that puts the job back into the queue."""
    return f"dropforge retry {job.id}"


def parse_report(text: str) -> dict[str, Any]:
    """Decode what `report_json` made, as plain data. Raises ValueError."""
    value = parse_json(text)
    if not isinstance(value, dict) or value.get("schema_version") != REPORT_VERSION:
        raise ValueError("not a report of this version")
    return value
