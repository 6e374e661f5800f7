"""One row to token ids and labels: exactly what is learned, decided here and nowhere else."""

from __future__ import annotations

import signal
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from daemon.config import DataSettings
from daemon.job import FailureKind
from daemon.rows import Row
from daemon.trainer.chat import ChatTemplate, Span, assistant_turns, common_prefix
from daemon.trainer.failure import RunFailure

IGNORE = -100  # transformers' losses skip this label


def encode(row: Row, tokenizer: Any, data: DataSettings) -> tuple[list[int], list[int]]:
    """input_ids and labels of one row, both (T,), before truncation.

    A label is the token itself where it is learned, else IGNORE. Raises RunFailure with the row's line.
    """
    try:
        with time_limit(data.render_seconds):
            return _encode(row, tokenizer, data)
    except TimeoutError:
        raise RunFailure(
            FailureKind.BAD_DATA,
            f"line {row.line}: rendering the row took longer than render_seconds = {data.render_seconds:g}",
            hint="look at the row and at the base model's chat template, or raise render_seconds under [data]",
        ) from None
    except RunFailure as failure:
        if failure.kind is not FailureKind.BAD_DATA:
            raise
        raise RunFailure(failure.kind, f"line {row.line}: {failure.message}", hint=failure.hint) from failure


def truncate(ids: list[int], labels: list[int], max_length: int, bos: int | None) -> tuple[list[int], list[int]]:
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


def _encode(row: Row, tokenizer: Any, data: DataSettings) -> tuple[list[int], list[int]]:
    if row.kind == "text":
        ids = _with_eos(tokenizer(row.text)["input_ids"], tokenizer)
        return ids, list(ids)
    if row.kind == "messages":
        return _encode_chat(row.messages or [], 0, row.tools, tokenizer, data.train_on)
    if isinstance(row.prompt, str) and isinstance(row.completion, str):
        return _encode_text_pair(row.prompt, row.completion, tokenizer, everything=data.train_on == "all")
    prompt, completion = _as_messages(row.prompt, "user"), _as_messages(row.completion, "assistant")
    return _encode_chat([*prompt, *completion], len(prompt), row.tools, tokenizer, data.train_on)


def _as_messages(part: Any, role: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": part}] if isinstance(part, str) else list(part or ())


def _encode_text_pair(prompt: str, completion: str, tokenizer: Any, *, everything: bool) -> tuple[list[int], list[int]]:
    """Plain text: the joined string is tokenised once, and the prompt's own tokens are masked.

    When a merge spans the seam, the prompt's last token is learned as part of the completion rather than lost.
    """
    head = tokenizer(prompt)["input_ids"]
    ids = _with_eos(tokenizer(prompt + completion)["input_ids"], tokenizer)
    masked = 0 if everything else common_prefix(head, ids)
    return ids, [IGNORE] * masked + ids[masked:]


def _with_eos(ids: list[int], tokenizer: Any) -> list[int]:
    """End the sequence with EOS, so that the model learns to stop."""
    eos = tokenizer.eos_token_id
    return [*ids, eos] if eos is not None and (not ids or ids[-1] != eos) else list(ids)


def _encode_chat(
    messages: Sequence[dict[str, Any]], first_trained: int, tools: Any, tokenizer: Any, train_on: str
) -> tuple[list[int], list[int]]:
    """A conversation through the chat template.

    Assistant turns from `first_trained` on are learned (only the last of them for "last_turn"; all behind the prompt for
    "completion" where there is a prompt; everything for "all"), each with the end-of-turn tokens that the template puts
    behind it. Turns with weight 0 are not.
    """
    template = ChatTemplate(tokenizer)
    turns = assistant_turns(messages)
    silent = [messages[at].get("weight") == 0 for at in turns]
    if train_on == "last_turn" and turns and turns[-1] >= first_trained:
        rendered = template.render_last(messages, tools)
        return _tokens(rendered.text, [] if silent[-1] else list(rendered.turns), tokenizer)
    if train_on == "all" and not any(silent):
        text = template.text(messages, tools)
        return _tokens(text, [(0, len(text))], tokenizer)
    rendered = template.render(messages, tools)
    spans = list(rendered.turns)
    if train_on == "all":
        return _tokens(rendered.text, _without(len(rendered.text), 0, spans, silent), tokenizer)
    if train_on == "completion" and first_trained:
        start = common_prefix(template.text(messages[:first_trained], tools, generation_prompt=True), rendered.text)
        return _tokens(rendered.text, _without(len(rendered.text), start, spans, silent), tokenizer)
    learned = [span for at, span, mute in zip(turns, spans, silent, strict=True) if at >= first_trained and not mute]
    return _tokens(rendered.text, learned, tokenizer)


def _without(length: int, start: int, spans: Sequence[Span], silent: Sequence[bool]) -> list[Span]:
    """Everything from `start` on but the spans of turns that are not to be learned."""
    kept = []
    for (begin, end), mute in zip(spans, silent, strict=True):
        if mute and end > start:
            kept.append((start, max(begin, start)))
            start = end
    return [*kept, (start, length)]


def _tokens(text: str, spans: Sequence[Span], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids of a rendered text, and labels where a token overlaps one of the spans (in order, apart)."""
    if not tokenizer.is_fast:
        return _tokens_by_prefix(text, spans, tokenizer)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = encoded["input_ids"]
    starts = [start for start, _ in encoded["offset_mapping"]]
    ends = [end for _, end in encoded["offset_mapping"]]
    labels = [IGNORE] * len(ids)
    for begin, end in spans:
        first, last = bisect_right(ends, begin), bisect_left(starts, end)
        labels[first:last] = ids[first:last]
    return ids, labels


def _tokens_by_prefix(text: str, spans: Sequence[Span], tokenizer: Any) -> tuple[list[int], list[int]]:
    """The same for a tokenizer that cannot say where its tokens stand: where the prefix's tokens part from the whole's."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    labels = [IGNORE] * len(ids)
    for begin, end in spans:
        first, last = (
            common_prefix(tokenizer(text[:at], add_special_tokens=False)["input_ids"], ids) for at in (begin, end)
        )
        labels[first:last] = ids[first:last]
    return ids, labels


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
