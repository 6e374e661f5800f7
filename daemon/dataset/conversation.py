"""Turns: every published way to write a conversation, its tools and its masks, as one normal form.

A value comes with its path in the row; what is wrong is raised with the path of the value that is wrong. The keys, and
what they mean, are in `daemon.dataset.keys`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from daemon.dataset.keys import (
    ASSISTANT_KEYS,
    CALL_KEYS,
    CALL_ROLES,
    CONTENT_KEYS,
    MASK_KEYS,
    REASONING_DETAILS_KEYS,
    REASONING_KEYS,
    ROLE_KEYS,
    ROLES,
    ROW_MASK_KEYS,
    SYSTEM_KEYS,
    TOOLS_KEYS,
    USER_KEYS,
    is_given,
    role_named,
    speaker_name,
)
from daemon.dataset.masks import apply_row_masks, is_binary, turn_weight, weight_of
from daemon.dataset.media import placeholder_apart
from daemon.dataset.strict_json import kind_of
from daemon.dataset.tools import Tools, calls_of, one_of, read_calls, read_tools
from daemon.dataset.values import (
    JsonPath,
    RowError,
    UnusedKeys,
    embedded,
    first_present,
    refuse_keys,
    single_key,
    text_of,
)

Message = dict[str, Any]

_TEXT_PARTS = (None, "", "text", "input_text", "output_text")
_THOUGHT_PARTS = ("thinking", "reasoning", "reasoning_content", "reasoning.text", "reasoning.summary")
_THOUGHT_KEYS = ("thinking", "reasoning", "reasoning_content", "summary")
_PART_TEXT_KEYS = ("text", "value", "content")
_MASKS, _SYSTEM, _TOOLS = frozenset(ROW_MASK_KEYS), frozenset(SYSTEM_KEYS), frozenset(TOOLS_KEYS)
_PLAIN_TURN = frozenset(("role", "content"))
_ALWAYS_READ = frozenset((*CONTENT_KEYS, *MASK_KEYS))
_READ_BY_ROLE: Mapping[str, frozenset[str]] = {
    "system": _ALWAYS_READ | {"name", *TOOLS_KEYS},
    "developer": _ALWAYS_READ | {"name", *TOOLS_KEYS},
    "user": _ALWAYS_READ | {"name"},
    "assistant": _ALWAYS_READ | {"name", *REASONING_KEYS, *REASONING_DETAILS_KEYS, *CALL_KEYS},
    "tool": _ALWAYS_READ | {"name", "tool_name", "tool_call_id"},
}
_READ_IN_PAIRS = frozenset((*USER_KEYS, *ASSISTANT_KEYS, *MASK_KEYS, "system"))
_KNOWN_ROLES = ", ".join(dict.fromkeys(ROLES.values()))
_CALL, _RESULT = "tool_use", "tool_result"
_READ_OF_RESULT = frozenset(("type", "tool_use_id", "content"))
_SPLIT_THE_TURN = 'split the turn, or set "weight" to 0 or 1 for all of it'
_USE_PAIRS = 'give earlier turns as "history": [["question", "answer"], ...]'
_USE_TOOL_CALLS = 'give calls as "tool_calls" of the assistant\'s turn, and results as turns of the role "tool"'


_THINK = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
_TAGGED = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


@dataclass(kw_only=True)
class Conversation:
    """A row's turns while they are read."""

    messages: list[Message] = field(default_factory=list)
    calls_alone: set[int] = field(default_factory=set)  # messages that were turns of a role that only calls
    tools: Tools | None = None
    unused: UnusedKeys = field(default_factory=UnusedKeys)

    def read(self, turns: Any, path: JsonPath) -> None:
        """Add a list of turns. Raises RowError."""
        if not isinstance(turns, list):
            raise RowError(path, f"expected a list, found {kind_of(turns)}")
        if all(turn is None for turn in turns):
            raise RowError(path, "the list is empty")
        for index, turn in enumerate(turns):
            if turn is not None:  # lists of equal length are filled up so
                self._turn(turn, (*path, index))

    def say(self, role: str, content: str, path: JsonPath = ()) -> None:
        """Add a turn of text. Raises RowError."""
        if role == "user":
            refuse_placeholder(content, path)
        self.messages.append({"role": role, "content": content})

    def read_history(self, pairs: Any, path: JsonPath) -> None:
        """Add earlier turns, `[[user, assistant], ...]` or turns as a conversation has them. Raises RowError.

        An empty side is no turn.
        """
        if isinstance(pairs, str) and pairs.lstrip().startswith("["):  # as tables have them
            pairs = embedded(pairs, path)
        if not isinstance(pairs, list):
            raise RowError(path, f"expected a list of [user, assistant] pairs, found {kind_of(pairs)}", _USE_PAIRS)
        if any(map(is_given, pairs)) and all(isinstance(pair, dict | None) for pair in pairs):
            self.read(pairs, path)
            return
        for index, pair in enumerate(pairs):
            here = (*path, index)
            if not is_given(pair):
                continue
            if not isinstance(pair, list) or len(pair) != 2:
                raise RowError(here, "expected a pair of texts, [user, assistant]", _USE_PAIRS)
            for side, (role, text) in enumerate(zip(("user", "assistant"), pair, strict=True)):
                if not isinstance(text, str | None):
                    raise RowError((*here, side), f"expected a string, found {kind_of(text)}")
                if text:
                    self.say(role, text, (*here, side))

    def finish(self, row: Mapping[str, Any]) -> tuple[list[Message], Tools | None]:
        """The messages, with the row's own masks, system text and tools in their places. Raises RowError."""
        if not _MASKS.isdisjoint(row):
            apply_row_masks(row, self.messages, self.unused)
        messages = self._joined_calls() if self.calls_alone else self.messages
        if not _SYSTEM.isdisjoint(row) and (stated := read_system(row, self.unused)) is not None:
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
            hint = 'write each turn as {"role": ..., "content": ...}, in one list'
            raise RowError(path, f"expected a message object, found {kind_of(turn)}", hint)
        if (
            turn.keys() == _PLAIN_TURN
            and type(turn["role"]) is type(turn["content"]) is str
            and turn["role"] in _READ_BY_ROLE
        ):
            self.say(turn["role"], turn["content"], (*path, "content"))  # the usual case, in a fifth of the time
            return
        role_key = next((key for key in ROLE_KEYS if is_given(turn.get(key))), None)
        speaker = turn[role_key] if role_key is not None else None
        refuse_keys(turn, path, is_answer=not isinstance(speaker, str) or role_named(speaker) in (None, "assistant"))
        if role_key is None:
            self._pair(turn, path)
            return
        name, role = _role(turn, role_key, path)
        if isinstance(turn.get("content"), list) and any(map(_is_block, turn["content"])):
            self._blocks(turn, role, path)
            return
        self.unused.note(turn, _READ_BY_ROLE[role] | {role_key}, path)
        message = self._message(turn, role, name in CALL_ROLES, path)
        if name in CALL_ROLES and not message["content"] and "reasoning_content" not in message:
            self.calls_alone.add(len(self.messages))
        self.messages.append(message)

    def _blocks(self, turn: Mapping[str, Any], role: str, path: JsonPath) -> None:
        """A turn whose content holds calls or results, as Anthropic has them: calls of the turn, results as turns."""
        plain: list[Any] = []  # parts that are neither
        calls = []
        for index, part in enumerate(turn["content"]):
            kind = part["type"] if _is_block(part) else None
            if kind == _RESULT and role in ("user", "tool"):
                if plain:
                    self._turn({**turn, "content": plain}, path)
                    plain = []
                self.unused.note(part, _READ_OF_RESULT, (*path, "content", index))
                self.messages.append(
                    {
                        "role": "tool",
                        "content": self._result(part.get("content"), (*path, "content", index, "content")),
                        **({"tool_call_id": text_of(part, "tool_use_id", path)} if "tool_use_id" in part else {}),
                    }
                )
            elif kind == _CALL and role == "assistant":
                calls.append({key: value for key, value in part.items() if key != "type"})
            elif kind is not None:
                raise RowError(
                    (*path, "content", index), f"a part of type {kind!r} in a turn of the {role}", _USE_TOOL_CALLS
                )
            else:
                plain.append(part)
        if calls and any(is_given(turn.get(key)) for key in CALL_KEYS):
            raise RowError(path, "calls are given twice, in the content and beside it")
        if calls:
            self._turn({**turn, "content": plain or None, "tool_calls": calls}, path)
        elif plain:
            self._turn({**turn, "content": plain}, path)

    def _message(self, turn: Mapping[str, Any], role: str, only_calls: bool, path: JsonPath) -> Message:
        content_key = single_key(turn, CONTENT_KEYS, path) or first_present(turn, CONTENT_KEYS)
        value = turn[content_key] if content_key is not None else None
        where = (*path, content_key) if content_key is not None else path
        calls = read_calls(turn, role, path, self.unused)
        thought = ""
        if only_calls and not calls:
            if value is None:
                raise RowError(where, "a function call without a call")
            text, calls = None, calls_of(_without_tags(value), where, self.unused)
        elif role == "tool":
            text = self._result(value, where)
        else:
            text, thought = read_content(value, where, self.unused)
        if role == "user" and text:
            refuse_placeholder(text, where)
        message: Message = {"role": role, "content": text}
        if role == "assistant" and (reasoning := self._reasoning(turn, thought, path)):
            message["reasoning_content"] = reasoning
            if text is not None:
                message["content"] = text = _without_reasoning(text, reasoning, where)
        if role in ("system", "developer"):
            self.tools = one_of((self.tools, read_tools(turn, path)), "tools")
        for key, normal in (("tool_name", "name"), ("name", "name"), ("tool_call_id", "tool_call_id")):
            if is_given(turn.get(key)) and key in _READ_BY_ROLE[role]:
                message[normal] = text_of(turn, key, path)
        if (weight := turn_weight(turn, role, path)) is not None:
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
        asked, answered = single_key(turn, USER_KEYS, path), single_key(turn, ASSISTANT_KEYS, path)
        if (asked is None and answered is None) or first_present(turn, CONTENT_KEYS) is not None:
            empty = first_present(turn, ROLE_KEYS)
            if empty is None:
                raise RowError(path, "'role' is missing", f"say who speaks: {_KNOWN_ROLES}")
            found = "it is empty" if turn[empty] == "" else f"expected a string, found {kind_of(turn[empty])}"
            raise RowError((*path, empty), found, f"say who speaks: {_KNOWN_ROLES}")
        self.unused.note(turn, _READ_IN_PAIRS, path)
        system = "system" if is_given(turn.get("system")) else None
        for key, role in ((system, "system"), (asked, "user"), (answered, "assistant")):
            if key is not None:
                self.say(role, text_of(turn, key, path), (*path, key))
        if answered is not None and (weight := turn_weight(turn, "assistant", path)) is not None:
            self.messages[-1]["weight"] = weight

    def _result(self, value: Any, path: JsonPath) -> str:
        """What a tool returned, as text; values that are not text are written as JSON."""
        if value is None or isinstance(value, str):
            return value or ""
        if isinstance(value, list) and (all(map(_is_text, value)) or any(map(_is_no_text, value))):
            return read_content(value, path, self.unused)[0] or ""
        return json.dumps(value, ensure_ascii=False)

    def _reasoning(self, turn: Mapping[str, Any], thought: str, path: JsonPath) -> str:
        """The turn's reasoning; the details that some services repeat it in count where nothing else says it."""
        key = single_key(turn, REASONING_KEYS, path)
        if key is None and not thought:
            key = next((name for name in REASONING_DETAILS_KEYS if is_given(turn.get(name))), None)
        if key is None:
            return thought
        value, parts = read_content(turn[key], (*path, key), self.unused)
        said = value or parts
        if thought and said != thought:
            raise RowError((*path, key), "it contradicts the reasoning among the content's parts")
        return said


