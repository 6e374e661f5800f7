"""Scanning the lines of a dataset: good rows at the parser's speed, bad ones by line and column.

Blocks of whole lines go through a typed decoder in C; only a line that it does not take is looked at in Python. A large
plain file is cut into chunks, which forked processes take in turn while the parent digests the bytes; what each chunk
found is added up in file order, so the result does not depend on the number of processes.
"""

from __future__ import annotations

import mmap
import os
import signal
import struct
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, count

import msgspec
from blake3 import blake3

from daemon.dataset.fast_path import NOT_TAKEN, RowDecoder
from daemon.dataset.rows import Format, Rules, describe_keys, detect_format
from daemon.dataset.source import BLOCK_BYTES, BOM, DatasetSource, Lines, TooLong, whole_lines
from daemon.dataset.strict_json import LineError, excerpt, parse_object
from daemon.processes import describe_exit, die_with_parent

LISTED_PROBLEMS = 20  # bad lines that a report shows
LISTED_LINES = 1000  # numbers of skipped lines that a report names
STOP_AFTER_BAD_ROWS = 1000  # under "reject": a file of another kind need not be read to its end
CHUNK_BYTES = 16 * 2**20
PARALLEL_ABOVE_BYTES = 64 * 2**20  # below, starting processes costs more than they save
DETECT_LINES = 100  # the first of these with known keys decides the format


@dataclass(frozen=True, kw_only=True)
class LineProblem:
    """One bad line; `column` counts characters from 1, `excerpt` is safe to print."""

    line: int
    column: int
    reason: str
    excerpt: str


@dataclass(kw_only=True)
class Tally:
    """What was found in a stretch of lines, numbered from 1 within it."""

    lines: int = 0
    bad: int = 0  # lines refused, blank ones not among them
    problems: list[LineProblem] = field(default_factory=list)  # the first LISTED_PROBLEMS
    bad_lines: list[int] = field(default_factory=list)  # the first LISTED_LINES
    blank_runs: list[tuple[int, int]] = field(default_factory=list)  # first and last line of each run
    stopped: bool = False  # the rest was not read

    def add(self, line: bytes, number: int, error: LineError) -> None:
        """Record a bad line."""
        self.bad += 1
        if len(self.problems) < LISTED_PROBLEMS:
            self.problems.append(
                LineProblem(line=number, column=error.column, reason=error.reason, excerpt=excerpt(line, error.column))
            )
        if len(self.bad_lines) < LISTED_LINES:
            self.bad_lines.append(number)

    def add_blank(self, first: int, last: int) -> None:
        """Record blank lines; whether they matter is known at the end of the file."""
        if self.blank_runs and self.blank_runs[-1][1] == first - 1:
            self.blank_runs[-1] = (self.blank_runs[-1][0], last)
        else:
            self.blank_runs.append((first, last))

    def append(self, later: Tally) -> None:
        """Add what was found in the stretch that follows."""
        for problem in later.problems[: LISTED_PROBLEMS - len(self.problems)]:
            self.problems.append(replace(problem, line=problem.line + self.lines))
        room = LISTED_LINES - len(self.bad_lines)
        self.bad_lines.extend(number + self.lines for number in later.bad_lines[:room])
        for first, last in later.blank_runs:
            self.add_blank(first + self.lines, last + self.lines)
        self.bad += later.bad
        self.lines += later.lines
        self.stopped = self.stopped or later.stopped

    def finish(self) -> int:
        """Blank lines at the end are fine, all others are bad rows. Returns the number of good rows."""
        blank = sum(last - first + 1 for first, last in self.blank_runs)
        if self.blank_runs and self.blank_runs[-1][1] == self.lines and not self.stopped:
            self.blank_runs.pop()
        inner = [number for first, last in self.blank_runs[:LISTED_LINES] for number in range(first, last + 1)]
        found = [LineProblem(line=n, column=1, reason="an empty line", excerpt="") for n in inner[:LISTED_PROBLEMS]]
        self.problems = sorted([*self.problems, *found], key=lambda item: item.line)[:LISTED_PROBLEMS]
        self.bad_lines = sorted([*self.bad_lines, *inner])[:LISTED_LINES]
        rows = self.lines - self.bad - blank
        self.bad += sum(last - first + 1 for first, last in self.blank_runs)
        self.blank_runs = []
        return rows


