"""Rows to token ids and what of them is learned: decided here and nowhere else.

`Encoder(tokenizer, data).encode(rows)` gives an EncodedRow or a RefusedRow for each row; a run, a check and a preview all
ask it, and it imports no torch. An EncodedRow has `samples` (`ids`, and `learned`, the spans of them with a loss), `notes`
for a person, and the ids that the model learns to stop with; `truncate` cuts a sample as a run does. A RefusedRow has
`line`, `reason` and `hint`.

Two steps: a row becomes texts, with the characters in them that are learned, and many texts become tokens at once.
"""

from __future__ import annotations

import signal
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from itertools import islice
from typing import Any, TypeVar

from daemon.dataset.rows import Row
from daemon.job import FailureKind
from daemon.recipe import DataSettings
from daemon.trainer.chat import ConversationError, Learn, Note, Split, assistant_turns, common_prefix, split
from daemon.trainer.chat_template import ChatTemplate, Span, special_strings
from daemon.trainer.errors import RunFailure
from daemon.trainer.message_forms import Message
from daemon.trainer.special_tokens import SpecialTokens
from daemon.trainer.text_tokens import Ids, Sample, TextTokens, apart, overlapping

ROWS_AT_ONCE = 128  # more make tokenising no faster

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedRow:
    """What is made of a row: one sample, or several where the chat template needs them."""

    line: int
    samples: tuple[Sample, ...]  # before truncation
    notes: frozenset[Note] = frozenset()  # what a person should know of it although it is trained
    end_ids: frozenset[int] = frozenset()  # the tokens that the model learns to stop with


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusedRow:
    """A row that cannot be trained as it should; bad as one that is not JSON is."""

    line: int
    reason: str  # one sentence
    hint: str = ""

    def failure(self) -> RunFailure:
        """The same as what a run fails with."""
        return RunFailure(FailureKind.BAD_DATA, f"line {self.line}: {self.reason}", hint=self.hint)


