"""One pass over a claimed file: every row checked, rows and bytes counted, BLAKE3 digest taken.

Memory stays flat at any size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from blake3 import blake3

from daemon.dataset.recognise import SAMPLE_BYTES, recognise, recognise_misnamed
from daemon.dataset.rows import AS_CHAT, Format, Line, Rules, detect_format
from daemon.dataset.scan import EMPTY_ANSWER, NO_ANSWER, LineProblem, Tally, scan_lines
from daemon.dataset.signatures import Recognised
from daemon.dataset.source import DatasetSource, SourceError, open_dataset
from daemon.dataset.suggest import describe_unknown
from daemon.errors import RejectedData, TryLater
from daemon.job import Dataset, RowWarning
from daemon.text import LIMITS_HINT, beyond_limit, escape

if TYPE_CHECKING:
    from daemon.recipe import DataSettings

FORMATS_HINT = (
    "one JSON object a line: messages; prompt and completion; text; instruction and output; query and response;"
    " conversations; or name your columns under [data.columns]"
)
JSON_HINT = "write the rows with a JSON library, as Python's json.dumps, one object a line"
LINES_A_PROGRESS = 256


@dataclass(frozen=True, kw_only=True)
class DatasetReport:
    """What the pass found, good or bad."""

    name: str
    size_bytes: int
    format: str | None = None
    lines: int = 0
    rows: int = 0  # good ones
    bad_rows: int = 0
    blank_lines: int = 0  # skipped, before the last row
    problems: tuple[LineProblem, ...] = ()  # the first bad lines
    bad_lines: tuple[int, ...] = ()  # numbers of the first thousand
    unused_keys: Mapping[str, int] = field(default_factory=dict)  # keys that nothing is made of -> rows that have them
    warnings: tuple[RowWarning, ...] = ()
    notes: tuple[str, ...] = ()  # how the rows are read, where that is a choice
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
    data: Rules | DataSettings,
    *,
    progress: Callable[[int], None] = lambda _: None,
) -> Scan:
    """Read `path` once from end to end; `progress` is told how many of its bytes are done.

    Raises RejectedDataset; DatasetChanged when it changed meanwhile; OSError.
    """
    target = Path(path)
    rules = Rules.of(data)
    size = 0
    try:
        with open_dataset(
            target, max_expansion=rules.max_expansion, max_expanded_bytes=rules.max_expanded_bytes
        ) as source:
            before = source.signature()
            size = before.size_bytes
            if rules.max_file_bytes and size > rules.max_file_bytes:
                too_large = beyond_limit(f"it has {size:,} bytes", "max_file_bytes", rules.max_file_bytes)
                raise SourceError(too_large, LIMITS_HINT)
            source.refuse_holes()
            other = recognise_source(source)
            if other is not None and other.certain:
                raise SourceError(other.reason, _whole_hint(other, rules))
            hasher = blake3()
            source.on_raw = hasher.update
            format_, tally = scan_lines(_reporting(source, rules.max_line_bytes, progress), rules)
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
        unused_keys=report.unused_keys,
        warnings=report.warnings,
        notes=report.notes,
    )
    return Scan(dataset=dataset, report=report)


def _reporting(source: DatasetSource, max_line_bytes: int, progress: Callable[[int], None]) -> Iterator[Line]:
    """The source's lines, while `progress` is told of them now and then."""
    for line in source.lines(max_line_bytes):
        yield line
        if line[0] % LINES_A_PROGRESS == 0:
            progress(source.raw_bytes_read)
    progress(source.raw_bytes_read)


def judge(
    tally: Tally, format_: Format | None, rules: Rules, *, name: str, size_bytes: int, digest: str
) -> DatasetReport:
    """What the counts mean: an empty `reason` accepts the file."""
    reason, hint = _verdict(tally, format_, rules)
    alike = len(tally.reasons) == 1 and not tally.rows
    return DatasetReport(
        name=name,
        size_bytes=size_bytes,
        format=format_.value if format_ else None,
        lines=tally.lines,
        rows=tally.rows,
        bad_rows=tally.bad,
        blank_lines=tally.blank,
        problems=tuple(tally.problems[:3] if alike or format_ is None else tally.problems),
        bad_lines=tuple(tally.bad_lines),
        unused_keys=dict(tally.unused_keys.most_common()),
        warnings=tally.warnings(),
        notes=_notes(tally),
        whole=not tally.stopped,
        digest=digest if digest and not tally.stopped and format_ is not None else None,
        reason=reason,
        hint=hint,
    )


