"""JSON arrays, tables and Parquet files as one JSON object a line: what `dropforge submit` drops in their place.

Each reader yields the rows it finds, one at a time; memory does not grow with the file, but for one row. What a reader
does not understand it refuses with the place: nothing is guessed or left out without a word.
"""

from __future__ import annotations

import ast
import csv
import io
import json
import re
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import IO, Any
from uuid import UUID

from daemon.dataset.keys import CONVERSATION_KEYS
from daemon.dataset.recognise import SAMPLE_BYTES, marked_encoding, recognise
from daemon.dataset.recognise_text import table_delimiter
from daemon.dataset.rows import Rules
from daemon.dataset.source import COMPRESSIONS, DatasetSource, SourceError, open_dataset
from daemon.dataset.strict_json import kind_of
from daemon.errors import RejectedData
from daemon.text import escape, finite

READ_CHARACTERS = 256 * 1024
PARQUET_ROWS = 1024  # in memory at once
TEXT_SUFFIXES = (".json", ".csv", ".tsv")
CONVERTED_SUFFIXES = (*TEXT_SUFFIXES, ".parquet")
_LINE_BREAKS = re.compile(r"[\r\n]+")
_PYTHON_LIST = re.compile(r"\s*\[\s*\{\s*'")
_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


class ConversionError(Exception):
    """A file that cannot be made rows; `hint` says what to do."""

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint


@dataclass(kw_only=True)
class Converted:
    """What was written: rows read on one side are lines written on the other."""

    rows: int = 0
    notes: list[str] = field(default_factory=list)  # what a person should know, one clause each


def conversion_of(name: str) -> str | None:
    """The suffix by which a file is converted (`.csv` for `x.csv` and `x.csv.gz`); None for other names."""
    path = Path(name.lower())
    suffix = Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix
    if suffix not in CONVERTED_SUFFIXES or (suffix == ".parquet" and path.suffix in COMPRESSIONS):
        return None
    return suffix


def converted_stem(name: str) -> str:
    """The name without the suffixes by which `conversion_of` knows it."""
    path = Path(name)
    return Path(path.stem).stem if path.suffix.lower() in COMPRESSIONS else path.stem


def convert(source: Path, target: IO[bytes], rules: Rules, *, encoding: str | None = None) -> Converted:
    """Write the rows of `source` to `target`, one JSON object a line.

    `encoding`: of a text file that is neither UTF-8 nor marked. Raises RejectedData, OSError.
    """
    found = Converted()
    try:
        with closing(_lines_of(source, rules, encoding, found)) as lines:
            for line in lines:
                raw = line.encode("utf-8")
                if len(raw) > rules.max_line_bytes:
                    raise ConversionError(
                        f"row {found.rows + 1} is longer than max_line_bytes = {rules.max_line_bytes}",
                        "split it, or raise [data] max_line_bytes",
                    )
                target.write(raw + b"\n")
                found.rows += 1
        if not found.rows:
            raise ConversionError("it holds no rows")
    except (ConversionError, SourceError) as error:
        raise RejectedData(
            operation="convert", subject=escape(str(source)), cause=error.reason, hint=error.hint
        ) from error
    except UnicodeError as error:
        raise RejectedData(
            operation="convert",
            subject=escape(str(source)),
            cause=_encoding_fault(error, encoding),
            hint="say its encoding, as `--encoding cp1252` (`file -i FILE` guesses)",
        ) from error
    return found


def _encoding_fault(error: UnicodeError, encoding: str | None) -> str:
    place = (
        f" after {error.start} bytes" if isinstance(error, UnicodeDecodeError) and error.start < READ_CHARACTERS else ""
    )
    if isinstance(error, UnicodeEncodeError):
        return "it holds half of a surrogate pair, which is no character"
    return f"its text is not {encoding or 'UTF-8'}{place}"


def _lines_of(source: Path, rules: Rules, encoding: str | None, found: Converted) -> Generator[str, None, None]:
    suffix = conversion_of(source.name)
    if suffix == ".parquet":
        yield from _parquet_lines(source)
        return
    # A person who names a link means the file; only the daemon must not follow one.
    with open_dataset(source.resolve(), max_expansion=rules.max_expansion) as opened:
        sample = opened.content_head(SAMPLE_BYTES)
        encoding = encoding or marked_encoding(sample) or "utf-8-sig"
        text = sample.decode(encoding, "replace").removeprefix("\ufeff")
        whole = len(sample) < SAMPLE_BYTES
        _refuse_other_kinds(text, whole, table=suffix != ".json")
        with _text_stream(opened, encoding) as stream:
            if suffix == ".json":
                yield from _json_lines(stream, rules.max_line_bytes)
            else:
                delimiter = "\t" if suffix == ".tsv" else table_delimiter(text, whole=whole)
                yield from _table_lines(stream, delimiter, rules.max_line_bytes, found)


