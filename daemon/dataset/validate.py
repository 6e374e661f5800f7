"""One pass over a claimed file: every row checked, rows and bytes counted, BLAKE3 digest taken.

Memory stays flat at any size.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from blake3 import blake3

from daemon.dataset.recognise import SAMPLE_BYTES, Recognised, recognise, recognise_misnamed
from daemon.dataset.rows import DataRules, Format, Rules, describe_keys, detect_format
from daemon.dataset.scan import (
    PARALLEL_ABOVE_BYTES,
    LineProblem,
    Tally,
    scan_blocks,
    scan_parallel,
)
from daemon.dataset.source import DatasetSource, SourceError, open_dataset
from daemon.errors import RejectedData, TryLater
from daemon.job import Dataset
from daemon.text import escape

FORMATS_HINT = (
    "one JSON object a line: messages; prompt and completion; text; instruction and output; conversations;"
    " or name your columns under [data.columns]"
)


@dataclass(frozen=True, kw_only=True)
class DatasetReport:
    """What the pass found, good or bad."""

    name: str
    size_bytes: int
    format: str | None = None
    lines: int = 0
    rows: int = 0  # good ones
    bad_rows: int = 0
    problems: tuple[LineProblem, ...] = ()  # the first bad lines
    bad_lines: tuple[int, ...] = ()  # numbers of the first thousand
    whole: bool = True  # the file was read to its end; else counts are of the part that was read
    digest: str | None = None  # BLAKE3 of the file's bytes, when it was read whole
    reason: str = ""  # why it is refused; empty: it is not
    hint: str = ""


class RejectedDataset(RejectedData):
    """A dataset that cannot be trained; `report` says where and why."""

    def __init__(self, report: DatasetReport) -> None:
        super().__init__(
            operation="use", subject=escape(report.name), cause=report.reason, hint=report.hint or FORMATS_HINT
        )
        self.report = report


class DatasetChanged(TryLater):
    """The file was written to while it was read, or since."""


@dataclass(frozen=True, kw_only=True)
class Scan:
    """A dataset that passed, and what the pass found on the way (rows left out under on_bad_rows = "skip")."""

    dataset: Dataset
    report: DatasetReport


def scan_dataset(
    path: str | Path,
    data: DataRules,
    *,
    processes: int = 1,
    progress: Callable[[int], None] = lambda _: None,
) -> Scan:
    """Read `path` once from end to end; `progress` is told how many of its bytes are done.

    Above 64 MiB a plain file is read by `processes` processes (0: as many as cores). Raises RejectedDataset;
    DatasetChanged when it changed meanwhile; ChildProcessError when a helper died; OSError.
    """
    target = Path(path)
    rules = Rules.of(data)
    size = 0
    try:
        with open_dataset(target, max_expansion=rules.max_expansion) as source:
            before = source.signature()
            size = before.size_bytes
            other = recognise_source(source)
            if other is not None and other.certain:
                raise SourceError(other.reason, _whole_hint(other, rules))
            count = processes or os.cpu_count() or 1
            if source.compression is None and count > 1 and size >= PARALLEL_ABOVE_BYTES:
                format_, tally, digest = scan_parallel(source, rules, processes=count, progress=progress)
            else:
                hasher = blake3()
                source.on_raw = hasher.update
                format_, tally = scan_blocks(source.blocks(), rules, progress=lambda _: progress(source.raw_bytes_read))
                digest = hasher.hexdigest()
            if source.signature() != before:
                raise DatasetChanged(
                    operation="check",
                    subject=escape(target.name),
                    cause="it is still being written",
                    hint="it is read again when it has settled",
                )
    except SourceError as error:
        raise RejectedDataset(
            DatasetReport(name=target.name, size_bytes=size, whole=False, reason=error.reason, hint=error.hint)
        ) from error
    report = judge(tally, format_, rules, name=target.name, size_bytes=size, digest=digest)
    if report.reason and other is not None:
        report = _as_other_kind(report, other, rules)
    if report.reason or format_ is None:
        raise RejectedDataset(report)
    dataset = Dataset(
        name=target.name,
        path=str(target),
        size_bytes=size,
        content_bytes=source.expanded_bytes or size,
        rows=report.rows,
        digest=digest,
        format=format_.value,
        skipped_rows=report.bad_rows,
    )
    return Scan(dataset=dataset, report=report)


def judge(
    tally: Tally, format_: Format | None, rules: Rules, *, name: str, size_bytes: int, digest: str
) -> DatasetReport:
    """What the counts mean: an empty `reason` accepts the file."""
    rows = tally.finish() if format_ is not None else 0
    reason = hint = ""
    share = tally.bad / max(1, rows + tally.bad)
    if tally.lines == 0 or (format_ is not None and rows + tally.bad == 0) or (format_ is None and not tally.bad):
        reason, hint = "it holds no rows", "drop a file with one JSON object a line"
    elif format_ is None:
        reason, hint = _unrecognised(tally)
    elif tally.bad and rules.on_bad_rows == "reject":
        some = "at least " if tally.stopped else ""
        first = tally.problems[0]
        where = f"{'' if tally.bad == 1 else 'the first is '}line {first.line}, column {first.column}: {first.reason}"
        reason = f"{some}{tally.bad} of {tally.lines} lines {'is' if tally.bad == 1 else 'are'} bad; {where}"
        hint = _row_hint(tally)
    elif tally.bad and (share > rules.max_bad_fraction or not rows):
        reason = f"{share:.2%} of the rows are bad, more than max_bad_fraction = {rules.max_bad_fraction:.2%}"
        hint = "mend the lines named, or raise [data] max_bad_fraction"
    return DatasetReport(
        name=name,
        size_bytes=size_bytes,
        format=format_.value if format_ else None,
        lines=tally.lines,
        rows=rows,
        bad_rows=tally.bad,
        # Lines of no known format all say the same.
        problems=tuple(tally.problems if format_ else tally.problems[:3]),
        bad_lines=tuple(tally.bad_lines),
        whole=not tally.stopped,
        digest=digest if digest and not tally.stopped and format_ is not None else None,
        reason=reason,
        hint=hint,
    )


def recognise_source(source: DatasetSource) -> Recognised | None:
    """What an opened file is when it does not begin with rows."""
    size = source.signature().size_bytes
    if source.compression is not None:
        raw = source.head(SAMPLE_BYTES)
        if misnamed := recognise_misnamed(raw, compression=source.compression, whole=len(raw) == size):
            return misnamed
        sample = source.content_head(SAMPLE_BYTES + 1)
        return recognise(sample[:SAMPLE_BYTES], whole=len(sample) <= SAMPLE_BYTES)
    sample = source.head(SAMPLE_BYTES)
    return recognise(sample, whole=len(sample) == size)


def _as_other_kind(report: DatasetReport, other: Recognised, rules: Rules) -> DatasetReport:
    """A refused file that began like another kind: that is told in place of its lines, unless some of them are good."""
    hint = _whole_hint(other, rules)
    if report.rows:
        return replace(report, reason=f"{report.reason}; {other.reason}", hint=hint)
    return replace(report, reason=other.reason, hint=hint, problems=(), bad_lines=())


def _whole_hint(other: Recognised, rules: Rules) -> str:
    """The way out, to its end: rows of no known format would be refused again."""
    row = other.first_row
    if row is None or detect_format(row, rules.columns) is not None:
        return other.hint
    return f"{other.hint}; its rows then need [data.columns]: {describe_keys(row)}"


def _unrecognised(tally: Tally) -> tuple[str, str]:
    first = tally.problems[0]
    if "the line is longer" in first.reason:
        return f"line {first.line}: {first.reason}", "split it into rows, or raise [data] max_line_bytes"
    return f"no format was recognised in its first lines; line {first.line}: {first.reason}", FORMATS_HINT


def _row_hint(tally: Tally) -> str:
    if any("max_line_bytes" in problem.reason for problem in tally.problems):
        return "split the long rows, or raise [data] max_line_bytes; then drop the file again"
    skip = 'set [data] on_bad_rows = "skip" (here or in a sidecar) to leave them out'
    return f"mend the lines named and drop the file again, or {skip}"


def verify_dataset(path: str | Path, dataset: Dataset) -> None:
    """Read the file again and compare: what is trained must be what was checked.

    Raises DatasetChanged when size or digest differ, RejectedData when it cannot be read.
    """
    # Imported here: the child that passes over files starts twice as fast, and stays smaller, without it.
    from guard import GuardError
    from guard.digest import digest_file

    try:
        found = digest_file(path)
    except GuardError as error:
        raise RejectedData(operation="read", subject=escape(str(path)), cause=str(error)) from error
    if (found.size_bytes, found.blake3_hex) != (dataset.size_bytes, dataset.digest):
        raise DatasetChanged(
            operation="train",
            subject=escape(dataset.name),
            cause=f"it was changed after it was checked (digest {dataset.digest[:16]}..., now"
            f" {found.blake3_hex[:16]}...)",
            hint="drop it again when its writer is done",
        )
