"""Rows of a dataset: which formats there are, what a row must hold, and the three kinds that training sees.

A file has one format. Whatever it is, a row becomes one of three kinds: chat `messages` as OpenAI writes them, a
`prompt` with its `completion` (text, or lists of messages), or plain `text`. The pass over a dropped file and the
trainer's reading go through `normalise`, so a row that is skipped by one is skipped by the other.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, Protocol

from blake3 import blake3

from daemon.dataset.conversation import (
    Message,
    RowError,
    optional_text,
    read_conversation,
    read_messages,
    read_tools,
    required,
    text_of,
)
from daemon.dataset.source import BOM, TooLong, open_dataset
from daemon.dataset.strict_json import LineError, column_of, parse_object

ROW_DIGEST_BYTES = 16

# Keys that some trainers take as finished tensors or as arguments of the chat template. A row that carries one would
# mean something else there than here, so it is refused rather than ignored.
RESERVED_KEYS = frozenset(
    {
        "input_ids",
        "labels",
        "attention_mask",
        "position_ids",
        "token_type_ids",
        "completion_mask",
        "assistant_masks",
        "loss_mask",
        "chat_template",
        "chat_template_kwargs",
    }
)
Kind = Literal["messages", "prompt_completion", "text"]


class Format(StrEnum):
    """What the rows of one file look like."""

    MESSAGES = "messages"  # {"messages": [{"role", "content"}], "tools"?}
    PROMPT_COMPLETION = "prompt_completion"  # {"prompt", "completion"}: both text, or both lists of messages
    TEXT = "text"  # {"text"}
    ALPACA = "alpaca"  # {"instruction", "input"?, "output", "system"?}
    SHAREGPT = "sharegpt"  # {"conversations": [{"from", "value"}], "tools"?, "system"?}
    COLUMNS = "columns"  # any flat columns, named by [data.columns]


FORMAT_KEYS: Mapping[Format, tuple[str, ...]] = {  # in order of detection
    Format.MESSAGES: ("messages",),
    Format.SHAREGPT: ("conversations",),
    Format.PROMPT_COMPLETION: ("prompt", "completion"),
    Format.ALPACA: ("instruction", "output"),
    Format.TEXT: ("text",),
}


class ColumnNames(Protocol):
    """`[data.columns]`."""

    @property
    def prompt(self) -> str | None: ...
    @property
    def completion(self) -> str | None: ...
    @property
    def text(self) -> str | None: ...


class DataRules(Protocol):
    """The part of `[data]` that decides which rows are good."""

    @property
    def columns(self) -> ColumnNames: ...
    @property
    def on_bad_rows(self) -> str: ...
    @property
    def max_bad_fraction(self) -> float: ...
    @property
    def max_line_bytes(self) -> int: ...
    @property
    def max_expansion(self) -> float: ...


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which column is which; see `ColumnNames`."""

    prompt: str | None = None
    completion: str | None = None
    text: str | None = None

    @property
    def named(self) -> tuple[str, ...]:
        """The columns that a row must have."""
        return tuple(name for name in (self.prompt, self.completion, self.text) if name is not None)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """`DataRules` as plain data, which a child process can be told without the settings' machinery."""

    columns: Columns = field(default_factory=Columns)
    on_bad_rows: str = "reject"
    max_bad_fraction: float = 0.01
    max_line_bytes: int = 16 * 2**20
    max_expansion: float = 100.0

    @classmethod
    def of(cls, data: DataRules) -> Rules:
        """The rules that settings or a recipe's `[data]` hold."""
        names = data.columns
        return cls(
            columns=Columns(prompt=names.prompt, completion=names.completion, text=names.text),
            on_bad_rows=data.on_bad_rows,
            max_bad_fraction=data.max_bad_fraction,
            max_line_bytes=data.max_line_bytes,
            max_expansion=data.max_expansion,
        )


@dataclass(frozen=True, kw_only=True)
class RowContent:
    """What a row holds, as one of the three kinds; the fields of the other kinds are None."""

    kind: Kind
    messages: list[Message] | None = None  # kind messages
    prompt: str | list[Message] | None = None  # kind prompt_completion; both text, or both messages
    completion: str | list[Message] | None = None
    text: str | None = None  # kind text
    tools: list[dict[str, Any]] | None = None  # function definitions, for messages and lists of messages


@dataclass(frozen=True, kw_only=True)
class Row(RowContent):
    """One row that can be trained.

    Messages hold `role`, `content` (text; None only beside `tool_calls`) and where given `name`, `weight`,
    `tool_call_id`, `reasoning_content` and `tool_calls`, whose `arguments` are objects, as chat templates expect them.
    """

    line: int  # 1-based
    content_digest: str  # of the row's bytes, in hex; the same wherever the row stands


def detect_format(row: Mapping[str, Any], columns: ColumnNames) -> Format | None:
    """The format that a file with this first row has; None when there is none.

    Configured columns come first: who names them means them.
    """
    named = [name for name in (columns.prompt, columns.completion, columns.text) if name is not None]
    if named and all(name in row for name in named):
        return Format.COLUMNS
    for format_, keys in FORMAT_KEYS.items():
        if all(key in row for key in keys):
            return format_
    return None