def _refuse_other_kinds(text: str, whole: bool, *, table: bool) -> None:
    """A page under the name of a table, and JSON that has its rows somewhere inside."""
    kind = recognise(text.encode("utf-8", "replace"), whole=whole)
    if kind is not None and kind.converts != ".json" and (kind.certain or not table):
        raise ConversionError(kind.reason, kind.hint)
    if table and text.lstrip()[:1] in ("{", "["):
        raise ConversionError("it is JSON, not a table", "name it .json, or .jsonl with one object a line")


class _ContentStream(io.RawIOBase):
    """A dataset's content as a stream."""

    def __init__(self, opened: DatasetSource) -> None:
        self._blocks = opened.blocks()
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._rest:
            self._rest = next(self._blocks, b"")
        taken = self._rest[: len(buffer)]
        self._rest = self._rest[len(taken) :]
        buffer[: len(taken)] = taken
        return len(taken)


def _text_stream(opened: DatasetSource, encoding: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BufferedReader(_ContentStream(opened)), encoding=encoding, newline="")


# -- JSON


def _json_lines(stream: io.TextIOWrapper, longest: int) -> Generator[str, None, None]:
    """The objects of one array, or one after the other, as they are written but for line breaks."""
    text = _JsonText(stream, longest)
    opening = text.next_character()
    if opening == "[":
        text.skip()
        if text.next_character() == "]":
            return
        yield text.object()
        while (following := text.next_character()) == ",":
            text.skip()
            yield text.object()
        if following != "]":
            raise text.error("a comma or the array's end is missing")
        text.skip()
        if text.next_character():
            raise text.error("there is more after the array's end")
        return
    while text.next_character():
        yield text.object()


