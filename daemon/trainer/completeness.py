"""What a rendering lacks of what a row holds.

A template may trim a text, write it as JSON or as a literal of another language, or space it anew. It may not leave it out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum
from typing import Any

from daemon.trainer.message_forms import Message, thought_apart


class Part(StrEnum):
    """What of a conversation a template can leave out, as a person calls it."""

    TOOLS = "tool definitions"
    SYSTEM = "system text"
    USER = "user text"
    RESULT = "tool results"
    ANSWER = "answers"
    REASONING = "reasoning"
    CALL = "tool calls"


_TEXT_OF = {
    "system": Part.SYSTEM,
    "developer": Part.SYSTEM,
    "user": Part.USER,
    "tool": Part.RESULT,
    "assistant": Part.ANSWER,
}
Held = Sequence[tuple[Part, Sequence[str]]]  # strings that must occur, by what they are


def lacks(rendering: str, held: Held) -> set[Part]:
    """What `rendering`, what a template made of a message that holds this, lacks of it."""
    return {part for part, strings in held for string in strings if not _holds(rendering, string)}


def context_lacks(rendering: str, messages: Iterable[Held], tools: Iterable[str]) -> set[Part]:
    """What `rendering`, what a template made of messages and tools that hold this, lacks of them.

    Conversations go forward, so a short text is not found again in a message before its own; a system's text may stand
    anywhere.
    """
    found = {Part.TOOLS for string in tools if not _holds(rendering, string)}
    at = 0
    for held in messages:
        begins = []
        for part, strings in held:
            start = 0 if part is Part.SYSTEM else at
            for string in strings:
                place = rendering.find(string, start)
                if place >= 0 and part is not Part.SYSTEM:
                    begins.append(place)
                elif place < 0 and not _holds(rendering, string, start):
                    found.add(part)
        at = min(begins) + 1 if begins else at
    return found


def held_by(message: Message) -> Held:
    """What of a message must occur."""
    message = thought_apart(message)
    found: list[tuple[Part, tuple[str, ...]]] = []
    if content := _text(message.get("content")).strip():
        found.append((_TEXT_OF[message["role"]], (content,)))
    if reasoning := (message.get("reasoning_content") or "").strip():
        found.append((Part.REASONING, (reasoning,)))
    if calls := message.get("tool_calls"):
        found.append((Part.CALL, tuple(string for call in calls for string in _call_strings(call["function"]))))
    return found


def held_by_tools(tools: Any) -> list[str]:
    """What of definitions of functions must occur."""
    return list(_tool_strings(tools))


def _text(content: Any) -> str:
    """A content as text, also where a template takes it in parts."""
    return "".join(part["text"] for part in content) if isinstance(content, list) else content or ""


def _call_strings(function: dict[str, Any]) -> Iterator[str]:
    yield function["name"]
    arguments = function["arguments"]
    yield from _leaves(json.loads(arguments) if isinstance(arguments, str) else arguments)


def _leaves(value: Any) -> Iterator[str]:
    """Keys and values, as JSON spells them (strings without quotes)."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str):
        if value.strip():
            yield value.strip()
    else:
        yield json.dumps(value)


def _tool_strings(tools: Any) -> Iterator[str]:
    for tool in tools or ():
        function = tool.get("function", tool)
        yield from _strings(function.get("name"), function.get("description"))
        yield from _parameter_strings(function.get("parameters"))


def _parameter_strings(schema: Any) -> Iterator[str]:
    """Names and descriptions of parameters, at any depth; what their types are, templates put in words of their own."""
    if not isinstance(schema, dict):
        return
    properties = schema.get("properties")
    for name, inner in properties.items() if isinstance(properties, dict) else ():
        yield name
        yield from _strings(inner.get("description") if isinstance(inner, dict) else None)
        yield from _parameter_strings(inner)
    yield from _parameter_strings(schema.get("items"))


def _strings(*values: Any) -> Iterable[str]:
    return (value.strip() for value in values if isinstance(value, str) and value.strip())


def _holds(rendering: str, string: str, start: int = 0) -> bool:
    """Whether a string stands in a rendering from `start` on, in one of the spellings that templates use."""
    if rendering.find(string, start) >= 0 or any(rendering.find(other, start) >= 0 for other in _spellings(string)):
        return True
    return _spaced(string) in _spaced(rendering[start:])


def _spellings(string: str) -> tuple[str, ...]:
    literals = {"true": ("True",), "false": ("False",), "null": ("None",)}
    if string in literals:
        return literals[string]
    return json.dumps(string, ensure_ascii=False)[1:-1], json.dumps(string)[1:-1], repr(string)[1:-1]


def _spaced(text: str) -> str:
    return " ".join(text.split())
