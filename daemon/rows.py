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

from daemon.jsonline import LineFault, column_of, kind_of, parse_object
from daemon.source import BOM, TooLong, open_dataset

ROW_DIGEST_BYTES = 16

# Keys that some trainers take as finished tensors or as arguments of the chat template. A row that carries one would
# mean something else there than here, so it is refused rather than ignored.
STEERING_KEYS = frozenset(
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
ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES: Mapping[str, str] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}

Message = dict[str, Any]
Kind = Literal["messages", "prompt_completion", "text"]
JsonPath = tuple[str | int, ...]


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


class RowFault(Exception):
    """A row that is JSON, but not a row of this format: the value at `path` is wrong for `reason`."""

    def __init__(self, path: JsonPath, reason: str) -> None:
        super().__init__(reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        shown = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in self.path).lstrip(".")
        return f"{shown}: {self.reason}" if shown else self.reason


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
    """The row on `line`. Raises LineFault, with the column of the value that is wrong."""
    value = parse_object(line)
    try:
        return normalise(value, format_, columns)
    except RowFault as fault:
        raise LineFault(column_of(line, fault.path), str(fault)) from fault


def normalise(row: Mapping[str, Any], format_: Format, columns: ColumnNames) -> RowContent:
    """One parsed row as one of the three kinds. Raises RowFault."""
    for key in row:
        if key in STEERING_KEYS:
            raise RowFault((key,), "a key that steers a trainer; rows hold text and messages only")
    match format_:
        case Format.MESSAGES:
            messages = _messages(_required(row, "messages"), ("messages",))
            return RowContent(kind="messages", messages=messages, tools=_tools(row))
        case Format.SHAREGPT:
            return RowContent(kind="messages", messages=_conversation(row), tools=_tools(row))
        case Format.ALPACA:
            return RowContent(kind="messages", messages=_instruction(row))
        case Format.PROMPT_COMPLETION:
            return _prompt_completion(row, "prompt", "completion")
        case Format.TEXT:
            return RowContent(kind="text", text=_text(row, "text"))
        case Format.COLUMNS:
            if columns.text is not None:
                return RowContent(kind="text", text=_text(row, columns.text))
            return _prompt_completion(row, columns.prompt or "prompt", columns.completion or "completion")


def iter_rows(path: str | Path, format_: str, data: DataRules) -> Iterator[Row]:
    """The rows of a dataset that passed, in file order, one at a time; memory does not grow with the file.

    `format_` is the dataset's. Under on_bad_rows = "skip" exactly the rows are left out that the pass left out; else a
    bad row, which the pass would have refused, raises LineFault.
    """
    wanted = Format(format_)
    skip = data.on_bad_rows == "skip"
    with open_dataset(Path(path), max_expansion=data.max_expansion) as source:
        for number, line in source.lines(data.max_line_bytes):
            try:
                if isinstance(line, TooLong):
                    raise LineFault(1, str(line))
                if not line.strip():
                    continue  # at the end of the file; anywhere else the pass has counted it as bad
                content = check_row(line, wanted, data.columns)
            except LineFault as fault:
                if skip:
                    continue
                raise LineFault(fault.column, f"line {number}, column {fault.column}: {fault.reason}") from fault
            yield Row(line=number, content_digest=row_digest(line), **vars(content))


def row_digest(line: bytes) -> str:
    """Identity of a row: its bytes without the white space around them."""
    return blake3(line.removeprefix(BOM).strip()).hexdigest(length=ROW_DIGEST_BYTES)


def _required(row: Mapping[str, Any], key: str) -> Any:
    if key not in row:
        raise RowFault((), f"the key {key!r} is missing")
    return row[key]


def _text(row: Mapping[str, Any], key: str, path: JsonPath = ()) -> str:
    value = _required(row, key) if not path else row.get(key)
    if not isinstance(value, str):
        where = (*path, key) if key in row else path
        raise RowFault(where, f"expected a string, found {kind_of(value)}" if key in row else f"{key!r} is missing")
    return value