class Encoder:
    """Rows to samples, for one tokenizer and one `[data]`; `day` as in ChatTemplate."""

    def __init__(self, tokenizer: Any, data: DataSettings, *, day: date | None = None) -> None:
        self._tokenizer = tokenizer
        self._day = day
        self._data = data
        self._special = SpecialTokens(tokenizer)
        self._template: ChatTemplate | None = None
        self._tokens = TextTokens(tokenizer)
        self._adds_eos = self._ids([""])[0][-1:] == array("i", [tokenizer.eos_token_id or -1])  # behind any text
        others = {tokenizer.bos_token, tokenizer.pad_token, tokenizer.unk_token} - {tokenizer.eos_token}
        self._endings = tuple(token for token in special_strings(tokenizer) if token not in others)

    def encode(self, rows: Sequence[Row]) -> list[EncodedRow | RefusedRow]:
        """The samples of each row, before truncation; of many rows at once in much less time than one by one.

        A row at fault is a RefusedRow, in its place. Raises RunFailure(CONFIG) when the tokenizer lacks what rows need.
        """
        found: list[EncodedRow | RefusedRow] = []
        renderings = self._rendered(rows)
        plain = iter(self._plain([row for row, given in zip(rows, renderings, strict=True) if given is None]))
        rendered = [given for given in renderings if isinstance(given, _Rendered) and not given.marked]
        samples = iter(self._tokens.samples([text for given in rendered for text in given.split.samples]))
        for row, given in zip(rows, renderings, strict=True):
            if given is None:
                found.append(next(plain))
            elif isinstance(given, RefusedRow):
                found.append(given)
            elif given.marked:
                found.append(self._spelled(row, given))
            else:
                found.append(self._encoded(row, given, tuple(next(samples) for _ in given.split.samples)))
        return found

    def prompt(self, asked: str | Sequence[Message], tools: Any = None) -> list[int]:
        """The tokens of a text to go on with, or of a conversation to answer, as a run's rows have them before an answer.

        Raises TemplateError, RunFailure, and TimeoutError when rendering takes longer than render_seconds.
        """
        if isinstance(asked, str):
            # In a trained row a space at the seam is part of the answer's first token.
            [ids] = self._ids([asked.rstrip(" ")])
            return list(ids[:-1] if self._adds_eos else ids)
        self._template = self._template or ChatTemplate(self._tokenizer, self._day)
        messages = list(asked)
        marked = self._tokenizer.is_fast and (self._special.found_in(messages) or self._special.found_in(tools))
        if marked:
            messages, tools = self._special.mark(messages), self._special.mark(tools)
        with alarm() as set_alarm:
            set_alarm(self._data.render_seconds)
            template = self._template.for_tools(tools)
            text = template.text(template.adapted(messages), template.adapted_tools(tools), generation_prompt=True)
        return [id_ for id_, _, _ in self._special.tokens(text)] if marked else list(self._tokens.ids(text))

    def _rendered(self, rows: Sequence[Row]) -> list[_Rendered | RefusedRow | None]:
        """Each row's conversation as texts; None for a row of plain text. No row may take longer than render_seconds."""
        found: list[_Rendered | RefusedRow | None] = []
        seconds = self._data.render_seconds
        with alarm() as set_alarm:
            for row in rows:
                set_alarm(seconds)
                try:
                    found.append(self._render(row))
                except TimeoutError:
                    found.append(
                        RefusedRow(
                            line=row.line,
                            reason=f"rendering the row took longer than render_seconds = {seconds:g}",
                            hint="look at the row and at the base model's chat template,"
                            " or raise render_seconds under [data]",
                        )
                    )
                except ConversationError as error:
                    found.append(RefusedRow(line=row.line, reason=str(error), hint=error.hint))
        return found

    def _render(self, row: Row) -> _Rendered | None:
        """A conversation through the chat template. Raises ConversationError."""
        if row.kind == "messages":
            messages, first_trained = row.messages or [], 0
        elif isinstance(row.prompt, list) and isinstance(row.completion, list):
            messages, first_trained = [*row.prompt, *row.completion], len(row.prompt)
        else:
            return None
        self._template = self._template or ChatTemplate(self._tokenizer, self._day)
        tools: Any = row.tools
        marked = self._special.found_in(messages) or self._special.found_in(tools)
        learn = what_to_learn(messages, first_trained, self._data.train_on)
        if marked:
            messages, tools = self._special.mark(messages), self._special.mark(tools)
        return _Rendered(split=split(self._template.for_tools(tools), messages, tools, learn), marked=marked)

    def _encoded(self, row: Row, rendered: _Rendered, samples: tuple[Sample, ...]) -> EncodedRow:
        ends = map(self._tokenizer.convert_tokens_to_ids, rendered.split.ends)
        return EncodedRow(line=row.line, samples=samples, notes=rendered.split.notes, end_ids=frozenset(ends))

    def _plain(self, rows: Sequence[Row]) -> list[EncodedRow]:
        """Plain texts, which are all learned, and prompts with their completions: joined, tokenised once, the prompt's
        own tokens not learned.

        When a merge spans the seam, the prompt's last token is learned as part of the completion rather than lost.
        """
        masked = [row.kind != "text" and self._data.train_on != "all" for row in rows]
        prompts = iter(self._ids([str(row.prompt) for row, mask in zip(rows, masked, strict=True) if mask]))
        texts = [_plain_text(row) for row in rows]
        found = []
        for row, text, mask, ids in zip(rows, texts, masked, self._ids(texts), strict=True):
            end = self._end(text, ids)
            start = common_prefix(next(prompts), ids) if mask else 0
            found.append(
                EncodedRow(
                    line=row.line,
                    samples=(Sample(ids, ((start, len(ids)),) if start < len(ids) else ()),),
                    notes=frozenset({Note.ENDLESS} if end is None else ()),
                    end_ids=frozenset(() if end is None else {end}),
                )
            )
        return found

    def _ids(self, texts: Sequence[str]) -> list[Ids]:
        """The tokens of plain texts, with those that the tokenizer puts around any text; BOS once where they begin so."""
        if not texts:
            return []  # a batch of none costs as much as one of some
        if self._tokens.backend is not None:
            found = [array("i", encoding.ids) for encoding in self._tokens.backend.encode_batch_fast(list(texts))]
        else:
            found = [array("i", self._tokenizer(text)["input_ids"]) for text in texts]
        bos = self._tokenizer.bos_token_id
        return [ids[1:] if len(ids) > 1 and ids[0] == ids[1] == bos else ids for ids in found]

    def _end(self, text: str, ids: Ids) -> int | None:
        """End the sequence with EOS, unless the text brings an end of its own; the token that ends it, if any."""
        eos: int | None = self._tokenizer.eos_token_id
        written = text.rstrip()
        if ending := next((token for token in self._endings if written.endswith(token)), None):
            end = int(self._tokenizer.convert_tokens_to_ids(ending))
            if self._adds_eos:
                ids.pop()
            return end
        if eos is not None and (not ids or ids[-1] != eos):
            ids.append(eos)
        return eos

    def _spelled(self, row: Row, rendered: _Rendered) -> EncodedRow | RefusedRow:
        """The same where messages hold the text of special tokens, which are marked."""
        if not self._tokenizer.is_fast:  # it cannot do that: nothing is learned, so the row is left out and named
            bare = tuple(
                Sample(self._tokens.ids(text.text), (), spells_special=True) for text in rendered.split.samples
            )
            return self._encoded(row, rendered, bare)
        samples = []
        for text in rendered.split.samples:
            try:
                tokens = self._special.tokens(text.text)
            except RunFailure as failure:
                return RefusedRow(line=row.line, reason=failure.message, hint=failure.hint)
            places = [(begin, end) for _, begin, end in tokens]
            ids = array("i", (token for token, _, _ in tokens))
            learned = apart(overlapping(places, span) for span in text.learned)
            samples.append(Sample(ids, learned, spells_special=True))
        return self._encoded(row, rendered, tuple(samples))


