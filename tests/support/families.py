"""Conversations of every shape, for chat templates of every family."""

from __future__ import annotations

import copy
import re
from typing import Any

Message = dict[str, Any]
Shape = tuple[list[Message], list[dict[str, Any]] | None]  # messages, tools

# What published templates write as tokens of their own; a tokenizer of that family knows them as special.
_SPECIAL = re.compile(
    r"<[|｜][^|｜<>'\"\s]*[|｜]>|<\|[a-z_]+>|<[a-z_]+\|>|<(?:start|end)_of_turn>|<end_of_utterance>|</s>|\[gMASK\]|<sop>"
)
_EOS = ("<|im_end|>", "<|eot_id|>", "<|eot|>", "<|return|>", "<｜end▁of▁sentence｜>", "<end_of_turn>", "</s>")


def family_tokenizer(tokenizer: Any, template: str) -> Any:
    """A copy of a tokenizer with this template and its special tokens."""
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    names = sorted(set(_SPECIAL.findall(template)))
    other.add_special_tokens({"extra_special_tokens": names})
    other.add_special_tokens(
        {"bos_token": "<bos>", "eos_token": next((name for name in _EOS if name in names), "<eos>")}
    )
    return other


def user(content: str) -> Message:
    """A user's message."""
    return {"role": "user", "content": content}


def assistant(content: str | None, **others: Any) -> Message:
    """An assistant's message."""
    return {"role": "assistant", "content": content, **others}


def call(name: str, number: int, **arguments: Any) -> dict[str, Any]:
    """A call as a row holds it; results name it by its id."""
    return {"id": f"call0000{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


def result(content: str, number: int, name: str) -> Message:
    """A call's result."""
    return {"role": "tool", "content": content, "tool_call_id": f"call0000{number}", "name": name}


def tool(name: str) -> dict[str, Any]:
    """A function's definition."""
    town = {"type": "string", "description": "Name of a town"}
    schema = {"type": "object", "properties": {"town": town}, "required": ["town"]}
    return {"type": "function", "function": {"name": name, "description": f"Ask about {name}", "parameters": schema}}


_SYSTEM: Message = {"role": "system", "content": "Speak in rhymes."}
_ASK, _TELL = user("Which fruit?"), assistant("An apple.")
_MORE, _AGAIN = user("Which colour?"), assistant("Green or red.")
_THINK, _THINK_MORE = {"reasoning_content": "Fruit grows on trees."}, {"reasoning_content": "Apples have skins."}
_SUN = call("weather", 1, town="Ulm")
_RAIN = call("forecast", 2, town="Bonn")
_SUNNY, _RAINY = result("sunny, 21 degrees", 1, "weather"), result("rain later", 2, "forecast")
_DONE = assistant("Take a hat.")
_TOOLS = [tool("weather"), tool("forecast")]

SHAPES: dict[str, Shape] = {
    "one turn": ([_ASK, _TELL], None),
    "three turns": ([_ASK, _TELL, _MORE, _AGAIN, user("Why?"), assistant("Because of the skin.")], None),
    "system": ([_SYSTEM, _ASK, _TELL, _MORE, _AGAIN], None),
    "developer": ([{"role": "developer", "content": "Speak in rhymes."}, _ASK, _TELL], None),
    "begins with the assistant": ([assistant("Good morning!"), _ASK, _TELL], None),
    "system, then the assistant": ([_SYSTEM, assistant("Good morning!"), _ASK, _TELL], None),
    "ends with the user": ([_ASK, _TELL, _MORE], None),
    "two users in a row": ([_ASK, _MORE, _AGAIN], None),
    "two assistants in a row": ([_ASK, _TELL, _AGAIN], None),
    "first turn muted": ([_ASK, {**_TELL, "weight": 0}, _MORE, _AGAIN], None),
    "last turn muted": ([_ASK, _TELL, _MORE, {**_AGAIN, "weight": 0}], None),
    "call and result": ([_ASK, assistant("", tool_calls=[_SUN]), _SUNNY, _DONE], _TOOLS),
    "null content": ([_ASK, assistant(None, tool_calls=[_SUN]), _SUNNY, _DONE], _TOOLS),
    "text and call": ([_ASK, assistant("Let me look.", tool_calls=[_SUN]), _SUNNY, _DONE], _TOOLS),
    "parallel calls": ([_ASK, assistant(None, tool_calls=[_SUN, _RAIN]), _SUNNY, _RAINY, _DONE], _TOOLS),
    "reasoning": ([_ASK, {**_TELL, **_THINK}], None),
    "reasoning in two turns": ([_ASK, {**_TELL, **_THINK}, _MORE, {**_AGAIN, **_THINK_MORE}], None),
    "reasoning in one of two": ([_ASK, {**_TELL, **_THINK}, _MORE, _AGAIN], None),
    "reasoning and call": (
        [_ASK, assistant(None, tool_calls=[_SUN], **_THINK), _SUNNY, {**_DONE, **_THINK_MORE}],
        _TOOLS,
    ),
    "reasoning in the text": (
        [_ASK, assistant("<think>\nFruit grows on trees.\n</think>\n\nAn apple."), _MORE, _AGAIN],
        None,
    ),
}
