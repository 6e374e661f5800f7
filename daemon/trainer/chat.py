"""A conversation as the chat template renders it, and which of its characters the assistant wrote.

Two ways to know: the template's own `{% generation %}` markers, or the difference between renderings: what an assistant's
turn adds to the conversation before it. The difference is believed only when the pieces, put together, are the whole to
the character.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from itertools import pairwise, takewhile
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from daemon.job import FailureKind
from daemon.trainer.errors import RunFailure

Message = dict[str, Any]
Span = tuple[int, int]  # characters, end exclusive

_TODAY = re.compile(r"""strftime_now\(\s*(['"])((?:(?!\1).)*)\1\s*\)""")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Up to so many assistant's turns, comparing whole prefixes costs less than finding out how to avoid it.
FEW_TURNS = 3


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """A conversation as text, and the span of each assistant's turn in it, end-of-turn tokens included."""

    text: str
    turns: tuple[Span, ...]  # one for each assistant's message, in order


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
        self._eos = tokenizer.eos_token
        self._special = sorted((str(token) for token in tokenizer.all_special_tokens), key=len, reverse=True)

    def text(self, messages: Sequence[Message], tools: Any, *, generation_prompt: bool = False) -> str:
        """The rendering as a string. Raises RunFailure(BAD_DATA) when the template refuses the conversation."""
        if not messages:
            return ""
        return self._render(messages, tools, generation_prompt=generation_prompt)[0]

    def render(self, messages: Sequence[Message], tools: Any) -> Rendered:
        """The rendering with the assistant's turns. Raises RunFailure(CONFIG) when they cannot be told apart."""
        turns = assistant_turns(messages)
        if _marks_turns(self._source(tools)):
            text, spans = self._render(messages, tools, markers=True)
            if len(spans) == len(turns):
                return Rendered(text=text, turns=tuple(self._with_end(text, start, end) for start, end in spans))
        else:
            text = self.text(messages, tools)
        found = self._by_pieces(messages, turns, tools, text) if len(turns) > FEW_TURNS else None
        return Rendered(text=text, turns=found or self._by_prefixes(messages, turns, tools, text))

    def render_last(self, messages: Sequence[Message], tools: Any) -> Rendered:
        """The rendering up to the last assistant's turn, which alone has a span; needs no template whose prefixes nest.

        The turn starts where the rendering parts from that of the conversation before it, ready for an answer.
        """
        turns = assistant_turns(messages)
        messages = messages[: turns[-1] + 1]
        text = self.text(messages, tools)
        before = self.text(messages[:-1], tools, generation_prompt=True)
        start = common_prefix(before, text)
        return Rendered(text=text, turns=((start, len(text)),))

    def _by_prefixes(self, messages: Sequence[Message], turns: list[int], tools: Any, whole: str) -> tuple[Span, ...]:
        """Each turn's start is the length of what comes before it, ready for an answer; its end, with it."""
        spans = []
        for at in turns:
            start = self._prefix(messages[:at], tools, whole, generation_prompt=True)
            end = self._prefix(messages[: at + 1], tools, whole) if at + 1 < len(messages) else len(whole)
            spans.append((start, end))
        return tuple(spans)

    def _prefix(self, messages: Sequence[Message], tools: Any, whole: str, *, generation_prompt: bool = False) -> int:
        before = self.text(messages, tools, generation_prompt=generation_prompt)
        if self._eos and not whole.startswith(before):  # some templates, Phi-3's, close every conversation with EOS
            before = before.removesuffix(self._eos)
        if not whole.startswith(before):
            at = common_prefix(before, whole)
            raise RunFailure(
                FailureKind.CONFIG,
                "the chat template renders a conversation's beginning differently once it goes on"
                f" ({before[at : at + 30]!r} becomes {whole[at : at + 30]!r}), so nobody can tell which tokens are the"
                " assistant's",
                hint='set train_on = "last_turn" or "all" under [data], or use a template with generation markers',
            )
        return len(before)

    def _by_pieces(
        self, messages: Sequence[Message], turns: list[int], tools: Any, whole: str
    ) -> tuple[Span, ...] | None:
        """The same spans at a cost that grows with the turns, not with their square; None when pieces do not fit.

        Every exchange (what leads to an assistant's turn, and the turn) is rendered right after the first exchange
        alone. Most templates render it there as they do in its own place; that they did is known when first exchange,
        pieces and rest make up the whole.
        """
        first = messages[: turns[0] + 1]
        head = self.text(first, tools)
        if not whole.startswith(head):
            return None
        ready = self.text(first[:-1], tools, generation_prompt=True)
        if not head.startswith(ready):
            return None
        spans, position = [(len(ready), len(head))], len(head)
        for before, at in pairwise(turns):
            exchange = messages[before + 1 : at + 1]
            text = self.text([*first, *exchange], tools)
            ready = self.text([*first, *exchange[:-1]], tools, generation_prompt=True)
            piece = text[len(head) :]
            if not (text.startswith(head) and text.startswith(ready) and whole.startswith(piece, position)):
                return None
            spans.append((position + len(ready) - len(head), position + len(piece)))
            position += len(piece)
        rest = messages[turns[-1] + 1 :]
        tail = self.text([*first, *rest], tools)[len(head) :] if rest else ""
        return tuple(spans) if whole[position:] == tail else None

    def _with_end(self, text: str, start: int, end: int) -> Span:
        """A marked turn with the end-of-turn token that stands right behind it, which must be learned as well."""
        if text[start:end].rstrip().endswith(tuple(self._special)):
            return start, end
        return start, end + next((len(token) for token in self._special if text.startswith(token, end)), 0)

    def _source(self, tools: Any) -> str:
        source: str = self._tokenizer.get_chat_template(None, tools)
        return source if self._day is None else on_day(source, self._day)

    def _render(
        self, messages: Sequence[Message], tools: Any, *, generation_prompt: bool = False, markers: bool = False
    ) -> tuple[str, list[Span]]:
        plain = [
            {key: value for key, value in message.items() if key != "weight" and value is not None}
            for message in messages
        ]
        try:
            texts, spans = render_jinja_template(
                conversations=[plain],
                tools=tools,
                chat_template=self._source(tools),
                return_assistant_tokens_mask=markers,
                add_generation_prompt=generation_prompt,
                **self._tokenizer.special_tokens_map,
            )
        except TimeoutError:
            raise
        except (
            Exception
        ) as error:  # jinja2 raises whatever a template's author wrote, TypeError and TemplateError alike
            raise RunFailure(
                FailureKind.BAD_DATA,
                f"the chat template refuses a conversation: {type(error).__name__}: {error}",
                hint="compare the rows' roles with what the base model's chat template accepts",
            ) from error
        return texts[0], [(start, end) for start, end in spans[0]] if markers else []


@lru_cache
def on_day(template: str, day: date) -> str:
    """The template with `day` written where it would write today's date.

    Llama 3's and others tell the model which day it is. A run that goes on after midnight has to see the tokens that it
    began with.
    """
    return _TODAY.sub(lambda found: json.dumps(day.strftime(found.group(2))), template)


@lru_cache
def _marks_turns(template: str) -> bool:
    return _GENERATION.search(template) is not None


def assistant_turns(messages: Sequence[Message]) -> list[int]:
    """Where the assistant speaks."""
    return [at for at, message in enumerate(messages) if message["role"] == "assistant"]


def common_prefix(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many items two sequences begin with alike."""
    if other[: len(one)] == one:  # nearly always, and many times as fast
        return len(one)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
