"""Texts with learned characters to token ids with learned tokens, many at once.

Three things keep it quick, and none changes a token. A tokenizer looks for its added tokens before all else, and what
stands between two of them is tokenised by itself; so a text is cut before each, and a piece that many texts share is
tokenised once: a conversation that needs a sample for every turn repeats its beginning in all of them. Most pieces are
put together from words that were seen before (`daemon.trainer.word_tokens`). And a tokenizer spends a quarter of its time
on saying where its tokens stand. Those of a byte-level vocabulary say it themselves: their bytes, put together, are the
piece, which is checked for each piece inside which something learned begins or ends.
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain
from typing import Any, TypeAlias

from tokenizers import decoders
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from daemon.trainer.chat import TextSample, common_prefix
from daemon.trainer.chat_template import Span
from daemon.trainer.word_tokens import WordTokens

Ids: TypeAlias = "array[int]"  # of 4 bytes each

_BYTES = {ord(shown): chr(byte) for byte, shown in bytes_to_unicode().items()}  # as byte-level vocabularies show them


@dataclass(frozen=True, slots=True)
class Sample:
    """One sequence that the model is trained on, and the spans of it that are learned: in order, apart, none empty."""

    ids: Ids  # (T,)
    learned: tuple[Span, ...]
    spells_special: bool = False  # a message holds the text of a special token, which is learned as text


class TextTokens:
    """Texts to samples, for one tokenizer, without the tokens that it puts around any text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.backend = backend_of(tokenizer)
        self._added = added_tokens(self.backend)
        self._bytes = TokenBytes(tokenizer) if self.backend and TokenBytes.may_fit(self.backend) else None
        self._words = WordTokens.of(self.backend, self._added)

    def samples(self, texts: Sequence[TextSample]) -> list[Sample]:
        """A sample of each text; a token is learned when it overlaps one of the text's learned spans."""
        if not self._tokenizer.is_fast:
            return [self._by_prefixes(text) for text in texts]
        cut = [cut_before(self._added, text.text) for text in texts]
        pieces = self._pieces(list(dict.fromkeys(chain.from_iterable(cut))))
        return [_join([pieces[part] for part in parts], text.learned) for text, parts in zip(texts, cut, strict=True)]

    def ids(self, text: str) -> Ids:
        """The tokens of one text."""
        return array("i", self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _pieces(self, texts: Sequence[str]) -> dict[str, _Piece]:
        if self.backend is None:
            return {text: _Piece(text, self.ids(text), self._encode, None) for text in texts}
        by_words = {text: self._words.ids(text) if self._words is not None else None for text in texts}
        others = [text for text, ids in by_words.items() if ids is None]
        found = self.backend.encode_batch_fast(others, add_special_tokens=False) if others else []
        rest = (array("i", encoding.ids) for encoding in found)
        return {
            text: _Piece(text, next(rest) if ids is None else ids, self._encode, self._bytes)
            for text, ids in by_words.items()
        }

    def _encode(self, text: str) -> Any:
        """A text's tokens with their places, which costs more."""
        if self.backend is not None:
            return self.backend.encode(text, add_special_tokens=False)
        return self._tokenizer(text, add_special_tokens=False).encodings[0]

    def _by_prefixes(self, text: TextSample) -> Sample:
        """For a tokenizer that cannot say it: where the tokens of the text up to a place part from the whole's."""
        ids = self.ids(text.text)
        ranges = (
            (common_prefix(self.ids(text.text[:begin]), ids), common_prefix(self.ids(text.text[:end]), ids))
            for begin, end in text.learned
        )
        return Sample(ids, apart(ranges))


class _Piece:
    """A piece of a text, and its tokens; where they stand is found when it is asked for."""

    def __init__(
        self, text: str, ids: Ids, encode: Callable[[str], Any], token_bytes: Mapping[int, bytes] | None
    ) -> None:
        self.text = text
        self.ids = ids
        self._encode = encode
        self._token_bytes = token_bytes

    def first(self, at: int) -> int:
        """The first token that ends behind a character."""
        if self._byte_ends is not None:
            return bisect_right(self._byte_ends, self._bytes_before(at))
        token: int | None = self._encoding.char_to_token(at)
        if token is None:  # the tokenizer makes nothing of the character
            return bisect_right([end for _, end in self._encoding.offsets], at)
        return token

    def behind(self, at: int) -> int:
        """The token behind the last that begins before a character."""
        if at == len(self.text):
            return len(self.ids)
        if self._byte_ends is not None:
            return bisect_left(self._byte_ends, self._bytes_before(at)) + 1
        token: int | None = self._encoding.char_to_token(at)
        if token is None:
            return bisect_left([begin for begin, _ in self._encoding.offsets], at)
        return token + int(self._encoding.token_to_chars(token)[0] < at)

    @cached_property
    def _byte_ends(self) -> list[int] | None:
        """Where each token ends; None unless the bytes that they stand for are those of the text."""
        if self._token_bytes is None:
            return None
        found = list(map(self._token_bytes.__getitem__, self.ids))
        return list(accumulate(map(len, found))) if b"".join(found) == self.text.encode() else None

    def _bytes_before(self, at: int) -> int:
        return at if self.text.isascii() else len(self.text[:at].encode())

    @cached_property
    def _encoding(self) -> Any:
        """Asked for single places, which is many times as fast as to fetch every token's."""
        return self._encode(self.text)


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


def backend_of(tokenizer: Any) -> Any:
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


def added_tokens(backend: Any) -> re.Pattern[str] | None:
    """What finds the added tokens before which a text may be cut; None where a cut could change its tokens.

    The tokenizer takes the leftmost one, and of several there the longest, as the pattern does. Those that are looked for
    after normalisation have no say: that begins behind this step. One that takes white space before it along, or asks
    whether a word goes on there, would look past a cut.
    """
    if backend is None or backend.encode_special_tokens:
        return None
    added = [token for token in backend.get_added_tokens_decoder().values() if not token.normalized]
    if not added or any(token.lstrip or token.single_word or token.content[:1].isspace() for token in added):
        return None
    names = sorted((token.content for token in added), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)))


