"""Rows to token ids and what of them is learned: decided here and nowhere else.

`Encoder(tokenizer, data).encode(rows)` gives an EncodedRow or a RefusedRow for each row; a run, a check and a preview all
ask it, and it imports no torch. An EncodedRow has `samples` (`ids`, and `learned`, the spans of them with a loss), `notes`
for a person, and the ids that the model learns to stop with; `truncate` cuts a sample as a run does. A RefusedRow has
`line`, `reason` and `hint`.

Two steps. A row becomes texts, with the characters in them that are learned; many texts become tokens at once. A tokenizer
spends a quarter of its time on saying where its tokens stand. Those of a byte-level vocabulary say it themselves: their
bytes, put together, are the text, which is checked for every row.
"""

from __future__ import annotations

import signal
import threading
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from itertools import accumulate, islice
from typing import Any, TypeAlias, TypeVar

from tokenizers import decoders
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from daemon.dataset.rows import Row
from daemon.job import FailureKind
from daemon.recipe import DataSettings
from daemon.trainer.chat import ConversationError, Learn, Note, Split, assistant_turns, common_prefix, split
from daemon.trainer.chat_template import ChatTemplate, Span, special_strings
from daemon.trainer.errors import RunFailure
from daemon.trainer.message_forms import Message
from daemon.trainer.special_tokens import SpecialTokens

ROWS_AT_ONCE = 128  # more make tokenising no faster

Item = TypeVar("Item")
Ids: TypeAlias = "array[int]"  # of 4 bytes each

_BYTES = {ord(shown): chr(byte) for byte, shown in bytes_to_unicode().items()}  # as byte-level vocabularies show them


@dataclass(frozen=True, slots=True)
class Sample:
    """One sequence that the model is trained on, and the spans of it that are learned: in order, apart, none empty."""

    ids: Ids  # (T,)
    learned: tuple[Span, ...]
    spells_special: bool = False  # a message holds the text of a special token, which is learned as text


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


@dataclass(frozen=True, slots=True)
class _Text:
    """A text for the model, and what of it is learned."""

    text: str
    learned: Sequence[Span]  # characters
    marked: bool  # special tokens that are to be text stand between marks


class Encoder:
    """Rows to samples, for one tokenizer and one `[data]`; `day` as in ChatTemplate."""

    def __init__(self, tokenizer: Any, data: DataSettings, *, day: date | None = None) -> None:
        self._tokenizer = tokenizer
        self._day = day
        self._data = data
        self._special = SpecialTokens(tokenizer)
        self._template: ChatTemplate | None = None
        self._backend = _backend_of(tokenizer)
        self._bytes = TokenBytes(tokenizer) if self._backend and TokenBytes.may_fit(self._backend) else None
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
        texts = [text for given in renderings if isinstance(given, _Rendered) for text in given.texts]
        label = iter(self._label([text for text in texts if not text.marked]))
        for row, given in zip(rows, renderings, strict=True):
            if given is None:
                found.append(next(plain))
            elif isinstance(given, RefusedRow):
                found.append(given)
            elif given.marked:
                found.append(self._spelled(row, given))
            else:
                found.append(self._encoded(row, given, tuple(next(label) for _ in given.texts)))
        return found

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
        found = split(self._template.for_tools(tools), messages, tools, learn)
        return _Rendered(
            texts=[_Text(sample.text, sample.learned, marked) for sample in found.samples], split=found, marked=marked
        )

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
        if self._backend is not None:
            found = [array("i", encoding.ids) for encoding in self._backend.encode_batch_fast(list(texts))]
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

    def _label(self, texts: Sequence[_Text]) -> list[Sample]:
        """Sample of rendered texts; learned is each that overlaps one of the spans."""
        plain = [text.text for text in texts]
        if self._backend is not None and self._bytes is not None:
            found = self._backend.encode_batch_fast(plain, add_special_tokens=False)
            return [
                self._by_bytes(text, encoding.ids) or self._by_offsets(text)
                for text, encoding in zip(texts, found, strict=True)
            ]
        return [self._by_offsets(text) if self._tokenizer.is_fast else self._by_prefixes(text) for text in texts]

    def _by_bytes(self, text: _Text, ids: list[int]) -> Sample | None:
        """From the bytes that the tokens stand for; None when they are not those of the text."""
        assert self._bytes is not None  # noqa: S101  asked by `_label`
        pieces = list(map(self._bytes.__getitem__, ids))
        raw = text.text.encode()
        if b"".join(pieces) != raw:
            return None
        ends = list(accumulate(map(len, pieces)))
        spans = text.learned
        if len(raw) > len(text.text):
            spans = [(len(text.text[:begin].encode()), len(text.text[:end].encode())) for begin, end in spans]
        ranges = [(bisect_right(ends, begin), bisect_left(ends, end) + 1) for begin, end in spans if begin < end]
        return Sample(array("i", ids), _apart(ranges))

    def _by_offsets(self, text: _Text) -> Sample:
        """From where the tokenizer says that its tokens stand."""
        if self._backend is not None:
            encoding = self._backend.encode(text.text, add_special_tokens=False)
        else:
            encoding = self._tokenizer(text.text, add_special_tokens=False).encodings[0]
        length = len(text.text)
        return Sample(array("i", encoding.ids), _apart(token_range(encoding, length, span) for span in text.learned))

    def _by_prefixes(self, text: _Text) -> Sample:
        """For a tokenizer that cannot say it: where the tokens of the text up to a place part from the whole's."""
        ids = self._alone(text.text)
        return Sample(
            ids,
            _apart(
                (common_prefix(self._alone(text.text[:begin]), ids), common_prefix(self._alone(text.text[:end]), ids))
                for begin, end in text.learned
            ),
        )

    def _spelled(self, row: Row, rendered: _Rendered) -> EncodedRow | RefusedRow:
        """The same where messages hold the text of special tokens, which are marked."""
        if not self._tokenizer.is_fast:  # it cannot do that: nothing is learned, so the row is left out and named
            bare = tuple(Sample(self._alone(text.text), (), spells_special=True) for text in rendered.texts)
            return self._encoded(row, rendered, bare)
        samples = []
        for text in rendered.texts:
            try:
                tokens = self._special.tokens(text.text)
            except RunFailure as failure:
                return RefusedRow(line=row.line, reason=failure.message, hint=failure.hint)
            places = [(begin, end) for _, begin, end in tokens]
            ids = array("i", (token for token, _, _ in tokens))
            learned = _apart(_overlapping(places, span) for span in text.learned)
            samples.append(Sample(ids, learned, spells_special=True))
        return self._encoded(row, rendered, tuple(samples))

    def _alone(self, text: str) -> Ids:
        """A text's tokens without any that the tokenizer puts around it."""
        return array("i", self._tokenizer(text, add_special_tokens=False)["input_ids"])