def check_row(line: bytes, format_: Format, columns: ColumnNames) -> RowContent:
    """The row on `line`. Raises LineError, with the column of the value that is wrong."""
    value = parse_object(line)
    try:
        return normalise(value, format_, columns)
    except RowError as error:
        raise LineError(column_of(line, error.path), str(error)) from error


def normalise(row: Mapping[str, Any], format_: Format, columns: ColumnNames) -> RowContent:
    """One parsed row as one of the three kinds. Raises RowError."""
    for key in row:
        if key in RESERVED_KEYS:
            raise RowError((key,), "a key that steers a trainer; rows hold text and messages only")
    match format_:
        case Format.MESSAGES:
            messages = read_messages(required(row, "messages"), ("messages",))
            return RowContent(kind="messages", messages=messages, tools=read_tools(row))
        case Format.SHAREGPT:
            return RowContent(kind="messages", messages=read_conversation(row), tools=read_tools(row))
        case Format.ALPACA:
            return RowContent(kind="messages", messages=_instruction(row))
        case Format.PROMPT_COMPLETION:
            return _prompt_completion(row, "prompt", "completion")
        case Format.TEXT:
            return RowContent(kind="text", text=text_of(row, "text"))
        case Format.COLUMNS:
            if columns.text is not None:
                return RowContent(kind="text", text=text_of(row, columns.text))
            return _prompt_completion(row, columns.prompt or "prompt", columns.completion or "completion")


Line = tuple[int, bytes | TooLong]  # its number, from 1, and what stands there


@dataclass(frozen=True)
class RowReader:
    """Reads a dataset that passed, line by line; lines can be read elsewhere than where they are made rows.

    Under on_bad_rows = "skip" exactly the rows are left out that the pass left out; else a bad row, which the pass would
    have refused, raises LineError.
    """

    path: Path
    format: Format
    data: DataRules

    def lines(self) -> Iterator[Line]:
        """In file order, one at a time; memory does not grow with the file. Raises SourceError, OSError."""
        with open_dataset(self.path, max_expansion=self.data.max_expansion) as source:
            yield from source.lines(self.data.max_line_bytes)

    def row(self, line: Line) -> Row | None:
        """The row on a line; None for one that is left out, and for the empty end of the file. Raises LineError."""
        number, text = line
        try:
            if isinstance(text, TooLong):
                raise LineError(1, str(text))
            if not text.strip():
                return None  # at the end of the file; anywhere else the pass has counted it as bad
            content = check_row(text, self.format, self.data.columns)
        except LineError as error:
            if self.data.on_bad_rows == "skip":
                return None
            raise LineError(error.column, f"line {number}, column {error.column}: {error.reason}") from error
        return Row(line=number, content_digest=row_digest(text), **vars(content))


def iter_rows(path: str | Path, format_: str, data: DataRules) -> Iterator[Row]:
    """The rows of a dataset that passed, in file order, one at a time. Raises as RowReader does."""
    reader = RowReader(Path(path), Format(format_), data)
    return (row for line in reader.lines() if (row := reader.row(line)) is not None)


def row_digest(line: bytes) -> str:
    """Identity of a row: its bytes without the white space around them."""
    return blake3(line.removeprefix(BOM).strip()).hexdigest(length=ROW_DIGEST_BYTES)


def _prompt_completion(row: Mapping[str, Any], prompt_key: str, completion_key: str) -> RowContent:
    prompt, completion = required(row, prompt_key), required(row, completion_key)
    if isinstance(prompt, list):
        if not isinstance(completion, list):
            raise RowError((completion_key,), "expected a list of messages, as the prompt is one")
        return RowContent(
            kind="prompt_completion",
            prompt=read_messages(prompt, (prompt_key,)),
            completion=read_messages(completion, (completion_key,)),
            tools=read_tools(row),
        )
    return RowContent(
        kind="prompt_completion", prompt=text_of(row, prompt_key), completion=text_of(row, completion_key)
    )


def _instruction(row: Mapping[str, Any]) -> list[Message]:
    instruction, given = text_of(row, "instruction"), optional_text(row, "input")
    system, output = optional_text(row, "system"), text_of(row, "output")
    messages = [{"role": "system", "content": system}] if system else []
    question = f"{instruction}\n\n{given}" if given.strip() else instruction
    return [*messages, {"role": "user", "content": question}, {"role": "assistant", "content": output}]


def describe_keys(row: Mapping[str, Any]) -> str:
    """What a row of no known format has, and the way out when it is two columns of text."""
    shown = ", ".join(json.dumps(key) for key in list(row)[:8]) or "no keys"
    found = f"no known format has these keys: {shown}{', …' if len(row) > 8 else ''}"
    texts = [key for key, value in row.items() if isinstance(value, str)]
    if len(texts) == 2:
        prompt, completion = (json.dumps(key) for key in texts)
        found += f"; perhaps [data.columns] prompt = {prompt}, completion = {completion}"
    return found