def refuse_placeholder(text: str, path: JsonPath) -> None:
    """Raise RowError for what is asked about a picture, video or sound that is not there."""
    if (found := placeholder_apart(text)) is not None:
        raise RowError(
            path,
            f"{found} in the place of a picture, video or sound that the row does not hold; only text can be trained",
            "leave such rows out, or take the placeholder out where the text stands on its own",
        )


def read_content(content: Any, path: JsonPath, unused: UnusedKeys) -> tuple[str | None, str]:
    """Text, None when there is none, and the reasoning that stands among the parts. Raises RowError."""
    if content is None or isinstance(content, str):
        return content, ""
    if isinstance(content, dict) and "type" in content:
        content = [content]  # one part alone
    if not isinstance(content, list):
        raise RowError(path, f"expected a string or a list of text parts, found {kind_of(content)}")
    texts: list[str] = []
    thoughts: list[str] = []
    for index, part in enumerate(content):
        here = (*path, index)
        if part is None or isinstance(part, str):
            texts.append(part or "")
        elif not isinstance(part, dict):
            raise RowError(here, f"expected a part object, found {kind_of(part)}")
        elif (kind := part.get("type")) in _TEXT_PARTS and part.get("thought") is not True:
            texts.append(_part_text(part, _PART_TEXT_KEYS, here, unused))
        elif kind in _THOUGHT_PARTS or part.get("thought") is True:  # as Gemini marks them
            if any(texts):
                raise RowError(here, "reasoning behind the content; it must come before it")
            thoughts.append(_part_text(part, (*_THOUGHT_KEYS, *_PART_TEXT_KEYS), here, unused))
        else:
            hint = _USE_TOOL_CALLS if str(kind).startswith("tool") else "leave the row out, or keep its text only"
            raise RowError((*here, "type"), f"a part of type {kind!r}; only text can be trained", hint)
    return ("".join(texts) if texts or not thoughts else None), "".join(thoughts)


