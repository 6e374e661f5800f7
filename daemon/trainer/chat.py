"""A conversation as the samples that train it, and which of their characters are learned.

The rule, for every assistant's turn that is learned: what stands before it is what the model would be given,
`apply_chat_template(messages before it, add_generation_prompt=True)`, and what is learned is what it would have to write
then, to and including the template's own end of turn. Both are renderings by the template itself, and each is checked.
Turns whose renderings are beginnings of one another share a sample; the others have samples of their own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import takewhile
from typing import Any

from daemon.trainer.chat_template import DEFAULT, OneTemplate, Span, Switches, TemplateError
from daemon.trainer.completeness import Part, context_lacks, held_by, held_by_tools, lacks
from daemon.trainer.message_forms import Message

_OPENED = re.compile(r"<(think|thinking|thought)>\s*\Z")  # at the end of a generation prompt


class Note(StrEnum):
    """What a person should know of a row although it is trained; `[rows]` is said before each."""

    OPENING = "begin with an answer that the template cannot ask for, which is not learned"
    OLD_REASONING = "have reasoning that the template leaves out of what later turns see, as at inference"
    NO_TOOLS = "have tool definitions, of which the template leaves something out"
    NO_SYSTEM = "have a system text that the template leaves out"
    NO_USER = "have a user's text that the template leaves out"
    NO_RESULT = "have tool results that the template leaves out"
    NO_ANSWER = "have answers that the template leaves out of what later turns see"
    NO_CALL = "have tool calls that the template leaves out of what later turns see"
    THINKING_ON = "have reasoning, which the template asks for with its switch for reasoning on, and are learned so"
    THINKING_OFF = (
        "have no reasoning, which the template asks for with its switch for reasoning off, and are learned so"
    )
    ENDLESS = "have answers without an end that the model could learn to stop with"


_LOST = {
    Part.TOOLS: Note.NO_TOOLS,
    Part.SYSTEM: Note.NO_SYSTEM,
    Part.USER: Note.NO_USER,
    Part.RESULT: Note.NO_RESULT,
    Part.ANSWER: Note.NO_ANSWER,
    Part.REASONING: Note.OLD_REASONING,
    Part.CALL: Note.NO_CALL,
}


class ConversationError(Exception):
    """A conversation that cannot be shown to be trained as it should; the message is a sentence about why."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True, slots=True)
class TextSample:
    """A text for the model, and the spans of it that are learned: in order and apart."""

    text: str
    learned: tuple[Span, ...]


@dataclass(frozen=True, kw_only=True)
class Split:
    """A conversation's samples, in the order of their last turns."""

    samples: tuple[TextSample, ...]
    notes: frozenset[Note] = frozenset()
    ends: frozenset[str] = frozenset()  # the special tokens that learned turns end with


@dataclass(frozen=True, kw_only=True)
class Learn:
    """Which of a conversation's messages are learned."""

    turns: tuple[int, ...]  # assistant's messages, in order
    all_from: int | None = None  # all messages from this one on, but muted turns; None: the turns alone
    muted: tuple[int, ...] = ()  # assistant's messages that are not to be learned whatever the rest


@dataclass(frozen=True, kw_only=True)
class _Turn:
    """An assistant's turn as the model would be asked for it and as it would write it."""

    index: int
    text: str  # of the conversation up to its end
    start: int  # where the model begins to write
    end: int
    context_end: int  # where what is common with a longer conversation may end: before what closes a finished one


def split(template: OneTemplate, messages: Sequence[Message], tools: Any, learn: Learn) -> Split:
    """Render a conversation and divide it into as few samples as the rule allows.

    Raises ConversationError.
    """
    rendering = _Rendering(template, template.adapted(messages), template.adapted_tools(tools))
    try:
        if learn.all_from is None:
            return rendering.turns(learn.turns)
        try:
            return rendering.whole(learn)
        except _NotNested:
            if any(message["role"] != "assistant" for message in messages[learn.all_from :]):
                raise
            return rendering.turns(learn.turns)  # there is nothing else to learn
    except TemplateError as error:
        raise ConversationError(
            str(error), hint="compare the rows' roles with what the base model's chat template accepts"
        ) from error


