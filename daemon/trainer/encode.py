"""One row to token ids and labels: exactly what is learned, decided here and nowhere else."""

from __future__ import annotations

import signal
import threading
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from daemon.job import FailureKind
from daemon.recipe import DataSettings
from daemon.rows import Row
from daemon.trainer.chat import ChatTemplate, Span, assistant_turns, common_prefix
from daemon.trainer.control import ControlTokens
from daemon.trainer.failure import RunFailure

IGNORE = -100  # transformers' losses skip this label

Ids: TypeAlias = "array[int]"  # of 4 bytes each
Tokens: TypeAlias = "tuple[Ids, Ids]"  # input_ids and labels, both (T,)


class Encoder:
    """Rows to token ids and labels, for one tokenizer and one `[data]`."""

    def __init__(self, tokenizer: Any, data: DataSettings) -> None:
        self._tokenizer = tokenizer
        self._data = data
        self._control = ControlTokens(tokenizer)
        self._template: ChatTemplate | None = None
        self._backend = _backend_of(tokenizer)

    def encode(self, row: Row) -> Tokens:
        """input_ids and labels of one row, both (T,), before truncation.

        A label is the token itself where it is learned, else IGNORE. Raises RunFailure with the row's line.
        """
        try:
            with time_limit(self._data.render_seconds):
                return self._encode(row)
        except TimeoutError:
            raise RunFailure(
                FailureKind.BAD_DATA,
                f"line {row.line}: rendering the row took longer than render_seconds = {self._data.render_seconds:g}",
                hint="look at the row and at the base model's chat template, or raise render_seconds under [data]",
            ) from None
        except RunFailure as failure:
            if failure.kind is not FailureKind.BAD_DATA:
                raise
            raise RunFailure(failure.kind, f"line {row.line}: {failure.message}", hint=failure.hint) from failure

    def spells_control_tokens(self, row: Row) -> bool:
        """Whether a message of this row holds the text of a control token, which is then learned as text."""
        return any(map(self._control.found_in, (*_conversation(row)[0], row.tools)))

    def _encode(self, row: Row) -> Tokens:
        if row.kind == "text":
            ids = self._with_eos(self._ids(row.text or ""))
            return ids, ids[:]
        if isinstance(row.prompt, str) and isinstance(row.completion, str):
            return self._encode_text_pair(row.prompt, row.completion)
        return self._encode_chat(*_conversation(row), row.tools)

    def _encode_text_pair(self, prompt: str, completion: str) -> Tokens:
        """Plain text: the joined string is tokenised once, and the prompt's own tokens are masked.

        When a merge spans the seam, the prompt's last token is learned as part of the completion rather than lost.
        """
        ids = self._with_eos(self._ids(prompt + completion))
        masked = 0 if self._data.train_on == "all" else common_prefix(self._ids(prompt), ids)
        return ids, array("i", [IGNORE]) * masked + ids[masked:]

    def _encode_chat(self, messages: Sequence[dict[str, Any]], first_trained: int, tools: Any) -> Tokens:
        """A conversation through the chat template.

        Assistant turns from `first_trained` on are learned (only the last of them for "last_turn"; all behind the prompt
        for "completion" where there is a prompt; everything for "all"), each with the end-of-turn tokens that the
        template puts behind it. Turns with weight 0 are not.
        """
        self._template = self._template or ChatTemplate(self._tokenizer)
        spelled = self._control.found_in(messages) or self._control.found_in(tools)
        if spelled:
            messages, tools = self._control.mark(messages), self._control.mark(tools)
        text, spans = self._learned(self._template, messages, first_trained, tools)
        return self._label_spelled(text, spans) if spelled else self._label(text, spans)

    def _learned(
        self, template: ChatTemplate, messages: Sequence[dict[str, Any]], first_trained: int, tools: Any
    ) -> tuple[str, list[Span]]:
        """The rendering, and the spans of it that are learned."""
        train_on = self._data.train_on
        turns = assistant_turns(messages)
        silent = [messages[at].get("weight") == 0 for at in turns]
        if train_on == "last_turn" and turns and turns[-1] >= first_trained:
            rendered = template.render_last(messages, tools)
            return rendered.text, [] if silent[-1] else list(rendered.turns)
        if train_on == "all" and not any(silent):
            text = template.text(messages, tools)
            return text, [(0, len(text))]
        rendered = template.render(messages, tools)
        spans = list(rendered.turns)
        if train_on == "all":
            return rendered.text, _without(len(rendered.text), 0, spans, silent)
        if train_on == "completion" and first_trained:
            start = common_prefix(template.text(messages[:first_trained], tools, generation_prompt=True), rendered.text)
            return rendered.text, _without(len(rendered.text), start, spans, silent)
        heard = zip(turns, spans, silent, strict=True)
        return rendered.text, [span for at, span, mute in heard if at >= first_trained and not mute]

    def _ids(self, text: str) -> Ids:
        """A plain text's tokens, with those that the tokenizer puts around any text."""
        if self._backend is not None:
            return array("i", self._backend.encode(text).ids)
        return array("i", self._tokenizer(text)["input_ids"])

    def _with_eos(self, ids: Ids) -> Ids:
        """End the sequence with EOS, so that the model learns to stop."""
        eos = self._tokenizer.eos_token_id
        if eos is not None and (not ids or ids[-1] != eos):
            ids.append(eos)
        return ids

    def _label(self, text: str, spans: Sequence[Span]) -> Tokens:
        """Token ids of a rendered text, and labels where a token overlaps one of the spans (in order, apart)."""
        if not self._tokenizer.is_fast:
            return _label_by_prefix(text, spans, self._tokenizer)
        if self._backend is not None:
            encoding = self._backend.encode(text, add_special_tokens=False)
        else:
            encoding = self._tokenizer(text, add_special_tokens=False).encodings[0]
        ids = array("i", encoding.ids)
        labels = array("i", [IGNORE]) * len(ids)
        for span in spans:
            first, last = token_range(encoding, len(text), span)
            labels[first:last] = ids[first:last]
        return ids, labels

    def _label_spelled(self, text: str, spans: Sequence[Span]) -> Tokens:
        """The same where messages hold the text of control tokens, which are marked."""
        if not self._tokenizer.is_fast:  # it cannot do that: nothing is learned, so the row is left out and named
            ids = array("i", self._tokenizer(text, add_special_tokens=False)["input_ids"])
            return ids, array("i", [IGNORE]) * len(ids)
        tokens = self._control.tokens(text)
        ids = array("i", (token for token, _, _ in tokens))
        labels = array("i", [IGNORE]) * len(ids)
        for span in spans:
            first, last = _overlapping([(begin, end) for _, begin, end in tokens], span)
            labels[first:last] = ids[first:last]
        return ids, labels


