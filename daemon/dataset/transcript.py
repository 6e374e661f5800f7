"""Conversations that are written as one text, with the speakers in capitals, as Glaive's function-calling data has them.

`USER: ...`, `ASSISTANT: ... <|endoftext|>`, `ASSISTANT: <functioncall> {...}`, `FUNCTION RESPONSE: ...`; the system text holds
the definitions of the functions, one object after the other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from daemon.dataset.conversation import Conversation
from daemon.dataset.tools import Tools, calls_of, read_tools
from daemon.dataset.values import JsonPath, RowError, embedded

_ROLES: Mapping[str, str] = {"SYSTEM": "system", "USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}
_SPEAKER = "|".join(_ROLES)
_BEGINS = re.compile(rf"\s*(?:{_SPEAKER}):")
_ANSWERS = re.compile(r"(?:\A|\n)[ \t]*ASSISTANT:")
_LINE = re.compile(rf"(?:\A\s*|\n[ \t]*)({_SPEAKER}):")
_PARAGRAPH = re.compile(
    rf"(?:\A\s*|\n[ \t]*\n\s*)({_SPEAKER}):"
)  # where a line that begins so may be the speaker's own
_END = "<|endoftext|>"
_CALL = "<functioncall>"
_ONE_CALL = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*(?:,\s*"arguments"\s*:\s*(.*?)\s*)?\}', re.DOTALL)
_HINT = 'leave the row out, or write it as "messages" with "tool_calls"'


def is_transcript(value: Any) -> bool:
    """Whether a value is a conversation in this form."""
    return isinstance(value, str) and _BEGINS.match(value) is not None and _ANSWERS.search(value) is not None


def read_transcript(text: str, path: JsonPath) -> Conversation:
    """The turns of a conversation in one text, and the tools that its system text defines. Raises RowError."""
    conversation = Conversation()
    for role, said in _turns(text):
        if role == "system":
            _system(said, path, conversation)
        elif role == "assistant" and _CALL in said:
            words, _, call = said.partition(_CALL)
            message = {"role": role, "content": words.strip() or None, "tool_calls": _calls(call.strip(), path)}
            conversation.messages.append(message)
        else:
            conversation.say(role, said, path)
    return conversation


def read_transcript_system(text: str, path: JsonPath) -> tuple[str, Tools | None]:
    """A system text that stands apart, and the tools that it defines. Raises RowError."""
    conversation = Conversation()
    _system(text.strip().removeprefix("SYSTEM:").strip(), path, conversation)
    said = conversation.messages[0]["content"] if conversation.messages else ""
    return said, conversation.tools


def _turns(text: str) -> Iterator[tuple[str, str]]:
    """Role and words of each turn."""
    lines, paragraphs = list(_LINE.finditer(text)), list(_PARAGRAPH.finditer(text))
    # Where the first answer stands behind an empty line, all turns do, and lines in them may begin as a turn does.
    marks = paragraphs if _first_answer(paragraphs) == _first_answer(lines) else lines
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    for mark, end in zip(marks, ends, strict=True):
        yield _ROLES[mark.group(1)], text[mark.end() : end].strip().removesuffix(_END).rstrip()


def _first_answer(marks: list[re.Match[str]]) -> int | None:
    return next((mark.end() for mark in marks if mark.group(1) == "ASSISTANT"), None)


def _system(text: str, path: JsonPath, conversation: Conversation) -> None:
    """Read the definitions behind the words; where no object stands, all of it is words."""
    begin = re.search(r"\{\s*\"", text)
    words = text[: begin.start()].strip() if begin else text
    if words:
        conversation.say("system", words)
    if begin:
        conversation.tools = read_tools({"tools": _objects(text[begin.start() :], path)}, path)


def _objects(text: str, path: JsonPath) -> list[Any]:
    """JSON objects one after the other, perhaps with commas between. Raises RowError."""
    found = []
    rest = text.strip()
    while rest:
        try:
            _, end = json.JSONDecoder().raw_decode(rest)
        except ValueError:
            raise RowError(path, "the functions in the system text are not JSON objects", _HINT) from None
        found.append(embedded(rest[:end], path))
        rest = rest[end:].lstrip(" \t\r\n,")
    return found


def _calls(text: str, path: JsonPath) -> Tools:
    """The call behind the marker; its arguments may be JSON in single quotes. Raises RowError."""
    one = _ONE_CALL.fullmatch(text)
    if one is None:
        raise RowError(path, f"what stands behind {_CALL} is not a call", _HINT)
    name, arguments = embedded(one.group(1), path), one.group(2) or "{}"
    if len(arguments) > 1 and arguments[0] == arguments[-1] == "'":
        arguments = arguments[1:-1].replace("\\'", "'")
    else:
        arguments = embedded(arguments, path)
    conversation = Conversation()
    return calls_of({"name": name, "arguments": arguments}, path, conversation.unused)