def _part_text(part: Mapping[str, Any], keys: Sequence[str], path: JsonPath, unused: UnusedKeys) -> str:
    refuse_keys(part, path)
    key = single_key(part, keys, path)
    for mask in MASK_KEYS:
        if is_given(part.get(mask)) and not (is_binary(part[mask]) and weight_of(part[mask])):
            raise RowError((*path, mask), "only whole turns can be chosen to be learned", _SPLIT_THE_TURN)
    unused.note(part, frozenset((*keys, *MASK_KEYS, "type", "thought")), path)
    if key is not None:
        return text_of(part, key, path)
    if any(key in part for key in keys):
        return ""  # null, as `datasets` fills it
    if any("function" in name.casefold() for name in part):
        raise RowError(path, "a part that is a call or a result", _USE_TOOL_CALLS)
    raise RowError(path, f"{keys[-3]!r} is missing")


def read_system(row: Mapping[str, Any], unused: UnusedKeys) -> tuple[str, str] | None:
    """The key and the text of a row's own system text; None when there is none. Raises RowError."""
    key = single_key(row, SYSTEM_KEYS, ())
    if key is None:
        return None
    value = row[key]
    path: JsonPath = (key,)
    if isinstance(value, dict) and (inner := single_key(value, CONTENT_KEYS, path)) is not None:
        value, path = value[inner], (key, inner)  # a turn of its own, as Gemini has it
    text, _ = read_content(value, path, unused)
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


