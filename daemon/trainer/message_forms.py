"""The forms in which a chat template takes what messages hold.

Templates differ: a content as text or as a list of parts, a call's arguments as an object or as JSON text, a content beside
calls as absent, empty or null, a `developer` as such or as the system, a thought inside the content or apart from it. Which
a template takes is found by rendering made-up messages in each form, so it depends on the template alone, never on a row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

Message = dict[str, Any]
Render = Callable[[list[Message]], "str | None"]  # None: the template refuses the messages

# Made-up words. No template and no other string of the made-up messages holds them.
QUESTION, ANSWER = "qxquestion", "qxanswer"
_DEVELOPER, _THOUGHT, _NAME, _KEY, _VALUE, _ID = "qxdeveloper", "qxthought", "qxname", "qxkey", "qxvalue", "qx0000001"

_INLINE_THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
_SHOWN_THOUGHT = re.compile(rf"<think>\s*{_THOUGHT}\s*</think>")


@dataclass(frozen=True, kw_only=True)
class Forms:
    """What one template takes."""

    content: Literal["text", "parts"] = "text"
    arguments: Literal["object", "text"] = "object"  # of a call
    no_content: Literal["absent", "empty", "null"] = "absent"  # beside calls
    developer: Literal["developer", "system"] = "developer"
    thought: Literal["inside", "apart"] = "inside"  # what a content holds between <think> tags


def adapt(message: Message, forms: Forms) -> Message:
    """A message in these forms, with its reasoning under every name that templates read, and without its weight."""
    adapted = {key: value for key, value in message.items() if key != "weight" and value is not None}
    if forms.thought == "apart":
        adapted = thought_apart(adapted)
    if (reasoning := adapted.get("reasoning_content")) is not None:
        adapted |= {"thinking": reasoning, "reasoning": reasoning}
    if message["role"] == "developer":
        adapted["role"] = forms.developer
    if calls := message.get("tool_calls"):
        adapted["tool_calls"] = [_call(call, forms.arguments) for call in calls]
        if not adapted.get("content") and (forms.no_content != "empty" or forms.content == "text"):
            return _without_content(adapted, forms.no_content)
    if forms.content == "parts":
        adapted["content"] = [{"type": "text", "text": adapted.get("content", "")}]
    return adapted


def thought_apart(message: Message) -> Message:
    """An assistant's message whose content begins with a thought in tags, with it as `reasoning_content`."""
    content = message.get("content")
    if message["role"] != "assistant" or message.get("reasoning_content") or not isinstance(content, str):
        return message
    found = _INLINE_THOUGHT.fullmatch(content)
    if found is None:
        return message
    return {**message, "reasoning_content": found[1].strip("\n"), "content": found[2].lstrip("\n")}


def fill_tool(tool: dict[str, Any]) -> dict[str, Any]:
    """A function's definition with a description and parameters, empty where it has none."""
    empty = {"description": "", "parameters": {"type": "object", "properties": {}}}
    return {**tool, "function": {**empty, **tool["function"]}}


def bare_tool() -> dict[str, Any]:
    """A made-up function of which nothing but the name is known."""
    return {"type": "function", "function": {"name": _NAME}}


def find_forms(render: Render) -> Forms:
    """Of every form the first that loses nothing; else the first that is rendered at all."""
    forms = _best(
        (replace(Forms(), content=value) for value in ("text", "parts")), lambda one: _shows_content(render, one)
    )
    calls = [
        replace(forms, arguments=arguments, no_content=no_content)
        for arguments in ("object", "text")
        for no_content in ("absent", "empty", "null")  # apply_chat_template leaves out what is null
    ]
    forms = _best(calls, lambda one: _shows_call(render, one))
    developers = [replace(forms, developer=value) for value in ("developer", "system")]
    forms = _best(developers, lambda one: _shows_developer(render, one))
    thoughts = [replace(forms, thought=value) for value in ("inside", "apart")]
    return _best(thoughts, lambda one: _shows_thought(render, one))


def answered() -> list[Message]:
    """A made-up answer, and a question behind it."""
    return [user(QUESTION), _assistant(ANSWER), user(QUESTION)]


def called() -> list[Message]:
    """A made-up call, and its result."""
    return [user(QUESTION), _calling(), {"role": "tool", "content": ANSWER, "name": _NAME, "tool_call_id": _ID}]


def user(content: str) -> Message:
    """A user's message."""
    return {"role": "user", "content": content}


def _assistant(content: str | None, **others: Any) -> Message:
    return {"role": "assistant", "content": content, **others}


def _calling() -> Message:
    function = {"name": _NAME, "arguments": {_KEY: _VALUE}}
    return _assistant(None, tool_calls=[{"id": _ID, "type": "function", "function": function}])


def _best(candidates: Iterable[Forms], score: Callable[[Forms], int]) -> Forms:
    return max(candidates, key=score)  # the first of the best


def _shown(render: Render, forms: Forms, messages: Sequence[Message]) -> str | None:
    return render([adapt(message, forms) for message in messages])


def _shows_content(render: Render, forms: Forms) -> int:
    found = _shown(render, forms, [user(QUESTION), _assistant(ANSWER)])
    return found is not None and QUESTION in found and ANSWER in found


def _shows_call(render: Render, forms: Forms) -> int:
    """2 for all of a call, properly spelled; 1 for a rendering; 0 for none."""
    found = _shown(render, forms, [user(QUESTION), _calling()])
    if found is None:
        return 0
    # Nobody's format spells an object as Python does, or writes that there is no content.
    spoilt = f"{{'{_KEY}'" in found or re.search(r"None|null|Undefined", found.partition(QUESTION)[2])
    return 2 if not spoilt and all(word in found for word in (_NAME, _KEY, _VALUE)) else 1


def _shows_developer(render: Render, forms: Forms) -> int:
    found = _shown(render, forms, [{"role": "developer", "content": _DEVELOPER}, user(QUESTION), _assistant(ANSWER)])
    return found is not None and _DEVELOPER in found


def _shows_thought(render: Render, forms: Forms) -> int:
    """1 where a thought inside a content comes out in the template's own form of reasoning, and that is in such tags."""
    apart = _shown(render, forms, [user(QUESTION), _assistant(ANSWER, reasoning_content=_THOUGHT)])
    if apart is None or not _SHOWN_THOUGHT.search(apart):
        return 0
    inside = _assistant(f"<think>\n{_THOUGHT}\n</think>\n\n{ANSWER}")
    return _shown(render, forms, [user(QUESTION), inside]) == apart


def _call(call: dict[str, Any], arguments: str) -> dict[str, Any]:
    function = call["function"]
    if arguments == "text" and not isinstance(function["arguments"], str):
        function = {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}
    return {"type": "function", **call, "function": function}


def _without_content(message: Message, form: str) -> Message:
    others = {key: value for key, value in message.items() if key != "content"}
    return others if form == "absent" else {**others, "content": None if form == "null" else ""}
