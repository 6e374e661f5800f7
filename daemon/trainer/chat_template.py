"""A tokenizer's chat template as a function from messages to text, and what renderings tell of the template itself."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import date
from functools import cached_property, lru_cache
from types import MethodType
from typing import Any

from jinja2 import TemplateError as JinjaTemplateError
from jinja2 import meta
from transformers.utils.chat_template_utils import _compile_jinja_template

from daemon.job import FailureKind
from daemon.trainer.errors import RunFailure
from daemon.trainer.message_forms import (
    QUESTION,
    Forms,
    Message,
    adapt,
    answered,
    bare_tool,
    called,
    fill_tool,
    find_forms,
    user,
)

Span = tuple[int, int]  # characters, end exclusive
Switches = Mapping[str, Any]  # what a caller of apply_chat_template may pass besides messages and tools

_TODAY = re.compile(r"""strftime_now\(\s*(['"])((?:(?!\1).)*)\1\s*\)""")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_THINKING_SWITCHES = ("enable_thinking", "thinking")  # by which published templates turn reasoning on and off
DEFAULT: Switches = {}
_DICT_ATTRIBUTES = frozenset(dir(dict))


class TemplateError(Exception):
    """The template refuses or cannot render a conversation; the message is a sentence about why."""


class ChatTemplate:
    """A tokenizer's chat template. Raises RunFailure(CONFIG) when the tokenizer has none.

    `day` is the date that templates write where they would write today's; None: today's.
    """

    def __init__(self, tokenizer: Any, day: date | None = None) -> None:
        if not tokenizer.chat_template:
            raise RunFailure(
                FailureKind.CONFIG,
                "these rows are conversations, and the tokenizer of the base model has no chat template",
                hint="choose an instruction-tuned base model, or drop prompt/completion or text rows",
            )
        self._tokenizer = tokenizer
        self._day = day
        self._by_source: dict[str, OneTemplate] = {}

    def for_tools(self, tools: Any) -> OneTemplate:
        """The template that renders conversations with these tools; some tokenizers have one for those with any."""
        source: str = self._tokenizer.get_chat_template(None, tools)
        if source not in self._by_source:
            dated = source if self._day is None else on_day(source, self._day)
            self._by_source[source] = OneTemplate(dated, self._tokenizer)
        return self._by_source[source]


class OneTemplate:
    """One template's source, compiled, and what is known of it."""

    def __init__(self, source: str, tokenizer: Any) -> None:
        self.source = source
        self.eos: str = tokenizer.eos_token or ""
        self.special = special_strings(tokenizer)
        self._names: dict[str, str] = dict(tokenizer.special_tokens_map)
        self._compiled = _compile_jinja_template(source)
        # A chain of mappings as it comes, which each rendering would go through key by key.
        self._compiled.globals = dict(self._compiled.globals)
        quicken(self._compiled.environment)

    def text(
        self,
        messages: Sequence[Message],
        tools: Any,
        *,
        generation_prompt: bool = False,
        switches: Switches = DEFAULT,
    ) -> str:
        """What apply_chat_template makes of the messages, as a string. Raises TemplateError."""
        try:
            return str(self._compiled.render(self._arguments(messages, tools, generation_prompt, switches)))
        except TimeoutError:  # of a time limit that expires meanwhile
            raise
        except Exception as error:  # it is a program, and may raise anything
            raise _said(error) from error

    def finished(
        self, messages: Sequence[Message], tools: Any, *, switches: Switches = DEFAULT
    ) -> tuple[str, list[Span]]:
        """The same without a generation prompt, and what the template's own generation markers enclose."""
        if not self.marks_turns:
            return self.text(messages, tools, switches=switches), []
        blocks: list[str] = []
        spans: list[Span] = []
        try:
            with self._compiled.environment.activate_tracker(blocks, spans):
                for block in self._compiled.generate(self._arguments(messages, tools, False, switches)):
                    blocks.append(block)  # the tracker reads them meanwhile
        except TimeoutError:
            raise
        except Exception as error:
            raise _said(error) from error
        return "".join(blocks), spans

    def adapted(self, messages: Sequence[Message]) -> list[Message]:
        """The messages in the forms that this template takes."""
        return [adapt(message, self.forms) for message in messages]

    def adapted_tools(self, tools: Any) -> Any:
        """The definitions of functions, filled up where this template cannot do without what they lack."""
        return [fill_tool(tool) for tool in tools] if tools and self._fills_tools else tools

    @cached_property
    def _fills_tools(self) -> bool:
        question, tool = self.adapted([user(QUESTION)]), bare_tool()
        return self._tried(question, [tool]) is None and self._tried(question, [fill_tool(tool)]) is not None

    @cached_property
    def forms(self) -> Forms:
        """The forms that it takes."""
        return find_forms(self._tried)

    @cached_property
    def marks_turns(self) -> bool:
        """Whether it has generation markers."""
        return _GENERATION.search(self.source) is not None

    @cached_property
    def closer(self) -> str:
        """What it puts behind every finished conversation, whoever spoke last: EOS with some, nothing with most."""
        question = self.adapted([user(QUESTION)])
        finished = self._tried(question)
        if not self.eos or finished is None or not finished.endswith(self.eos):
            return ""
        asking = self._tried(question, generation_prompt=True)
        return self.eos if asking is not None and not asking.startswith(finished) else ""

    @cached_property
    def modes(self) -> tuple[Switches, ...]:
        """The ways to ask for an answer, its own default first: with reasoning and without, where it has a switch."""
        free = meta.find_undeclared_variables(self._compiled.environment.parse(self.source))
        named = [name for name in _THINKING_SWITCHES if name in free]
        return DEFAULT, *({name: value} for name in named for value in (True, False))

    @cached_property
    def after_answer(self) -> str:
        """The special token that it writes right behind an answer, before a user's turn; "": none."""
        return self._token_behind(answered())

    @cached_property
    def after_call(self) -> str:
        """The same behind a call, before its result."""
        return self._token_behind(called())

    def _arguments(
        self, messages: Sequence[Message], tools: Any, generation_prompt: bool, switches: Switches
    ) -> dict[str, Any]:
        return {
            **self._names,
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": generation_prompt,
            **switches,
        }

    def _token_behind(self, messages: list[Message]) -> str:
        messages = self.adapted(messages)
        shorter, longer = self._tried(messages[:-1]), self._tried(messages)
        if shorter is None or longer is None or not longer.startswith(shorter):
            return ""
        return next((token for token in self.special if longer.startswith(token, len(shorter))), "")

    def _tried(self, messages: list[Message], tools: Any = None, *, generation_prompt: bool = False) -> str | None:
        try:
            return self.text(messages, tools, generation_prompt=generation_prompt)
        except TemplateError:
            return None


def quicken(environment: Any) -> None:
    """Let a sandbox of templates look up attributes in less time, to the same end.

    Half of a rendering's time went into that. For `message.role` the sandbox asks for an attribute before it asks for a
    key; which attributes a dictionary has is known beforehand. And what it allows depends on an object's type and an
    attribute's name alone, so it judges each pair once.
    """
    kind = type(environment)
    get_attribute, is_safe = MethodType(kind.getattr, environment), MethodType(kind.is_safe_attribute, environment)
    allowed: dict[tuple[type, str], bool] = {}

    def attribute_of(obj: Any, name: str) -> Any:
        if type(obj) is not dict or name in _DICT_ATTRIBUTES:
            return get_attribute(obj, name)
        return obj[name] if name in obj else environment.undefined(obj=obj, name=name)

    def is_allowed(obj: Any, name: str, value: Any) -> bool:
        asked = (type(obj), name)
        if asked not in allowed:
            allowed[asked] = is_safe(obj, name, value)
        return allowed[asked]

    environment.getattr, environment.is_safe_attribute = attribute_of, is_allowed


def special_strings(tokenizer: Any) -> tuple[str, ...]:
    """A tokenizer's special tokens as text, longest first; those without a role of their own included."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return tuple(sorted(filter(None, added | set(map(str, tokenizer.all_special_tokens))), key=len, reverse=True))


@lru_cache
def on_day(template: str, day: date) -> str:
    """The template with `day` written where it would write today's date.

    Llama 3's and others tell the model which day it is. A run that goes on after midnight has to see the tokens that it
    began with.
    """
    return _TODAY.sub(lambda found: json.dumps(day.strftime(found.group(2))), template)


def _said(error: Exception) -> TemplateError:
    """Whatever a template raised as TemplateError."""
    if type(error) is JinjaTemplateError:  # its author's own words, by raise_exception
        return TemplateError(f"the chat template refuses the conversation: {error}")
    return TemplateError(f"the chat template fails on the conversation: {error}")