def _role(turn: Mapping[str, Any], role_key: str, path: JsonPath) -> tuple[str, str]:
    """The speaker's name in small letters, and the role that it stands for. Raises RowError."""
    said = turn[role_key]
    if not isinstance(said, str):
        raise RowError((*path, role_key), f"expected a string, found {kind_of(said)}")
    role = role_named(said)
    if role is None:
        raise RowError((*path, role_key), f"unknown role {said!r}", f"name the speakers {_KNOWN_ROLES}")
    for key in ROLE_KEYS:
        other = turn.get(key)
        if key != role_key and isinstance(other, str) and role_named(other) not in (None, role):
            raise RowError((*path, key), f"{role_key} and {key} contradict each other")
    return speaker_name(said), role


def _without_reasoning(text: str, reasoning: str, path: JsonPath) -> str:
    """The content without the same reasoning at its beginning, which would be learned twice. Raises RowError."""
    inline = _THINK.match(text)
    if inline is None:
        return text
    if inline.group(1).strip() not in ("", reasoning.strip()):
        raise RowError(path, "the reasoning in <think> contradicts the turn's own", "give the reasoning once")
    return text[inline.end() :]


def _without_tags(value: Any) -> Any:
    """Calls without the tags around each of them, as Hermes writes them."""
    if isinstance(value, str) and (calls := _TAGGED.findall(value)) and not _TAGGED.sub("", value).strip():
        return calls
    return value


def _is_block(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in (_CALL, _RESULT)


def _is_text(part: Any) -> bool:
    return isinstance(part, str) or (
        isinstance(part, dict) and part.get("type") in ("text", "input_text", "output_text")
    )


def _is_no_text(part: Any) -> bool:
    """A picture and the like, as parts of a content are written."""
    kind = part.get("type") if isinstance(part, dict) else None
    return isinstance(kind, str) and kind.removeprefix("input_").startswith(("image", "audio", "video", "file"))