class _Rendering:
    """One conversation under one template."""

    def __init__(self, template: OneTemplate, messages: list[Message], tools: Any) -> None:
        self._template = template
        self._messages = messages
        self._tools = tools
        self._held = [held_by(message) for message in messages]
        self._held_by_tools = held_by_tools(tools)
        self._notes: set[Note] = set()
        self._ends: set[str] = set()

    def turns(self, indices: Sequence[int]) -> Split:
        """Samples in which these assistant's messages are learned."""
        turns = [turn for index in indices if (turn := self._asked(index)) is not None]
        if not turns:
            return self._split([TextSample(self._text(len(self._messages)), ())])
        last = turns[-1]
        longest = last.text
        if last.index + 1 < len(self._messages):
            longest = self._continued(last)
        groups: list[tuple[str, list[_Turn]]] = []  # a text, and the turns that are beginnings of it
        for turn in reversed(turns):
            begun = turn.text[: turn.context_end]
            for text, members in groups:
                if text.startswith(begun):
                    members.append(turn)
                    break
            else:
                groups.append((longest if turn is last else turn.text, [turn]))
        samples = []
        for text, members in reversed(groups):
            members.reverse()
            samples.append(TextSample(text, tuple(_span_in(text, turn) for turn in members)))
            self._look_at_context(members)
        return self._split(samples)

    def whole(self, learn: Learn) -> Split:
        """One sample in which all is learned from a message on, but muted turns.

        Only where the renderings of all turns nest: else some turn would be learned in a form that the model never
        writes, after a context that it never sees.
        """
        first = learn.all_from or 0
        text = self._text(len(self._messages))
        start = len(self._before(first, text)) if first else 0
        kept: list[Span] = []
        for index in sorted({*learn.turns, *learn.muted}):
            if index not in learn.muted and self._opens(index):
                continue
            turn = self._turn(index)
            if not text.startswith(turn.text[: turn.context_end]):
                raise _NotNested(f"message {index + 1}")
            if index in learn.muted:
                span = _span_in(text, turn)
                kept.append((start, max(span[0], start)))
                start = max(start, span[1])
        missing = context_lacks(text, self._held, self._held_by_tools)
        if missing:
            raise ConversationError(f"the chat template leaves out {_listed(missing)}, which are to be learned")
        return self._split([TextSample(text, tuple(span for span in (*kept, (start, len(text))) if span[0] < span[1]))])

    def _before(self, first: int, text: str) -> str:
        """What stands before message `first`, an answer or not. Raises ConversationError unless it begins the text."""
        for generation_prompt in (True, False):
            before = self._text(first, generation_prompt=generation_prompt)
            if text.startswith(before):
                return before
        raise _NotNested("the prompt")

    def _asked(self, index: int) -> _Turn | None:
        """The turn; None for one that opens the conversation where the template cannot ask for that."""
        try:
            return self._turn(index)
        except (TemplateError, _NotContinued):
            if not self._opens(index):
                raise
        self._notes.add(Note.OPENING)
        return None

    def _opens(self, index: int) -> bool:
        """Whether nobody has said anything before this message."""
        return all(message["role"] not in ("user", "tool") for message in self._messages[:index])

    def _turn(self, index: int) -> _Turn:
        """The turn in the first of the template's modes in which it is whole and continues the generation prompt."""
        problem: ConversationError | None = None
        for switches in self._template.modes:
            asked = self._text(index, generation_prompt=True, switches=switches)
            text, marked = self._template.finished(self._messages[: index + 1], self._tools, switches=switches)
            if not text.startswith(asked):
                problem = problem or _NotContinued(index, asked, text)
            elif missing := lacks(text[len(asked) :], self._held[index]):
                problem = _Incomplete(index, missing)
            else:
                return self._ended(index, asked, text, switches, marked)
        if turn := self._with_thought(index) or self._after_other_beginning(index):
            return turn
        assert problem is not None  # noqa: S101  there is at least one mode
        raise problem

    def _with_thought(self, index: int) -> _Turn | None:
        """The turn where the generation prompt opens a thought that the template cuts out of finished answers.

        The model has to close it, and the template shows how it goes on behind. None where that is not so.
        """
        message = self._messages[index]
        asked = self._text(index, generation_prompt=True)
        opened = _OPENED.search(asked)
        if opened is None:
            return None
        close = f"</{opened.group(1)}>"
        thought, answer = _thought_and_answer(message, opened.group(), close)
        written = {
            key: value for key, value in message.items() if key not in ("reasoning_content", "reasoning", "thinking")
        }
        inline = {**written, "content": f"{opened.group()}{thought}{close}{answer}"}
        bare = asked[: opened.start()]
        for attempt in (inline, message):
            text = self._template.text([*self._messages[:index], attempt], self._tools)
            rest = text[len(bare) :] if text.startswith(bare) else ""
            if not text.startswith(asked) and rest and not rest.lstrip().startswith(opened.group().strip()):
                text = f"{asked}{thought}{close}{_gap(rest)}{rest}"
            if text.startswith(asked) and not lacks(
                text[len(asked) :], held_by({**message, "content": answer, "reasoning_content": thought})
            ):
                return self._ended(index, asked, text)
        return None

    def _after_other_beginning(self, index: int) -> _Turn | None:
        """The turn where the template renders what stands before it anew once it is answered.

        How it renders the turn itself is seen behind the last question alone; behind the same generation prompt it has to
        stand at the end of this conversation as well. None where that is not so.
        """
        messages = self._messages
        question = next((at for at in reversed(range(index)) if messages[at]["role"] == "user"), None)
        before, asked = self._text(index), self._text(index, generation_prompt=True)
        if question is None or not asked.startswith(before):
            return None
        prompt = asked[len(before) :]
        alone = self._template.text([messages[question]], self._tools, generation_prompt=True)
        answered = self._template.text([messages[question], messages[index]], self._tools)
        if not prompt or not answered.startswith(alone) or not alone.endswith(prompt):
            return None
        written = answered[len(alone) :]
        if not self._text(index + 1).endswith(prompt + written) or lacks(written, self._held[index]):
            return None
        return self._ended(index, asked, asked + written)

    def _ended(
        self, index: int, asked: str, text: str, switches: Switches = DEFAULT, marked: Sequence[Span] = ()
    ) -> _Turn:
        """The turn to the end that the model has to learn."""
        template = self._template
        end = len(text)
        context_end = end - len(template.closer) if text.endswith(template.closer) else end
        if marked:
            end = self._marked_end(len(asked), text, marked)
        written = text[len(asked) : min(end, context_end)].rstrip()
        ending = next((token for token in template.special if written.endswith(token)), "")
        if not ending:  # GLM's writes what begins the next turn, and nothing before it
            ending = template.after_call if self._messages[index].get("tool_calls") else template.after_answer
            if ending:
                text, end = text[:end] + ending, end + len(ending)
                context_end = end
        if switches:
            self._notes.add(Note.THINKING_ON if any(switches.values()) else Note.THINKING_OFF)
        if ending:
            self._ends.add(ending)
        else:
            self._notes.add(Note.ENDLESS)
        return _Turn(index=index, text=text, start=len(asked), end=end, context_end=context_end)

    def _marked_end(self, start: int, text: str, spans: Sequence[Span]) -> int:
        """Where the template's own markers say that the turn ends, its end-of-turn token included."""
        end = max((end for _, end in spans), default=0)
        if end <= start:
            return len(text)  # it does not mark a turn of this kind
        if text[start:end].rstrip().endswith(self._template.special):
            return end
        return end + next((len(token) for token in self._template.special if text.startswith(token, end)), 0)

    def _continued(self, last: _Turn) -> str:
        """The whole conversation where it begins with the last learned turn; else that turn's text alone."""
        try:
            whole = self._text(len(self._messages))
        except TemplateError:
            return last.text
        return whole if whole.startswith(last.text[: last.context_end]) else last.text

    def _look_at_context(self, members: Sequence[_Turn]) -> None:
        last = members[-1]
        missing = context_lacks(last.text[: last.start], self._held[: last.index], self._held_by_tools)
        self._notes.update(_LOST[part] for part in missing)

    def _text(self, count: int, *, generation_prompt: bool = False, switches: Switches = DEFAULT) -> str:
        return self._template.text(
            self._messages[:count], self._tools, generation_prompt=generation_prompt, switches=switches
        )

    def _split(self, samples: Sequence[TextSample]) -> Split:
        return Split(samples=tuple(samples), notes=frozenset(self._notes), ends=frozenset(self._ends))