class LineScanner:
    """Checks the lines of consecutive blocks into a Tally."""

    def __init__(self, format_: Format, rules: Rules) -> None:
        self.tally = Tally()
        self._rules = rules
        self._rejecting = rules.on_bad_rows == "reject"
        self._rows = RowDecoder(format_, rules.columns)

    def scan(self, blocks: Iterable[bytes]) -> Tally:
        """Read all blocks; lines may span them. Stops early where reading on is pointless."""
        for whole in whole_lines(blocks, self._rules.max_line_bytes):
            if isinstance(whole, TooLong):
                self.tally.lines += 1
                self.tally.add(b"", self.tally.lines, LineError(whole.max_line_bytes + 1, str(whole)))
                self.tally.stopped = self._rejecting
            else:
                self._check(whole)
            if self._rejecting and self.tally.bad > STOP_AFTER_BAD_ROWS:
                self.tally.stopped = True
            if self.tally.stopped:
                break
        return self.tally

    def _check(self, lines: Lines) -> None:
        stream = lines.stream()  # its iterator cuts lines in C, each used while it is in the cache
        while True:
            good = count()  # counted in C as well: looking for newlines once more would cost a fifth of the time
            try:
                deque(zip(map(self._rows.decode, stream), good, strict=False), maxlen=0)
                self.tally.lines += next(good)
                break
            except NOT_TAKEN:
                self.tally.lines += next(good) + 1
                end = stream.tell()
                begin = max(lines.start, lines.block.rfind(b"\n", lines.start, end - 1) + 1)
                self._look_closer(lines.block[begin:end], self.tally.lines)

    def _look_closer(self, line: bytes, number: int) -> None:
        if not line.strip():
            self.tally.add_blank(number, number)
            return
        try:
            self._rows.examine(line)
        except LineError as error:
            self.tally.add(line, number, error)


def scan_blocks(
    blocks: Iterable[bytes], rules: Rules, *, progress: Callable[[int], None]
) -> tuple[Format | None, Tally]:
    """Detect the format, then check every line; None when no row has the keys of a known format.

    `progress` is told the bytes of each block. Raises SourceError.
    """
    held: list[bytes] = []
    counted = _counting(_without_bom(blocks), progress)
    format_, tally = detect(_keeping(counted, held), rules)
    if format_ is None:
        return None, tally
    return format_, LineScanner(format_, rules).scan(chain(held, counted))


def detect(blocks: Iterable[bytes], rules: Rules) -> tuple[Format | None, Tally]:
    """The format of the first row with known keys among the first lines; else what is wrong with those lines."""
    tally = Tally()
    for whole in whole_lines(blocks, rules.max_line_bytes):
        if isinstance(whole, TooLong):
            tally.lines += 1
            tally.add(b"", tally.lines, LineError(whole.max_line_bytes + 1, str(whole)))
            tally.stopped = True
            return None, tally
        for line in whole.stream():
            tally.lines += 1
            if not line.strip():
                tally.add_blank(tally.lines, tally.lines)
                continue
            try:
                row = parse_object(line)
                found = detect_format(row, rules.columns)
                if found is not None:
                    return found, tally
                raise LineError(1, describe_keys(row))
            except LineError as error:
                tally.add(line, tally.lines, error)
            if tally.lines >= DETECT_LINES:
                tally.stopped = True
                return None, tally
    return None, tally


def scan_parallel(
    source: DatasetSource, rules: Rules, *, processes: int, progress: Callable[[int], None]
) -> tuple[Format | None, Tally, str]:
    """The same over one large plain file by `processes` processes, with its digest.

    This process digests the file, then helps with the chunks. Raises SourceError, ChildProcessError when a process
    died.
    """
    size = source.signature().size_bytes
    format_, tally = detect(_without_bom(source.range(0, size)), rules)
    if format_ is None:
        return None, tally, ""
    starts = range(0, size, CHUNK_BYTES)
    # One shared file offset deals the chunks out: reading four bytes is taking a number, in whichever process.
    numbers = os.memfd_create("chunks", os.MFD_CLOEXEC)
    os.write(numbers, array("I", range(len(starts))).tobytes())
    os.lseek(numbers, 0, os.SEEK_SET)
    done = mmap.mmap(-1, 8 * processes)
    scanner = _ChunkScanner(source, format_, rules, numbers, done)
    helpers = [_Helper.start(scanner, slot) for slot in range(1, processes)]
    try:
        hasher, digested = blake3(), 0
        for block in source.range(0, size):
            hasher.update(block)
            digested += len(block)
            if digested % (64 * BLOCK_BYTES) == 0:
                progress(scanner.checked)
        results = scanner.run(0, progress)
        for helper in helpers:
            results |= helper.result()
    finally:
        for helper in helpers:
            helper.end()
        os.close(numbers)
    total = Tally()
    for index in range(len(starts)):
        if index not in results:
            break  # a process that stopped early told the others to leave the rest
        total.append(results[index])
    return format_, total, hasher.hexdigest()