def cut_before(added: re.Pattern[str] | None, text: str) -> list[str]:
    """A text in pieces, of which each but the first begins with an added token."""
    if added is None:
        return [text] if text else []
    places = [found.start() for found in added.finditer(text)]
    return [text[begin:end] for begin, end in zip([0, *places], [*places, len(text)], strict=True) if begin < end]


def apart(spans: Iterable[Span]) -> tuple[Span, ...]:
    """Spans in order without the empty ones; those that overlap or touch become one."""
    found: list[Span] = []
    for begin, end in spans:
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        elif begin < end:
            found.append((begin, end))
    return tuple(found)


def overlapping(places: Sequence[Span], span: Span) -> Span:
    """Of tokens at these places the first that overlaps a span, and the one behind the last."""
    return bisect_right([end for _, end in places], span[0]), bisect_left([begin for begin, _ in places], span[1])


def _join(pieces: Sequence[_Piece], spans: Iterable[Span]) -> Sample:
    """The sample of a text that was cut into these pieces; `spans` are characters of it."""
    ids: Ids = array("i")
    tokens: list[int] = []  # before each piece
    ends: list[int] = []  # of each piece, in characters
    end = 0
    for piece in pieces:
        tokens.append(len(ids))
        ids.extend(piece.ids)
        end += len(piece.text)
        ends.append(end)
    ranges = []
    for begin, end in spans:
        if begin < end:
            one, other = bisect_right(ends, begin), bisect_left(ends, end)
            first = pieces[one].first(begin - ends[one] + len(pieces[one].text))
            behind = pieces[other].behind(end - ends[other] + len(pieces[other].text))
            ranges.append((tokens[one] + first, tokens[other] + behind))
    return Sample(ids, apart(ranges))