@dataclass(frozen=True, kw_only=True)
class _Rendered:
    """A row's conversation as texts for the model."""

    texts: Sequence[_Text]
    split: Split
    marked: bool


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


class TokenBytes(dict[int, bytes]):
    """The bytes that each token of a byte-level vocabulary stands for, found when they are asked for."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__({id_: token.content.encode() for id_, token in tokenizer.added_tokens_decoder.items()})
        self._name_of: Callable[[int], str] = tokenizer.backend_tokenizer.id_to_token

    @staticmethod
    def may_fit(backend: Any) -> bool:
        """Whether the tokenizer's vocabulary is byte-level; that a text's tokens are the text is checked for each."""
        return isinstance(backend.decoder, decoders.ByteLevel)

    def __missing__(self, id_: int) -> bytes:
        try:
            found = self._name_of(id_).translate(_BYTES).encode("latin-1")
        except UnicodeEncodeError:  # not a token of bytes; the empty one never makes up a text
            found = b""
        self[id_] = found
        return found


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
    spans = _apart((max(begin - start, 0), min(stop - start, max_length)) for begin, stop in learned)
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


def _apart(spans: Iterable[Span]) -> tuple[Span, ...]:
    """Spans in order without the empty ones; those that overlap or touch become one."""
    found: list[Span] = []
    for begin, end in spans:
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        elif begin < end:
            found.append((begin, end))
    return tuple(found)


def token_range(encoding: Any, length: int, span: Span) -> tuple[int, int]:
    """First token of an encoded text of `length` characters that overlaps the span, and the one behind the last.

    Asked of the encoding itself, which is many times as fast as to fetch every token's place.
    """
    begin, end = span
    first = encoding.char_to_token(begin)
    behind = encoding.char_to_token(end) if end < length else len(encoding)
    if first is None or behind is None:  # a character of which the tokenizer makes nothing
        return _overlapping(encoding.offsets, span)
    # The token that holds the character behind the span is the span's as well when it began inside.
    return first, behind + (end < length and encoding.token_to_chars(behind)[0] < end)


def _overlapping(places: Sequence[Span], span: Span) -> tuple[int, int]:
    """The same from every token's place."""
    return bisect_right([end for _, end in places], span[0]), bisect_left([begin for begin, _ in places], span[1])


def _backend_of(tokenizer: Any) -> Any:
    """The Rust tokenizer, when calling it is what calling the tokenizer comes to; else None."""
    own = (PreTrainedTokenizerFast._encode_plus, PreTrainedTokenizerBase.__call__)
    kind = type(tokenizer)
    if (getattr(kind, "_encode_plus", None), kind.__call__) != own:
        return None
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return backend


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
