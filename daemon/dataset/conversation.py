"""Turns: every published way to write a conversation, its tools and its masks, as one normal form.

A value comes with its path in the row; what is wrong is raised with the path of the value that is wrong. The keys, and
what they mean, are in `daemon.dataset.keys`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from daemon.dataset.keys import (
    ASSISTANT_KEYS,
    CALL_ROLES,
    CONTENT_KEYS,
    MASK_KEYS,
    REASONING_KEYS,
    ROLE_KEYS,
    ROLES,
    ROW_MASK_KEYS,
    SYSTEM_KEYS,
    TOOLS_KEYS,
    USER_KEYS,
    Place,
    is_given,
    is_number,
    refuses,
)
from daemon.dataset.strict_json import LineError, kind_of, parse_object

Message = dict[str, Any]
Tools = list[dict[str, Any]]
JsonPath = tuple[str | int, ...]

_TEXT_PARTS = (None, "", "text", "input_text", "output_text")
_THOUGHT_PARTS = ("thinking", "reasoning", "reasoning_content")
_PART_TEXT_KEYS = ("text", "value", "content")
_CALL_KEYS = ("tool_calls", "function_call")
_MASKS, _SYSTEM, _TOOLS = frozenset(ROW_MASK_KEYS), frozenset(SYSTEM_KEYS), frozenset(TOOLS_KEYS)
_PLAIN_TURN = frozenset(("role", "content"))
_ALWAYS_READ = frozenset((*CONTENT_KEYS, *MASK_KEYS))
_READ_BY_ROLE: Mapping[str, frozenset[str]] = {
    "system": _ALWAYS_READ | {"name", *TOOLS_KEYS},
    "developer": _ALWAYS_READ | {"name", *TOOLS_KEYS},
    "user": _ALWAYS_READ | {"name"},
    "assistant": _ALWAYS_READ | {"name", *REASONING_KEYS, *_CALL_KEYS},
    "tool": _ALWAYS_READ | {"name", "tool_name", "tool_call_id"},
}
_READ_IN_PAIRS = frozenset((*USER_KEYS, *ASSISTANT_KEYS, *MASK_KEYS, "system"))
_KNOWN_ROLES = ", ".join(ROLES)
_USE_TOOL_CALLS = 'give calls as "tool_calls" of the assistant\'s turn, and results as turns of the role "tool"'


class RowError(Exception):
    """A row that is JSON, but not a row of this format: the value at `path` is wrong for `reason`."""

    def __init__(self, path: JsonPath, reason: str, hint: str = "") -> None:
        super().__init__(path, reason, hint)
        self.path = path
        self.reason = reason
        self.hint = hint

    def __str__(self) -> str:
        if len(self.path) == 1 and self.reason.startswith(f'"{self.path[0]}" '):
            return self.reason  # which names the place already
        shown = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in self.path).lstrip(".")
        return f"{shown}: {self.reason}" if shown else self.reason


@dataclass(kw_only=True)
class Conversation:
    """A row's turns while they are read."""

    messages: list[Message] = field(default_factory=list)
    calls_alone: set[int] = field(default_factory=set)  # messages that were turns of a role that only calls
    tools: Tools | None = None
    unused: dict[str, None] = field(default_factory=dict)  # keys that nobody reads, as `messages[].key`

    def read(self, turns: Any, path: JsonPath) -> None:
        """Add a list of turns. Raises RowError."""
        if not isinstance(turns, list):
            raise RowError(path, f"expected a list, found {kind_of(turns)}")
        if not turns:
            raise RowError(path, "the list is empty")
        for index, turn in enumerate(turns):
            self._turn(turn, (*path, index))

    def say(self, role: str, content: str) -> None:
        """Add a turn of text."""
        self.messages.append({"role": role, "content": content})

    def read_history(self, pairs: Any, path: JsonPath) -> None:
        """Add earlier turns, `[[user, assistant], ...]`; an empty side is no turn. Raises RowError."""
        if not isinstance(pairs, list):
            raise RowError(path, f"expected a list of [user, assistant] pairs, found {kind_of(pairs)}")
        for index, pair in enumerate(pairs):
            here = (*path, index)
            if not is_given(pair):
                continue
            if not isinstance(pair, list) or len(pair) != 2:
                raise RowError(here, "expected a pair of texts, [user, assistant]")
            for side, (role, text) in enumerate(zip(("user", "assistant"), pair, strict=True)):
                if not isinstance(text, str | None):
                    raise RowError((*here, side), f"expected a string, found {kind_of(text)}")
                if text:
                    self.say(role, text)

    def finish(self, row: Mapping[str, Any]) -> tuple[list[Message], Tools | None]:
        """The messages, with the row's own masks, system text and tools in their places. Raises RowError."""
        if not _MASKS.isdisjoint(row):
            self.apply_row_masks(row)
        messages = self._joined_calls() if self.calls_alone else self.messages
        if not _SYSTEM.isdisjoint(row) and (stated := read_system(row)) is not None:
            messages = _with_system(messages, *stated)
        return messages, one_of((read_tools(row), self.tools), "tools")

    def _joined_calls(self) -> list[Message]:
        """The messages, calls in turns one after the other made calls of one turn."""
        messages: list[Message] = []
        for index, message in enumerate(self.messages):
            follows = index in self.calls_alone and index - 1 in self.calls_alone
            if follows and messages[-1].get("weight") == message.get("weight"):
                messages[-1]["tool_calls"].extend(message["tool_calls"])
            else:
                messages.append(message)
        return messages

    def _turn(self, turn: Any, path: JsonPath) -> None:
        if not isinstance(turn, dict):
            raise RowError(path, f"expected a message object, found {kind_of(turn)}")
        if (
            turn.keys() == _PLAIN_TURN
            and type(turn["role"]) is type(turn["content"]) is str
            and turn["role"] in _READ_BY_ROLE
        ):
            self.say(turn["role"], turn["content"])  # the usual case, in a fifth of the time
            return
        _refuse_keys(turn, path)
        role_key = next((key for key in ROLE_KEYS if is_given(turn.get(key))), None)
        if role_key is None:
            self._pair(turn, path)
            return
        name, role = _role(turn, role_key, path)
        self._note_unused(turn, _READ_BY_ROLE[role] | {role_key}, path)
        message = self._message(turn, role, name in CALL_ROLES, path)
        if name in CALL_ROLES and not message["content"] and "reasoning_content" not in message:
            self.calls_alone.add(len(self.messages))
        self.messages.append(message)

    def _message(self, turn: Mapping[str, Any], role: str, only_calls: bool, path: JsonPath) -> Message:
        content_key = _single_key(turn, CONTENT_KEYS, path) or _present(turn, CONTENT_KEYS)
        value = turn[content_key] if content_key is not None else None
        where = (*path, content_key) if content_key is not None else path
        calls = self._calls(turn, role, path)
        thought = ""
        if only_calls and not calls:
            if value is None:
                raise RowError(where, "a function call without a call")
            text, calls = None, self._called(value, where)
        elif role == "tool" and not isinstance(value, str):
            text = self._result(value, where)
        else:
            text, thought = self._content(value, where)
        message: Message = {"role": role, "content": text}
        if role == "assistant" and (reasoning := self._reasoning(turn, thought, path)):
            message["reasoning_content"] = reasoning
        if role in ("system", "developer"):
            self.tools = one_of((self.tools, read_tools(turn, path)), "tools")
        for key, normal in (("tool_name", "name"), ("name", "name"), ("tool_call_id", "tool_call_id")):
            if is_given(turn.get(key)) and key in _READ_BY_ROLE[role]:
                message[normal] = text_of(turn, key, path)
        if (weight := _turn_weight(turn, role, path)) is not None:
            message["weight"] = weight
        if calls:
            message["tool_calls"] = calls
        elif text is None:
            defines_tools = role in ("system", "developer") and any(is_given(turn.get(key)) for key in TOOLS_KEYS)
            if "reasoning_content" not in message and not defines_tools:
                raise RowError(where, "a message needs content")
            message["content"] = ""  # something else is said
        return message

    def _pair(self, turn: Mapping[str, Any], path: JsonPath) -> None:
        """A question and its answer in one object, as ms-swift's ShareGPT rows have them."""
        asked, answered = _single_key(turn, USER_KEYS, path), _single_key(turn, ASSISTANT_KEYS, path)
        if (asked is None and answered is None) or _present(turn, CONTENT_KEYS) is not None:
            empty = _present(turn, ROLE_KEYS)
            if empty is None:
                raise RowError(path, "'role' is missing")
            raise RowError((*path, empty), f"expected a string, found {kind_of(turn[empty])}")
        self._note_unused(turn, _READ_IN_PAIRS, path)
        system = "system" if is_given(turn.get("system")) else None
        for key, role in ((system, "system"), (asked, "user"), (answered, "assistant")):
            if key is not None:
                self.say(role, text_of(turn, key, path))
        if answered is not None and (weight := _turn_weight(turn, "assistant", path)) is not None:
            self.messages[-1]["weight"] = weight

    def _content(self, content: Any, path: JsonPath) -> tuple[str | None, str]:
        """Text, None when there is none, and the reasoning that stands among the parts."""
        if content is None or isinstance(content, str):
            return content, ""
        if not isinstance(content, list):
            raise RowError(path, f"expected a string or a list of text parts, found {kind_of(content)}")
        texts: list[str] = []
        thoughts: list[str] = []
        for index, part in enumerate(content):
            here = (*path, index)
            if isinstance(part, str):
                texts.append(part)
            elif not isinstance(part, dict):
                raise RowError(here, f"expected a part object, found {kind_of(part)}")
            elif (kind := part.get("type")) in _TEXT_PARTS:
                texts.append(self._part_text(part, _PART_TEXT_KEYS, here))
            elif kind in _THOUGHT_PARTS:
                if any(texts):
                    raise RowError(here, "reasoning behind the content; it must come before it")
                thoughts.append(self._part_text(part, (*_THOUGHT_PARTS, *_PART_TEXT_KEYS), here))
            else:
                hint = _USE_TOOL_CALLS if str(kind).startswith("tool") else "leave the row out, or keep its text only"
                raise RowError((*here, "type"), f"a part of type {kind!r}; only text can be trained", hint)
        return ("".join(texts) if content else None), "".join(thoughts)

    def _part_text(self, part: Mapping[str, Any], keys: Sequence[str], path: JsonPath) -> str:
        _refuse_keys(part, path)
        key = _single_key(part, keys, path)
        self._note_unused(part, frozenset((*keys, "type")), path)
        if key is not None:
            return text_of(part, key, path)
        if any(key in part for key in keys):
            return ""  # null, as `datasets` fills it
        raise RowError(path, f"{keys[-3]!r} is missing")

    def _result(self, value: Any, path: JsonPath) -> str:
        """What a tool returned, as text; values that are not text are written as JSON."""
        if value is None:
            return ""
        if isinstance(value, list) and all(isinstance(part, str) or _is_part(part) for part in value):
            return self._content(value, path)[0] or ""
        return json.dumps(value, ensure_ascii=False)

    def _reasoning(self, turn: Mapping[str, Any], thought: str, path: JsonPath) -> str:
        key = _single_key(turn, REASONING_KEYS, path)
        if key is None:
            return thought
        value, _ = self._content(turn[key], (*path, key))
        if thought and value != thought:
            raise RowError((*path, key), "it contradicts the reasoning among the content's parts")
        return value or ""

    def _calls(self, turn: Mapping[str, Any], role: str, path: JsonPath) -> Tools:
        given = [key for key in _CALL_KEYS if is_given(turn.get(key))]
        if not given:
            return []
        if role != "assistant":
            raise RowError((*path, given[0]), "only the assistant calls tools")
        if len(given) == 2:
            raise RowError((*path, "function_call"), "calls are given twice, here and as tool_calls")
        return self._called(turn[given[0]], (*path, given[0]))

    def _called(self, value: Any, path: JsonPath) -> Tools:
        """Calls as chat templates expect them, from a call, a list of calls, or either as JSON inside a string."""
        calls = embedded(value, path) if isinstance(value, str) else value
        in_text = isinstance(value, str)
        if not isinstance(calls, list):
            return [self._call(calls, path, in_text)]
        found = []
        for index, call in enumerate(calls):
            here = path if in_text else (*path, index)
            if isinstance(call, str):
                found.append(self._call(embedded(call, here), here, True))
            elif is_given(call):
                found.append(self._call(call, here, in_text))
        if not found:
            raise RowError(path, "a function call without a call")
        return found

    def _call(self, call: Any, path: JsonPath, in_text: bool) -> dict[str, Any]:
        """`in_text`: the call was JSON inside a string, where values have no columns and nulls are the writer's own."""

        def at(*steps: str) -> JsonPath:
            return path if in_text else (*path, *steps)

        if not isinstance(call, dict):
            raise RowError(path, f"expected a tool call object, found {kind_of(call)}")
        if call.get("type") not in (None, "", "function", "function_call"):
            raise RowError(at("type"), "only calls of functions are known")
        nested = is_given(call.get("function"))
        function = call["function"] if nested else call
        base = ("function",) if nested else ()
        if not isinstance(function, dict):
            raise RowError(at(*base), f"expected a function object, found {kind_of(function)}")
        name = function.get("name")
        if not isinstance(name, str) or not name:
            raise RowError(at(*base), "a call needs the function's name")
        key = _single_key(function, ("arguments", "parameters"), at(*base), same=False)
        arguments: Any = function[key] if key is not None else {}
        where = at(*base, key) if key is not None else at(*base)
        if isinstance(arguments, str):
            arguments = embedded(arguments, where) if arguments.strip() else {}
        elif not in_text:
            arguments = without_nulls(arguments)  # `datasets` gives every call the arguments of all others
        if not isinstance(arguments, dict):
            raise RowError(where, f"arguments are an object, found {kind_of(arguments)}")
        if not in_text:
            self._note_unused(call, frozenset(("id", "type", "function", "name", "arguments", "parameters")), path)
            if nested:
                self._note_unused(function, frozenset(("name", "arguments", "parameters")), at(*base))
        made: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
        return {"id": text_of(call, "id", path), **made} if is_given(call.get("id")) else made

    def apply_row_masks(self, row: Mapping[str, Any]) -> None:
        """A row's own masks: a list with a value for each turn or each answer, or one value for all answers."""
        for key in ROW_MASK_KEYS:
            if not is_given(row.get(key)):
                continue
            value, path = row[key], (key,)
            answers = [message for message in self.messages if message["role"] == "assistant"]
            if isinstance(value, list):
                if len(value) not in (len(self.messages), len(answers)):
                    raise RowError(
                        path,
                        f"{len(value)} values for {len(self.messages)} turns, {len(answers)} of them the assistant's",
                        'give one 0 or 1 for each turn, or a "weight" in each of the assistant\'s turns',
                    )
                masked = self.messages if len(value) == len(self.messages) else answers
                for index, (message, one) in enumerate(zip(masked, value, strict=True)):
                    _set_weight(message, one, (key, index))
            elif is_binary(value):
                if not value:
                    for message in answers:
                        _set_weight(message, value, path)
            elif _names_muted_speaker(value):
                continue
            elif isinstance(value, str) and key == "mask" and _role_named(value) == "assistant":
                raise RowError(path, "it mutes the assistant, and only the assistant's turns can be learned")
            elif is_mask(key, value):
                raise _not_binary(path)
            else:
                self.unused[key] = None

    def _note_unused(self, value: Mapping[str, Any], used: frozenset[str], path: JsonPath) -> None:
        if value.keys() <= used:
            return
        for key in value.keys() - used:
            if is_given(value[key]):
                shown = "".join("[]" if isinstance(step, int) else f".{step}" for step in (*path, key))
                self.unused[shown.lstrip(".")] = None


