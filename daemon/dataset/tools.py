"""Definitions of tools and calls of them, in every published form, as OpenAI writes them today."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from daemon.dataset.keys import CALL_ARGUMENTS_KEYS, CALL_KEYS, CALL_NAME_KEYS, TOOLS_KEYS, is_given
from daemon.dataset.strict_json import kind_of
from daemon.dataset.values import JsonPath, RowError, UnusedKeys, embedded, single_key, text_of, without_nulls

Tools = list[dict[str, Any]]

_TOOLS = frozenset(TOOLS_KEYS)
_TOOL_KEYS = {"input_schema": "parameters", "inputSchema": "parameters"}  # as Anthropic and MCP call them
_REMEMBERED, _REMEMBERED_BYTES = 64, 2**16  # definitions that are remembered, and the size of each

_encoder = msgspec.json.Encoder()


def read_tools(row: Mapping[str, Any], path: JsonPath = ()) -> Tools | None:
    """Function definitions in OpenAI's form; bare ones, and lists inside a string, are common. Raises RowError."""
    if _TOOLS.isdisjoint(row):
        return None
    return one_of((_known_tools(row[key], (*path, key)) for key in TOOLS_KEYS if is_given(row.get(key))), "tools")


def one_of(found: Iterable[Tools | None], what: str) -> Tools | None:
    """The one value that is given, once or several times. Raises RowError when two differ."""
    given = [value for value in found if value]
    if any(value != given[0] for value in given):
        raise RowError((), f"{what} are given twice, and differ", f"give the row's {what} once")
    return given[0] if given else None


def read_calls(turn: Mapping[str, Any], role: str, path: JsonPath, unused: UnusedKeys) -> Tools:
    """The calls of a turn, none when it has none. Raises RowError."""
    given = [key for key in CALL_KEYS if is_given(turn.get(key))]
    if not given:
        return []
    if role != "assistant":
        raise RowError((*path, given[0]), "only the assistant calls tools")
    if len(given) > 1:
        raise RowError((*path, given[1]), f"calls are given twice, here and as {given[0]}")
    return calls_of(turn[given[0]], (*path, given[0]), unused)


def calls_of(value: Any, path: JsonPath, unused: UnusedKeys) -> Tools:
    """Calls as chat templates expect them, from a call, a list of calls, or either as JSON inside a string."""
    calls = embedded(value, path) if isinstance(value, str) else value
    in_text = isinstance(value, str)
    if not isinstance(calls, list):
        return [_call(calls, path, in_text, unused)]
    found = []
    for index, call in enumerate(calls):
        here = path if in_text else (*path, index)
        if isinstance(call, str):
            found.append(_call(embedded(call, here), here, True, unused))
        elif is_given(call):
            found.append(_call(call, here, in_text, unused))
    if not found:
        raise RowError(path, "a function call without a call")
    return found


def _call(call: Any, path: JsonPath, in_text: bool, unused: UnusedKeys) -> dict[str, Any]:
    """`in_text`: the call was JSON inside a string, where values have no columns and nulls are the writer's own."""

    def at(*steps: str) -> JsonPath:
        return path if in_text else (*path, *steps)

    if not isinstance(call, dict):
        raise RowError(path, f"expected a tool call object, found {kind_of(call)}")
    if call.get("type") not in (None, "", "function", "function_call"):
        raise RowError(at("type"), "only calls of functions are known")
    nested = isinstance(call.get("function"), dict) and is_given(call["function"])
    function = call["function"] if nested else call
    base = ("function",) if nested else ()
    name_key = single_key(function, (*CALL_NAME_KEYS, *(() if nested else ("function",))), at(*base))
    name = function[name_key] if name_key is not None else None
    if not isinstance(name, str):
        raise RowError(at(*base), "a call needs the function's name")
    key = single_key(function, CALL_ARGUMENTS_KEYS, at(*base), same=False)
    arguments: Any = function[key] if key is not None else {}
    where = at(*base, key) if key is not None else at(*base)
    if isinstance(arguments, str):
        arguments = embedded(arguments, where) if arguments.strip() else {}
    elif not in_text:
        arguments = without_nulls(arguments)  # `datasets` gives every call the arguments of all others
    if not isinstance(arguments, dict):
        raise RowError(where, f"arguments are an object, found {kind_of(arguments)}")
    if not in_text:
        own = frozenset((*CALL_NAME_KEYS, *CALL_ARGUMENTS_KEYS))
        unused.note(call, frozenset(("id", "type", "function")) | (frozenset() if nested else own), path)
        if nested:
            unused.note(function, own, at(*base))
    made: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"id": text_of(call, "id", path), **made} if is_given(call.get("id")) else made


def _known_tools(value: Any, path: JsonPath) -> Tools | None:
    """What `_tools` says of a value. All rows of a file have mostly the same ones, and reading them costs more than the rest.

    They are told apart by their JSON: for Python, 1 and true are the same. What is returned belongs to many rows.
    """
    spelled = value if isinstance(value, str) else _encoder.encode(value)
    if len(spelled) > _REMEMBERED_BYTES:
        return _tools(value, path)
    if spelled not in _known:
        found = _tools(value, path)
        if len(_known) >= _REMEMBERED:
            _known.clear()
        _known[spelled] = found
    return _known[spelled]


_known: dict[str | bytes, Tools | None] = {}


def _tools(value: Any, path: JsonPath) -> Tools | None:
    tools, in_text = value, isinstance(value, str)
    if isinstance(tools, str):
        tools = embedded(tools, path) if tools.strip() else []
    if isinstance(tools, dict):
        tools = [tools]
    if not isinstance(tools, list):
        raise RowError(path, f"expected a list of tools, found {kind_of(tools)}")
    found = []
    for index, given in enumerate(tools):
        here = path if in_text else (*path, index)
        tool = embedded(given, here) if isinstance(given, str) and given.strip() else given
        if not is_given(tool):
            continue
        if not isinstance(tool, dict):
            raise RowError(here, f"expected a tool object, found {kind_of(tool)}")
        if tool is given and not in_text:
            tool = without_nulls(tool)
        if isinstance(declared := tool.get("functionDeclarations", tool.get("function_declarations")), list):
            found += _tools(declared, here) or []  # several at once, as Gemini has them
            continue
        if "function" not in tool:  # bare, or flat as in OpenAI's newer interface
            tool = {
                "type": "function",
                "function": {_TOOL_KEYS.get(key, key): tool[key] for key in tool if key != "type"},
            }
        function = tool["function"]
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(here, "a tool needs its function's name")
        found.append(tool if "type" in tool else {"type": "function", **tool})
    return found or None
