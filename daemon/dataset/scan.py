"""Check the lines of a dataset one by one, and count what they hold."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain

from daemon.dataset.rows import (
    Answers,
    Format,
    Line,
    RowContent,
    Rules,
    check_row,
    count_answers,
    detect_format,
    joins_words,
    mentions_media,
)
from daemon.dataset.source import SourceError, TooLong
from daemon.dataset.strict_json import LineError, excerpt, parse_object
from daemon.dataset.suggest import describe_unknown
from daemon.job import RowWarning
from daemon.text import LIMITS_HINT, beyond_limit

LISTED_PROBLEMS = 20  # bad lines that a report shows
LISTED_LINES = 1000  # numbers of skipped lines that a report names
WARNED_LINES = 20  # numbers of lines that a warning names
# Under "reject" the first bad row decides. Further ones are read for the report alone, but no more than this.
STOP_AFTER_BAD_ROWS = 1000
STOP_AFTER_BYTES = 64 * 2**20
DETECT_LINES, DETECT_BYTES = 100, 64 * 2**20  # the first row with known keys among these decides the format
COUNTED_KEYS = 100  # unused keys that are counted by name
OTHER_KEYS = "(other keys)"

_NUMBER = re.compile(r"\d+")

EMPTY_ANSWER = "empty_answer"
NO_ANSWER = "no_answer"
MEDIA = "media_placeholder"
WARNINGS = {
    EMPTY_ANSWER: "an answer that would be learned is empty or only white space",
    NO_ANSWER: "no turn of the assistant that would be learned",
    MEDIA: "the placeholder of a picture, video or sound in the text; it is trained as the text that it is",
}


@dataclass(frozen=True, kw_only=True)
class LineProblem:
    """One bad line; `column` counts characters from 1, `excerpt` is safe to print."""

    line: int
    column: int
    reason: str
    excerpt: str
    hint: str = ""


@dataclass(kw_only=True)
class Tally:
    """What was found in the lines read so far."""

    lines: int = 0
    rows: int = 0  # good ones
    bad: int = 0
    blank: int = 0  # lines without a character, before the last row
    problems: list[LineProblem] = field(default_factory=list)  # the first LISTED_PROBLEMS
    reasons: set[str] = field(default_factory=set)  # of bad lines, but for places and counts; two stand for more
    bad_lines: list[int] = field(default_factory=list)  # the first LISTED_LINES
    unused_keys: Counter[str] = field(default_factory=Counter)  # rows that have the key
    warned: dict[str, list[int]] = field(default_factory=dict)  # code -> the first lines
    warned_rows: Counter[str] = field(default_factory=Counter)
    teaching: int = 0  # rows with an answer to learn that is not empty
    objects: int = 0  # lines that are a JSON object, while the format is looked for
    joined: int = 0  # rows whose prompt and completion are joined as they stand
    joined_tightly: int = 0  # of these, without white space between
    stopped: bool = False  # the rest was not read

    def add_bad(self, line: bytes, number: int, error: LineError) -> None:
        """Record a bad line."""
        self.bad += 1
        if len(self.reasons) < 2:
            self.reasons.add(_NUMBER.sub("0", error.reason))
        if len(self.problems) < LISTED_PROBLEMS:
            shown = excerpt(line, error.column)
            self.problems.append(
                LineProblem(line=number, column=error.column, reason=error.reason, excerpt=shown, hint=error.hint)
            )
        if len(self.bad_lines) < LISTED_LINES:
            self.bad_lines.append(number)

    def add_row(self, content: RowContent, number: int, train_on: str) -> None:
        """Record a good row."""
        self.rows += 1
        for key in content.unused_keys:
            known = key in self.unused_keys or len(self.unused_keys) < COUNTED_KEYS
            self.unused_keys[key if known else OTHER_KEYS] += 1
        answers = count_answers(content, train_on)
        if answers.learned > answers.empty:
            self.teaching += 1
        for code in row_warnings(content, answers):
            self._warn(code, number)
        if content.kind == "prompt_completion" and isinstance(content.prompt, str):
            self.joined += 1
            self.joined_tightly += joins_words(content)

    def warnings(self) -> tuple[RowWarning, ...]:
        """What is worth telling of good rows."""
        return tuple(
            RowWarning(code=code, message=message, rows=self.warned_rows[code], lines=tuple(self.warned[code]))
            for code, message in WARNINGS.items()
            if code in self.warned
        )

    def _warn(self, code: str, number: int) -> None:
        self.warned_rows[code] += 1
        lines = self.warned.setdefault(code, [])
        if len(lines) < WARNED_LINES:
            lines.append(number)


def row_warnings(content: RowContent, answers: Answers) -> list[str]:
    """What the owner of a good row may not have meant: codes of WARNINGS."""
    found = [EMPTY_ANSWER] if answers.empty else [] if answers.learned else [NO_ANSWER]
    return [*found, MEDIA] if mentions_media(content) else found


def scan_lines(lines: Iterable[Line], rules: Rules) -> tuple[Format | None, Tally]:
    """Detect the format, then check every line; None when no row has the keys of a known format.

    Stops early where reading on is pointless. Raises SourceError.
    """
    source = iter(lines)
    held: list[Line] = []
    format_, tally = _detect(source, held, rules)
    if format_ is None:
        return None, tally
    return format_, _check(chain(held, source), format_, rules)


def _check(lines: Iterable[Line], format_: Format, rules: Rules) -> Tally:
    tally = Tally()
    rejecting = rules.on_bad_rows == "reject"
    blank = 0
    left = STOP_AFTER_BYTES  # to be read after a bad row
    for number, line in lines:
        tally.lines = number
        if rejecting and tally.bad and not isinstance(line, TooLong):
            left -= len(line)
        if isinstance(line, TooLong):
            tally.add_bad(b"", number, _too_long(line))
            tally.stopped = rejecting
        elif not line.strip():
            blank += 1
            continue
        else:
            try:
                content = check_row(line, format_, rules)
            except LineError as error:
                tally.add_bad(line, number, error)
            else:
                tally.add_row(content, number, rules.train_on)
        tally.blank, blank = tally.blank + blank, 0
        if rules.max_rows and tally.rows > rules.max_rows:
            wish = f"it has more than {rules.max_rows:,} rows"
            raise SourceError(beyond_limit(wish, "max_rows", rules.max_rows), LIMITS_HINT)
        if tally.stopped or (rejecting and (tally.bad > STOP_AFTER_BAD_ROWS or left < 0)):
            tally.stopped = True
            break
    return tally


def _detect(lines: Iterator[Line], held: list[Line], rules: Rules) -> tuple[Format | None, Tally]:
    """The format of the first row with known keys among the first lines; else what is wrong with those lines.

    The lines that were read are added to `held`.
    """
    tally = Tally()
    size = 0
    for number, line in lines:
        held.append((number, line))
        tally.lines = number
        if isinstance(line, TooLong):
            tally.add_bad(b"", number, _too_long(line))
            tally.stopped = True
            break
        if not line.strip():
            continue
        try:
            row = parse_object(line)
            tally.objects += 1
            found = detect_format(row, rules.columns)
            if found is not None:
                return found, tally
            tally.add_bad(line, number, LineError(1, *describe_unknown(row, rules)))
        except LineError as error:
            tally.add_bad(line, number, error)
        size += len(line)
        if number >= DETECT_LINES or size >= DETECT_BYTES:
            tally.stopped = True
            break
    return None, tally


def _too_long(line: TooLong) -> LineError:
    return LineError(line.max_line_bytes + 1, str(line), "split the row, or raise [data] max_line_bytes")