class _NotContinued(ConversationError):
    """The template renders a turn as something else than a continuation of its own generation prompt."""

    def __init__(self, index: int, asked: str, text: str) -> None:
        at = common_prefix(asked, text)
        super().__init__(
            f"the chat template asks for message {index + 1} with {asked[-40:]!r} and then renders it as"
            f" {text[at : at + 40]!r}, which does not go on from there",
            hint="no tokens of this turn can be learned with this template; take the row out, or use another template",
        )


class _NotNested(ConversationError):
    """What comes first is rendered differently once the conversation goes on."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"the chat template renders {what} differently once the conversation goes on, so the conversation cannot be"
            " learned as a whole",
            hint='set train_on = "assistant" under [data]',
        )


class _Incomplete(ConversationError):
    """The template leaves out something of a turn that is to be learned."""

    def __init__(self, index: int, missing: set[Part]) -> None:
        super().__init__(
            f"the chat template leaves out {_listed(missing)} of message {index + 1}, which is to be learned",
            hint=(
                "this model has no form for reasoning: take it out of the row, or choose a model that reasons"
                if missing == {Part.REASONING}
                else "choose a base model whose template has a form for it, or set weight to 0 on that message"
            ),
        )


def assistant_turns(messages: Sequence[Message]) -> list[int]:
    """Where the assistant speaks."""
    return [at for at, message in enumerate(messages) if message["role"] == "assistant"]


def common_prefix(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many items two sequences begin with alike."""
    if other[: len(one)] == one:  # nearly always, and many times as fast
        return len(one)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _span_in(text: str, turn: _Turn) -> Span:
    """What is learned of a turn in a text that it begins: without what closes only a finished conversation."""
    return turn.start, turn.end if text.startswith(turn.text) else min(turn.end, turn.context_end)


def _thought_and_answer(message: Message, opened: str, close: str) -> tuple[str, str]:
    """What is thought behind a generation prompt that ends with `opened`, and what follows `close`.

    Reasoning that the text itself holds stays as it is spelled there; else it stands on lines of its own, as those models
    write it.
    """
    content, reasoning = message.get("content") or "", (message.get("reasoning_content") or "").strip("\n")
    line = "" if opened.endswith("\n") else "\n"
    if reasoning:
        return f"{line}{reasoning}\n", _gap(content) + content
    thought, closed, answer = content.partition(close)
    if closed:
        return thought.lstrip().removeprefix(opened.strip()).removeprefix("" if line else "\n"), answer
    return "\n", _gap(content) + content


def _gap(answer: str) -> str:
    return "" if answer.startswith("\n") else "\n\n"


def _listed(parts: set[Part]) -> str:
    return " and ".join(sorted(parts))