def read_system(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """The key and the text of a row's own system text; None when there is none. Raises RowError."""
    key = _single_key(row, SYSTEM_KEYS, ())
    if key is None:
        return None
    text, _ = Conversation()._content(row[key], (key,))
    return (key, text) if text and text.strip() else None


def _with_system(messages: list[Message], key: str, text: str) -> list[Message]:
    """The messages behind the row's own system text, unless it stands among them. Raises RowError."""
    stated = [message for message in messages if message["role"] in ("system", "developer")]
    if any(message["content"].strip() == text.strip() for message in stated):
        return messages
    if any(message["role"] == "system" for message in stated):
        hint = f"say it once: in the conversation or as {json.dumps(key)}"
        raise RowError((key,), "it contradicts the system's turn in the conversation", hint)
    return [{"role": "system", "content": text}, *messages]


def read_tools(row: Mapping[str, Any], path: JsonPath = ()) -> Tools | None:
    """Function definitions in OpenAI's form; bare ones, and lists inside a string, are common. Raises RowError."""
    if _TOOLS.isdisjoint(row):
        return None
    return one_of((_tools(row[key], (*path, key)) for key in TOOLS_KEYS if is_given(row.get(key))), "tools")


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
        if "function" not in tool:  # bare, or flat as in OpenAI's newer interface
            tool = {"type": "function", "function": {key: tool[key] for key in tool if key != "type"}}
        function = tool["function"]
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(here, "a tool needs its function's name")
        found.append(tool if "type" in tool else {"type": "function", **tool})
    return found or None


def one_of(found: Iterable[Tools | None], what: str) -> Tools | None:
    """The one value that is given, once or several times. Raises RowError when two differ."""
    given = [value for value in found if value]
    if any(value != given[0] for value in given):
        raise RowError((), f"{what} are given twice, and differ", f"give the row's {what} once")
    return given[0] if given else None


def without_nulls(value: Any) -> Any:
    """The value without the keys that are null, at every depth; lists keep theirs."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


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
    return "" if value is None else text_of(row, key)


def embedded(text: str, path: JsonPath) -> Any:
    """JSON inside a string, as strict as a line. Raises RowError."""
    try:
        return parse_object(b'{"value":' + text.encode() + b"}")["value"]
    except LineError as error:
        raise RowError(path, f"a string that should hold JSON: {error.reason}") from error


def is_binary(value: Any) -> bool:
    """Whether a mask's value is one: 0, 1, false or true."""
    return isinstance(value, bool) or (is_number(value) and value in (0, 1))


def is_mask(key: str, value: Any) -> bool:
    """Whether a row's own value means a mask; a number called loss, or a word called train, is the writer's note."""
    return isinstance(value, list) or is_binary(value) or (is_number(value) and key != "loss")


def _names_muted_speaker(value: Any) -> bool:
    """Whether it is NeMo's `"mask": "User"`, the speaker who is not learned."""
    return isinstance(value, str) and _role_named(value) in ("user", "system")


def _role_named(name: str) -> str | None:
    return ROLES.get(name.strip().casefold())


def _role(turn: Mapping[str, Any], role_key: str, path: JsonPath) -> tuple[str, str]:
    """The speaker's name in small letters, and the role that it stands for. Raises RowError."""
    said = turn[role_key]
    if not isinstance(said, str):
        raise RowError((*path, role_key), f"expected a string, found {kind_of(said)}")
    role = _role_named(said)
    if role is None:
        raise RowError((*path, role_key), f"unknown role {said!r}; known: {_KNOWN_ROLES}")
    for key in ROLE_KEYS:
        other = turn.get(key)
        if key != role_key and isinstance(other, str) and _role_named(other) not in (None, role):
            raise RowError((*path, key), f"{role_key} and {key} contradict each other")
    return said.strip().casefold(), role


def _refuse_keys(value: Mapping[str, Any], path: JsonPath) -> None:
    for key, inner in value.items():
        if (group := refuses(key, inner, Place.TURN, answers=True)) is not None:
            raise RowError((*path, key), group.reason(key), group.advice)


def _not_binary(path: JsonPath) -> RowError:
    return RowError(
        path,
        "a weight is 0 or 1, or false or true; part of a turn's loss is not supported",
        "give the turns to learn a weight of 1 and the others 0, or remove the key",
    )


def _turn_weight(turn: Mapping[str, Any], role: str, path: JsonPath) -> int | None:
    """1 or 0 where a turn says whether it is learned. Raises RowError."""
    weights: dict[str, int] = {}
    for key in MASK_KEYS:
        value = turn.get(key)
        if not is_given(value):
            continue
        if not is_binary(value):
            raise _not_binary((*path, key))
        weights[key] = 1 if value else 0
        if weights[key] and role != "assistant":
            raise _only_answers((*path, key))
    if len(set(weights.values())) > 1:
        raise RowError((*path, list(weights)[-1]), f"{' and '.join(weights)} contradict each other")
    return next(iter(weights.values())) if weights and role == "assistant" else None


def _set_weight(message: Message, value: Any, path: JsonPath) -> None:
    if value is None:
        return
    if not is_binary(value):
        raise _not_binary(path)
    if message["role"] == "assistant":
        weight = int(value)
        if message.setdefault("weight", weight) != weight:
            raise RowError(path, "it contradicts what the turn itself says")
    elif value:
        raise _only_answers(path)


def _only_answers(path: JsonPath) -> RowError:
    return RowError(
        path,
        "only the assistant's turns can be learned",
        'set it to 0 or remove it, or write the row as it is to be learned, as one "text"',
    )


def _single_key(value: Mapping[str, Any], keys: Sequence[str], path: JsonPath, *, same: bool = True) -> str | None:
    """The key among `keys` that has a value; None when none has. Raises RowError when two have different ones."""
    found: str | None = None
    for key in keys:
        if key not in value or not is_given(value[key]):
            continue
        if found is None:
            found = key
        elif not same or value[key] != value[found]:
            raise RowError((*path, key), f"{found} and {key} contradict each other")
    return found


def _present(value: Mapping[str, Any], keys: Sequence[str]) -> str | None:
    """The first of `keys` that is there, with a value or without."""
    return next((key for key in keys if key in value), None)


def _is_part(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("type"), str) and value["type"] in _TEXT_PARTS