def _verdict(tally: Tally, format_: Format | None, rules: Rules) -> tuple[str, str]:
    """Why the file is refused and what to do; both empty when it is not."""
    total = tally.rows + tally.bad
    share = tally.bad / max(1, total)
    if not total:
        return "it holds no rows", "drop a file with one JSON object a line"
    if format_ is None:
        return _unrecognised(tally)
    if tally.bad and (rules.on_bad_rows == "reject" or not tally.rows):
        return _bad_rows(tally), _what_to_do(tally, share, rules)
    if share > rules.max_bad_fraction:
        reason = f"{share:.2%} of the rows are bad, more than max_bad_fraction = {rules.max_bad_fraction:.2%}"
        return reason, "mend the lines named, or raise [data] max_bad_fraction"
    if not tally.teaching:
        return _nothing_to_learn(tally)
    return "", ""


def _bad_rows(tally: Tally) -> str:
    first = tally.problems[0]
    some = "at least " if tally.stopped else ""
    total = tally.rows + tally.bad
    if len(tally.reasons) == 1 and not tally.rows and total > 1:
        where = "" if first.reason.startswith('"') else f", the first on line {first.line}"  # else the key is the place
        return f"{some}all {tally.bad} rows are refused{where}: {first.reason}"
    where = f"{'' if tally.bad == 1 else 'the first is '}line {first.line}, column {first.column}: {first.reason}"
    return f"{some}{tally.bad} of {tally.lines} lines {'is' if tally.bad == 1 else 'are'} bad; {where}"


def _what_to_do(tally: Tally, share: float, rules: Rules) -> str:
    """Leaving bad rows out is proposed only where the file would then be taken."""
    own = tally.problems[0].hint
    if not tally.rows:
        return own or "mend the rows and drop the file again"
    mend = own or "mend the lines named and drop the file again"
    bound = rules.max_bad_fraction
    raised = "" if share <= bound else f" and max_bad_fraction = {min(1.0, math.ceil(share * 100) / 100):g}"
    return f'{mend}; or set [data] on_bad_rows = "skip"{raised} (here or in a sidecar) to leave them out'


def _nothing_to_learn(tally: Tally) -> tuple[str, str]:
    empty, without = tally.warned_rows[EMPTY_ANSWER], tally.warned_rows[NO_ANSWER]
    if not without:
        return "nothing would be learned: every answer is empty", "drop a file whose answers hold text"
    if not empty:
        reason = "nothing would be learned: no row has a turn of the assistant that is to be learned"
    else:
        reason = f"nothing would be learned: in {empty} rows every answer is empty, and {without} have none to learn"
    return reason, 'give the rows turns of the assistant whose "weight" is not 0'


def _notes(tally: Tally) -> tuple[str, ...]:
    notes = []
    if tally.blank:
        notes.append(f"{tally.blank:,} blank {'line was' if tally.blank == 1 else 'lines were'} skipped")
    if tally.joined:
        rows = f"{tally.joined_tightly:,} {'row' if tally.joined_tightly == 1 else 'rows'}"
        tightly = f", in {rows} with no white space between" if tally.joined_tightly else ""
        notes.append(
            f"prompt and completion are joined as they stand{tightly};"
            f" {AS_CHAT} makes them a user's and an assistant's turn"
        )
    return tuple(notes)


def recognise_source(source: DatasetSource) -> Recognised | None:
    """What an opened file is when it does not begin with rows."""
    size = source.signature().size_bytes
    if source.compression is not None:
        raw = source.head(SAMPLE_BYTES)
        if misnamed := recognise_misnamed(raw, compression=source.compression, whole=len(raw) == size):
            return misnamed
        sample = source.content_head(SAMPLE_BYTES + 1)
        if not sample:
            return None  # damaged or empty, which the pass tells
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
    reason, hint = describe_unknown(row, rules)
    return f"{other.hint}; its rows would be refused then: {hint or reason}"


def _unrecognised(tally: Tally) -> tuple[str, str]:
    first = tally.problems[0]
    if not tally.objects:
        lines = "its line is" if tally.bad == 1 and not tally.stopped else "its lines are"
        return f"{lines} not JSON: line {first.line}, column {first.column}: {first.reason}", first.hint or JSON_HINT
    hint = first.hint or FORMATS_HINT
    if first.hint and len(tally.reasons) == 1 and first.column == 1:
        return first.reason, hint  # the keys of its rows say what the file is
    return f"no format was recognised in its first lines; line {first.line}: {first.reason}", hint
