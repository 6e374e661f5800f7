"""Conversations: what the values of a row must be for training to see messages, and what they become.

OpenAI's messages and tools, and ShareGPT's turns, which are translated. Everything here is told a value and its path in
the row; what is wrong is raised with the path of the value that is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from daemon.dataset.strict_json import LineError, kind_of, parse_object

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
JsonPath = tuple[str | int, ...]


class RowError(Exception):
    """A row that is JSON, but not a row of this format: the value at `path` is wrong for `reason`."""

    def __init__(self, path: JsonPath, reason: str) -> None:
        super().__init__(reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        shown = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in self.path).lstrip(".")
        return f"{shown}: {self.reason}" if shown else self.reason


def read_messages(value: Any, path: JsonPath) -> list[Message]:
    """OpenAI's messages, with text parts joined and calls as chat templates expect them. Raises RowError."""
    _nonempty_list(value, path)
    return [_message(message, (*path, index)) for index, message in enumerate(value)]


def read_conversation(row: Mapping[str, Any]) -> list[Message]:
    """ShareGPT's `conversations`, and its `system`, as messages. Raises RowError."""
    turns = required(row, "conversations")
    _nonempty_list(turns, ("conversations",))
    system = optional_text(row, "system")
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for index, turn in enumerate(turns):
        path: JsonPath = ("conversations", index)
        if not isinstance(turn, dict):
            raise RowError(path, f"expected an object, found {kind_of(turn)}")
        speaker, value = text_of(turn, "from", path), text_of(turn, "value", path)
        role = SHAREGPT_ROLES.get(speaker)
        if role is None:
            raise RowError((*path, "from"), f"unknown speaker {speaker!r}; known: {', '.join(SHAREGPT_ROLES)}")
        if speaker == "function_call":
            messages.append({"role": role, "content": None, "tool_calls": _called(value, (*path, "value"))})
        else:
            messages.append({"role": role, "content": value})
    return messages


def read_tools(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Function definitions in OpenAI's form; bare ones, and lists inside a string, are common in ShareGPT files."""
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = _embedded(tools, ("tools",)) if tools.strip() else None
    if tools is None:
        return None
    if not isinstance(tools, list):
        raise RowError(("tools",), f"expected a list of tools, found {kind_of(tools)}")
    result = []
    for index, tool in enumerate(tools):
        path: JsonPath = ("tools", index) if isinstance(row["tools"], list) else ("tools",)
        if not isinstance(tool, dict):
            raise RowError(path, f"expected a tool object, found {kind_of(tool)}")
        wrapped = tool if "function" in tool else {"type": "function", "function": tool}
        function = wrapped["function"]
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(path, "a tool needs its function's name")
        result.append(wrapped)
    return result or None


def required(row: Mapping[str, Any], key: str) -> Any:
    """A value that a row must have. Raises RowError."""
    if key not in row:
        raise RowError((), f"the key {key!r} is missing")
    return row[key]


def text_of(row: Mapping[str, Any], key: str, path: JsonPath = ()) -> str:
    """A string that the row, or the object at `path` in it, must have. Raises RowError."""
    value = required(row, key) if not path else row.get(key)
    if not isinstance(value, str):
        where = (*path, key) if key in row else path
        raise RowError(where, f"expected a string, found {kind_of(value)}" if key in row else f"{key!r} is missing")
    return value


def optional_text(row: Mapping[str, Any], key: str) -> str:
    """A string, empty when it is missing or null. Raises RowError."""
    value = row.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowError((key,), f"expected a string, found {kind_of(value)}")
    return value


def _message(message: Any, path: JsonPath) -> Message:
    if not isinstance(message, dict):
        raise RowError(path, f"expected a message object, found {kind_of(message)}")
    role = text_of(message, "role", path)
    if role not in ROLES:
        raise RowError((*path, "role"), f"unknown role {role!r}; known: {', '.join(ROLES)}")
    calls = message.get("tool_calls")
    content = message.get("content")
    if calls is not None and role != "assistant":
        raise RowError((*path, "tool_calls"), "only the assistant calls tools")
    if content is not None:
        content = _content(content, (*path, "content"))
    elif not (role == "assistant" and calls):
        raise RowError((*path, "content") if "content" in message else path, "a message needs content")
    result: Message = {"role": role, "content": content}
    for key in ("name", "tool_call_id", "reasoning_content"):
        if message.get(key) is not None:
            result[key] = text_of(message, key, path)
    if (weight := message.get("weight")) is not None:
        if role != "assistant":
            raise RowError((*path, "weight"), "only the assistant's messages have a weight")
        if isinstance(weight, bool) or weight not in (0, 1):
            raise RowError((*path, "weight"), "a weight is 0 or 1")
        result["weight"] = int(weight)
    if calls:
        result["tool_calls"] = _tool_calls(calls, (*path, "tool_calls"))
    return result


def _content(content: Any, path: JsonPath) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowError(path, f"expected a string or a list of text parts, found {kind_of(content)}")
    parts = []
    for index, part in enumerate(content):
        if not isinstance(part, dict):
            raise RowError((*path, index), f"expected a part object, found {kind_of(part)}")
        kind = text_of(part, "type", (*path, index))
        if kind != "text":
            raise RowError((*path, index, "type"), f"a part of type {kind!r}; only text can be trained")
        parts.append(text_of(part, "text", (*path, index)))
    return "".join(parts)


def _tool_calls(calls: Any, path: JsonPath) -> list[dict[str, Any]]:
    _nonempty_list(calls, path)
    result = []
    for index, call in enumerate(calls):
        here = (*path, index)
        if not isinstance(call, dict):
            raise RowError(here, f"expected a tool call object, found {kind_of(call)}")
        if call.get("type", "function") != "function":
            raise RowError((*here, "type"), "only calls of functions are known")
        if "function" not in call:
            raise RowError(here, "'function' is missing")
        made = _function_call(call["function"], (*here, "function"), (*here, "function", "arguments"))
        if call.get("id") is not None:
            made = {"id": text_of(call, "id", here), **made}
        result.append(made)
    return result


def _called(value: str, path: JsonPath) -> list[dict[str, Any]]:
    """The calls that a ShareGPT function_call holds: one JSON object, or a list of them."""
    calls = _embedded(value, path)
    calls = calls if isinstance(calls, list) else [calls]
    if not calls:
        raise RowError(path, "a function call without a call")
    return [_function_call(call, path, path) for call in calls]


def _function_call(function: Any, path: JsonPath, arguments_path: JsonPath) -> dict[str, Any]:
    if not isinstance(function, dict):
        raise RowError(path, f"expected a function object, found {kind_of(function)}")
    if not isinstance(function.get("name"), str):
        raise RowError(path, "a call needs the function's name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _embedded(arguments, arguments_path) if arguments.strip() else {}
    if not isinstance(arguments, dict):
        raise RowError(arguments_path, f"arguments are an object, found {kind_of(arguments)}")
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _embedded(text: str, path: JsonPath) -> Any:
    """JSON inside a string, as strict as a line."""
    try:
        return parse_object(b'{"value":' + text.encode() + b"}")["value"]
    except LineError as error:
        raise RowError(path, f"a string that should hold JSON: {error.reason}") from error


def _nonempty_list(value: Any, path: JsonPath) -> None:
    if not isinstance(value, list):
        raise RowError(path, f"expected a list, found {kind_of(value)}")
    if not value:
        raise RowError(path, "the list is empty")