class _JsonText:
    """A place in a JSON text that is read as it is needed."""

    def __init__(self, stream: io.TextIOWrapper, longest: int) -> None:
        self._stream = stream
        self._longest = longest
        self._buffer = ""
        self._at = 0
        self._lines = 1  # of those that were dropped from the buffer, and this one
        self._objects = 0

    def next_character(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            self._at = _end_of_space(self._buffer, self._at)
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if not self._more(READ_CHARACTERS):
                return ""

    def skip(self) -> None:
        """Go past one character."""
        self._at += 1

    def object(self) -> str:
        """Go past one object; returns its text on one line."""
        self._objects += 1
        self._drop()
        if self.next_character() != "{":
            value = self._value()
            raise self.error(f"expected an object, found {kind_of(value)}")
        start = self._at
        self._value()
        # No string of JSON holds a line break as it is: what stands around one is layout.
        return " ".join(part.strip(" \t") for part in _LINE_BREAKS.split(self._buffer[start : self._at]))

    def error(self, reason: str) -> ConversionError:
        """At this place."""
        line = self._lines + self._buffer.count("\n", 0, self._at)
        return ConversionError(
            f"line {line}, value {max(1, self._objects)}: {reason}", "write the file anew with a JSON library"
        )

    def _value(self) -> Any:
        while True:
            try:
                value, self._at = _DECODER.raw_decode(self._buffer, self._at)
            except json.JSONDecodeError as error:
                # Perhaps it only goes on beyond the buffer, which is doubled: each character is read twice at most.
                if len(self._buffer) - self._at > 2 * self._longest:
                    raise self.error("it is not sound JSON, or longer than a line may be") from error
                if not self._more(max(READ_CHARACTERS, len(self._buffer) - self._at)):
                    self._at = min(error.pos, len(self._buffer))
                    ended = self._at >= len(self._buffer.rstrip())
                    raise self.error("the file ends inside it" if ended else "it is not sound JSON here") from error
            except (ValueError, RecursionError) as error:
                raise self.error("it holds a number of too many digits, or is nested too deeply") from error
            else:
                return value

    def _more(self, characters: int) -> bool:
        read = self._stream.read(characters)
        self._buffer += read
        return bool(read)

    def _drop(self) -> None:
        """Forget what was gone past."""
        if self._at >= READ_CHARACTERS:
            self._lines += self._buffer.count("\n", 0, self._at)
            self._buffer, self._at = self._buffer[self._at :], 0


def _end_of_space(text: str, start: int) -> int:
    found = _SPACE.match(text, start)
    return found.end() if found else start


# -- tables


def _table_lines(
    stream: io.TextIOWrapper, delimiter: str, longest: int, found: Converted
) -> Generator[str, None, None]:
    """One object a record: the header's names, and every field as text."""
    before = csv.field_size_limit(longest)
    reader = csv.reader(stream, delimiter=delimiter, strict=True)
    try:
        header: list[str] | None = None
        for record in reader:
            if not record:
                continue
            if header is None:
                header = _header(record, found)
            elif len(record) != len(header):
                raise ConversionError(
                    f"line {reader.line_num}: {len(record)} fields, where the header has {len(header)}",
                    "texts that hold the delimiter, quotes or line breaks need quotation marks around them",
                )
            else:
                row = {name: _cell(name, value, found) for name, value in zip(header, record, strict=True) if name}
                yield json.dumps(row, ensure_ascii=False)
    except csv.Error as error:
        words = str(error)
        reason = (
            "a field is longer than max_line_bytes" if "field larger" in words
            else "the file ends inside quotation marks" if "end of data" in words
            else "a zero byte" if "NUL" in words
            else "a quotation mark inside a field is not doubled"
        )  # fmt: skip
        raise ConversionError(
            f"line {reader.line_num}: {reason}", "write the file anew with a CSV library, in UTF-8"
        ) from error
    finally:
        csv.field_size_limit(before)


def _cell(name: str, value: str, found: Converted) -> object:
    """A field's text; a conversation as Python prints lists, which is how pandas and `datasets` write it, as a list."""
    if name not in CONVERSATION_KEYS or not _PYTHON_LIST.match(value):
        return value
    try:
        turns = ast.literal_eval(value)
        json.dumps(turns)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return value  # told by its row, which holds no conversation
    note = f"{json.dumps(name)} was read as Python prints lists"
    if note not in found.notes:
        found.notes.append(note)
    return turns


def _header(record: Sequence[str], found: Converted) -> list[str]:
    names = [name.strip() for name in record]
    if twice := sorted({name for name in names if name and names.count(name) > 1}):
        raise ConversionError(f"its header names {json.dumps(twice[0])} twice", "give each column a name of its own")
    if not any(names):
        raise ConversionError("its first line names no columns", "begin it with a header, as: prompt,completion")
    if unnamed := names.count(""):
        found.notes.append(f"{unnamed} {'column' if unnamed == 1 else 'columns'} without a name left out")
    return names


# -- Parquet


def _parquet_lines(source: Path) -> Generator[str, None, None]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ConversionError(
            "reading Parquet needs pyarrow, which is not installed", "`pip install 'dropforge[parquet]'`"
        ) from error
    with source.open("rb") as opened:
        sample = opened.read(SAMPLE_BYTES)
    kind = recognise(sample, whole=False)
    if not sample.startswith(b"PAR1"):
        hint = kind.hint if kind is not None else "rename it by what it is"
        raise ConversionError(f"{kind.reason if kind else 'it is text'}, not Parquet", hint)
    written = 0
    try:
        with parquet.ParquetFile(source) as file:
            for batch in file.iter_batches(batch_size=PARQUET_ROWS):
                for row in batch.to_pylist():
                    yield _json_of(row, written + 1)
                    written += 1
            if written != file.metadata.num_rows:
                raise ConversionError(
                    f"{written} rows were read, but its footer counts {file.metadata.num_rows}", "copy it again"
                )
    except (ArrowException, OSError) as error:
        raise ConversionError("it is not a sound Parquet file, or was cut short", "copy it again") from error


def _json_of(row: dict[str, Any], number: int) -> str:
    try:
        return json.dumps(finite(row), ensure_ascii=False, allow_nan=False, default=_plain)
    except TypeError as error:
        name = next((key for key, value in row.items() if not _is_plain(value)), "")
        raise ConversionError(
            f"row {number}: column {json.dumps(name)} holds {error}", "leave that column out, or write it as text"
        ) from error


def _plain(value: object) -> str:
    """JSON's form of a value that has one as text."""
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, Decimal | UUID):
        return str(value)
    raise TypeError("bytes, such as a picture" if isinstance(value, bytes) else f"a {type(value).__name__}")


def _is_plain(value: object) -> bool:
    try:
        json.dumps(value, default=_plain)
    except TypeError:
        return False
    return True