def truncate(ids: Ids, labels: Ids, max_length: int, bos: int | None) -> Tokens:
    """At most `max_length` tokens, chosen so that what is trained stays.

    The end goes when nothing trained stands there; else the beginning of the context (a BOS token stays). Of a trained
    part that is too long itself, its beginning is kept, behind a quarter's context.
    """
    if len(ids) <= max_length:
        return ids, labels
    learned = [at for at, label in enumerate(labels) if label != IGNORE]
    first, end = (learned[0], learned[-1] + 1) if learned else (0, 0)
    if end <= max_length:
        start = 0
    elif end - first < max_length:
        start = end - max_length
    else:
        start = max(0, first - max_length // 4)
    cut_ids, cut_labels = ids[start : start + max_length], labels[start : start + max_length]
    if start and bos is not None and ids[0] == bos and cut_labels[0] == IGNORE:
        cut_ids[0] = bos
    return cut_ids, cut_labels


def _without(length: int, start: int, spans: Sequence[Span], silent: Sequence[bool]) -> list[Span]:
    """Everything from `start` on but the spans of turns that are not to be learned."""
    kept = []
    for (begin, end), mute in zip(spans, silent, strict=True):
        if mute and end > start:
            kept.append((start, max(begin, start)))
            start = end
    return [*kept, (start, length)]


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


def _label_by_prefix(text: str, spans: Sequence[Span], tokenizer: Any) -> Tokens:
    """For a tokenizer that cannot say where its tokens stand: where the prefix's tokens part from the whole's."""
    ids = array("i", tokenizer(text, add_special_tokens=False)["input_ids"])
    labels = array("i", [IGNORE]) * len(ids)
    for span in spans:
        first, last = (
            common_prefix(array("i", tokenizer(text[:at], add_special_tokens=False)["input_ids"]), ids) for at in span
        )
        labels[first:last] = ids[first:last]
    return ids, labels


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


def _conversation(row: Row) -> tuple[list[dict[str, Any]], int]:
    """All messages of a row, and the first of them that is not its prompt's; none for a row of plain text."""
    if row.kind == "messages":
        return row.messages or [], 0
    prompt, completion = (part if isinstance(part, list) else [] for part in (row.prompt, row.completion))
    return [*prompt, *completion], len(prompt)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in here after `seconds`: a template is a program, and its author may be anybody.

    Only the main thread can be interrupted; elsewhere there is no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def expire(number: int, frame: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