def _optional_text(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowFault((key,), f"expected a string, found {kind_of(value)}")
    return value


def _prompt_completion(row: Mapping[str, Any], prompt_key: str, completion_key: str) -> RowContent:
    prompt, completion = _required(row, prompt_key), _required(row, completion_key)
    if isinstance(prompt, list):
        if not isinstance(completion, list):
            raise RowFault((completion_key,), "expected a list of messages, as the prompt is one")
        return RowContent(
            kind="prompt_completion",
            prompt=_messages(prompt, (prompt_key,)),
            completion=_messages(completion, (completion_key,)),
            tools=_tools(row),
        )
    return RowContent(kind="prompt_completion", prompt=_text(row, prompt_key), completion=_text(row, completion_key))


def _instruction(row: Mapping[str, Any]) -> list[Message]:
    instruction, given = _text(row, "instruction"), _optional_text(row, "input")
    system, output = _optional_text(row, "system"), _text(row, "output")
    messages = [{"role": "system", "content": system}] if system else []
    question = f"{instruction}\n\n{given}" if given.strip() else instruction
    return [*messages, {"role": "user", "content": question}, {"role": "assistant", "content": output}]


def _conversation(row: Mapping[str, Any]) -> list[Message]:
    turns = _required(row, "conversations")
    _nonempty_list(turns, ("conversations",))
    system = _optional_text(row, "system")
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for index, turn in enumerate(turns):
        path: JsonPath = ("conversations", index)
        if not isinstance(turn, dict):
            raise RowFault(path, f"expected an object, found {kind_of(turn)}")
        speaker, value = _text(turn, "from", path), _text(turn, "value", path)
        role = SHAREGPT_ROLES.get(speaker)
        if role is None:
            raise RowFault((*path, "from"), f"unknown speaker {speaker!r}; known: {', '.join(SHAREGPT_ROLES)}")
        if speaker == "function_call":
            messages.append({"role": role, "content": None, "tool_calls": _called(value, (*path, "value"))})
        else:
            messages.append({"role": role, "content": value})
    return messages


def _called(value: str, path: JsonPath) -> list[dict[str, Any]]:
    """The calls that a ShareGPT function_call holds: one JSON object, or a list of them."""
    calls = _embedded(value, path)
    calls = calls if isinstance(calls, list) else [calls]
    if not calls:
        raise RowFault(path, "a function call without a call")
    return [_function_call(call, path, path) for call in calls]


def _messages(value: Any, path: JsonPath) -> list[Message]:
    _nonempty_list(value, path)
    return [_message(message, (*path, index)) for index, message in enumerate(value)]


def _message(message: Any, path: JsonPath) -> Message:
    if not isinstance(message, dict):
        raise RowFault(path, f"expected a message object, found {kind_of(message)}")
    role = _text(message, "role", path)
    if role not in ROLES:
        raise RowFault((*path, "role"), f"unknown role {role!r}; known: {', '.join(ROLES)}")
    calls = message.get("tool_calls")
    content = message.get("content")
    if calls is not None and role != "assistant":
        raise RowFault((*path, "tool_calls"), "only the assistant calls tools")
    if content is not None:
        content = _content(content, (*path, "content"))
    elif not (role == "assistant" and calls):
        raise RowFault((*path, "content") if "content" in message else path, "a message needs content")
    result: Message = {"role": role, "content": content}
    for key in ("name", "tool_call_id", "reasoning_content"):
        if message.get(key) is not None:
            result[key] = _text(message, key, path)
    if (weight := message.get("weight")) is not None:
        if role != "assistant":
            raise RowFault((*path, "weight"), "only the assistant's messages have a weight")
        if isinstance(weight, bool) or weight not in (0, 1):
            raise RowFault((*path, "weight"), "a weight is 0 or 1")
        result["weight"] = int(weight)
    if calls:
        result["tool_calls"] = _tool_calls(calls, (*path, "tool_calls"))
    return result


def _content(content: Any, path: JsonPath) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowFault(path, f"expected a string or a list of text parts, found {kind_of(content)}")
    parts = []
    for index, part in enumerate(content):
        if not isinstance(part, dict):
            raise RowFault((*path, index), f"expected a part object, found {kind_of(part)}")
        kind = _text(part, "type", (*path, index))
        if kind != "text":
            raise RowFault((*path, index, "type"), f"a part of type {kind!r}; only text can be trained")
        parts.append(_text(part, "text", (*path, index)))
    return "".join(parts)


def _tool_calls(calls: Any, path: JsonPath) -> list[dict[str, Any]]:
    _nonempty_list(calls, path)
    result = []
    for index, call in enumerate(calls):
        here = (*path, index)
        if not isinstance(call, dict):
            raise RowFault(here, f"expected a tool call object, found {kind_of(call)}")
        if call.get("type", "function") != "function":
            raise RowFault((*here, "type"), "only calls of functions are known")
        if "function" not in call:
            raise RowFault(here, "'function' is missing")
        made = _function_call(call["function"], (*here, "function"), (*here, "function", "arguments"))
        if call.get("id") is not None:
            made = {"id": _text(call, "id", here), **made}
        result.append(made)
    return result


def _function_call(function: Any, path: JsonPath, arguments_path: JsonPath) -> dict[str, Any]:
    if not isinstance(function, dict):
        raise RowFault(path, f"expected a function object, found {kind_of(function)}")
    if not isinstance(function.get("name"), str):
        raise RowFault(path, "a call needs the function's name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _embedded(arguments, arguments_path) if arguments.strip() else {}
    if not isinstance(arguments, dict):
        raise RowFault(arguments_path, f"arguments are an object, found {kind_of(arguments)}")
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _tools(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Function definitions in OpenAI's form; bare ones, and lists inside a string, are common in ShareGPT files."""
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = _embedded(tools, ("tools",)) if tools.strip() else None
    if tools is None:
        return None
    if not isinstance(tools, list):
        raise RowFault(("tools",), f"expected a list of tools, found {kind_of(tools)}")
    result = []
    for index, tool in enumerate(tools):
        path: JsonPath = ("tools", index) if isinstance(row["tools"], list) else ("tools",)
        if not isinstance(tool, dict):
            raise RowFault(path, f"expected a tool object, found {kind_of(tool)}")
        wrapped = tool if "function" in tool else {"type": "function", "function": tool}
        function = wrapped["function"]
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowFault(path, "a tool needs its function's name")
        result.append(wrapped)
    return result or None


def _embedded(text: str, path: JsonPath) -> Any:
    """JSON inside a string, as strict as a line."""
    try:
        return parse_object(b'{"value":' + text.encode() + b"}")["value"]
    except LineFault as fault:
        raise RowFault(path, f"a string that should hold JSON: {fault.reason}") from fault


def _nonempty_list(value: Any, path: JsonPath) -> None:
    if not isinstance(value, list):
        raise RowFault(path, f"expected a list, found {kind_of(value)}")
    if not value:
        raise RowFault(path, "the list is empty")


def describe_keys(row: Mapping[str, Any]) -> str:
    """What a row of no known format has, and the way out when it is two columns of text."""
    shown = ", ".join(json.dumps(key) for key in list(row)[:8]) or "no keys"
    found = f"no known format has these keys: {shown}{', …' if len(row) > 8 else ''}"
    texts = [key for key, value in row.items() if isinstance(value, str)]
    if len(texts) == 2:
        prompt, completion = (json.dumps(key) for key in texts)
        found += f"; perhaps [data.columns] prompt = {prompt}, completion = {completion}"
    return found