class _ChunkScanner:
    """Takes chunks until there are none; `checked` is the sum over all processes, in bytes."""

    def __init__(self, source: DatasetSource, format_: Format, rules: Rules, numbers: int, done: mmap.mmap) -> None:
        self._source, self._format, self._rules = source, format_, rules
        self._numbers, self._done = numbers, done
        self._size = source.signature().size_bytes

    @property
    def checked(self) -> int:
        return sum(array("Q", self._done[:]))

    def run(self, slot: int, progress: Callable[[int], None] | None = None) -> dict[int, Tally]:
        results: dict[int, Tally] = {}
        checked = 0
        while taken := os.read(self._numbers, 4):
            index = int(array("I", taken)[0])
            low = index * CHUNK_BYTES
            high = min(low + CHUNK_BYTES, self._size)
            blocks = lines_starting_in(self._source, low, high, self._rules.max_line_bytes)
            tally = LineScanner(self._format, self._rules).scan(_without_bom(blocks) if low == 0 else blocks)
            results[index] = tally
            checked += high - low
            self._done[8 * slot : 8 * slot + 8] = struct.pack("Q", checked)
            if progress is not None:
                progress(self.checked)
            if tally.stopped:
                os.lseek(self._numbers, 0, os.SEEK_END)
        return results


@dataclass
class _Helper:
    """A forked process that scans chunks; its results come through a pipe."""

    pid: int
    pipe: int
    ended: bool = False

    @classmethod
    def start(cls, scanner: _ChunkScanner, slot: int) -> _Helper:
        reading, writing = os.pipe()
        parent = os.getpid()
        pid = os.fork()
        if pid:
            os.close(writing)
            return cls(pid, reading)
        status = 1
        try:
            os.close(reading)
            die_with_parent(parent)
            payload = msgspec.msgpack.encode({str(index): tally for index, tally in scanner.run(slot).items()})
            with os.fdopen(writing, "wb") as out:
                out.write(payload)
            status = 0
        finally:
            os._exit(status)  # nothing of the parent's may run here: no handlers, no flushes

    def result(self) -> dict[int, Tally]:
        with os.fdopen(self.pipe, "rb") as pipe:
            payload = pipe.read()
        _, status = os.waitpid(self.pid, 0)
        self.ended = True
        if status != 0:
            raise ChildProcessError(describe_exit(os.waitstatus_to_exitcode(status)))
        return {int(index): tally for index, tally in msgspec.msgpack.decode(payload, type=dict[str, Tally]).items()}

    def end(self) -> None:
        if not self.ended:
            self.ended = True
            os.close(self.pipe)
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


def lines_starting_in(source: DatasetSource, low: int, high: int, max_line_bytes: int) -> Iterator[bytes]:
    """The bytes of the lines that begin in [low, high): from the first newline on, to the end of the last line."""
    begun = low == 0
    position = low if begun else low - 1  # a line begins at `low` when the byte before it is a newline
    limit = high + max_line_bytes + BLOCK_BYTES  # a line that is longer is refused from what was read
    for block in source.range(position, limit):
        start = 0
        if not begun:
            start = block.find(b"\n") + 1
            if not start or position + start >= high:
                if start or position + len(block) >= high:
                    return  # no line begins in this chunk
                position += len(block)
                continue
            begun = True
        last = position + len(block)
        if last >= high:
            # The line that holds byte high - 1 is the last one of this chunk.
            end = block.find(b"\n", max(start, high - 1 - position)) + 1
            if end:
                yield block[start:end]
                return
        yield block[start:] if start else block
        position = last


def _without_bom(blocks: Iterable[bytes]) -> Iterator[bytes]:
    first = True
    for block in blocks:
        yield block.removeprefix(BOM) if first else block
        first = False


def _counting(blocks: Iterable[bytes], progress: Callable[[int], None]) -> Iterator[bytes]:
    for block in blocks:
        progress(len(block))
        yield block


def _keeping(blocks: Iterable[bytes], held: list[bytes]) -> Iterator[bytes]:
    for block in blocks:
        held.append(block)
        yield block