@dataclass(frozen=True, kw_only=True)
class _Rendered:
    """A row's conversation as texts for the model."""

    split: Split
    marked: bool  # special tokens that are to be text stand between marks


def what_to_learn(messages: Sequence[Message], first_trained: int, train_on: str) -> Learn:
    """Which messages are learned, of those from `first_trained` on: see `train_on` under [data].

    "last_turn": the last of the assistant's turns; "all": everything; "completion" with a prompt before it: all behind
    the prompt; else the assistant's turns. Never turns with weight 0.
    """
    turns = [at for at in assistant_turns(messages) if at >= first_trained]
    if train_on == "last_turn":
        turns = turns[-1:]
    heard = tuple(at for at in turns if messages[at].get("weight") != 0)
    if train_on == "all":
        muted = tuple(at for at in assistant_turns(messages) if messages[at].get("weight") == 0)
        return Learn(turns=heard, all_from=0, muted=muted)
    if train_on == "completion" and first_trained:
        return Learn(turns=heard, all_from=first_trained, muted=tuple(at for at in turns if at not in heard))
    return Learn(turns=heard)


def _plain_text(row: Row) -> str:
    return row.text or "" if row.kind == "text" else f"{row.prompt}{row.completion}"


def chunks(items: Iterable[Item]) -> Iterator[list[Item]]:
    """As many at a time as are encoded together."""
    source = iter(items)
    while chunk := list(islice(source, ROWS_AT_ONCE)):
        yield chunk


def trained_tokens(learned: Iterable[Span]) -> int:
    """How many tokens a loss is computed of: a row's first has nothing before it that could predict it."""
    return sum(end - max(begin, 1) for begin, end in learned if end > 1)


def truncate(tokens: Sample, max_length: int, bos: int | None) -> Sample:
    """At most `max_length` tokens, chosen so that what is trained stays.

    The end goes when nothing trained stands there; else the beginning of the context (a BOS token stays). Of a trained
    part that is too long itself, its beginning is kept, behind a quarter's context.
    """
    ids, learned = tokens.ids, tokens.learned
    if len(ids) <= max_length:
        return tokens
    start = kept_from(tokens, max_length)
    kept = ids[start : start + max_length]
    spans = apart((max(begin - start, 0), min(stop - start, max_length)) for begin, stop in learned)
    if start and bos is not None and ids[0] == bos and not (spans and spans[0][0] == 0):
        kept[0] = bos
    return replace(tokens, ids=kept, learned=spans)


def kept_from(tokens: Sample, max_length: int) -> int:
    """Where the `max_length` tokens begin that `truncate` keeps."""
    learned = tokens.learned
    first, end = (learned[0][0], learned[-1][1]) if learned else (0, 0)
    if end <= max_length:
        return 0
    return end - max_length if end - first < max_length else max(0, first - max_length // 4)


@contextmanager
def alarm() -> Iterator[Callable[[float], None]]:
    """A function that sets a clock: TimeoutError is raised in here so many seconds after it was called last.

    A template is a program, and its author may be anybody. Only the main thread can be interrupted; elsewhere there is
    no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda seconds: None
        return

    def expire(number: int, frame: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, expire)
    try:
        yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds) and None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
