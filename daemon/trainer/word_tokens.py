"""The tokens of texts word by word, where a tokenizer can be shown to work so.

A byte-level BPE tokenizer cuts a text into words with patterns, and what a word becomes depends on the word alone. So a word
is asked for once, in the tokenizer's own model, and remembered; cutting costs a third of what the library's way does.

The patterns are the tokenizer's own, rewritten for Python's `re`. Two engines agree in what a letter is only as far as their
tables of Unicode do, so this is for texts in characters of settled kinds (all of ASCII and Latin-1, and punctuation), whose
classes are spelled out one by one; every other text, tokenizer and pattern goes the library's way. What is rewritten is
compared with the library on all of these characters before it is used.
"""

from __future__ import annotations

import json
import re
import unicodedata
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import models, normalizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

# None of these is changed by NFC, and none of them and those of a pattern are one another's capitals but in ASCII.
_ALPHABET = tuple(map(chr, (*range(0x100), *range(0x2010, 0x2028), *range(0x2030, 0x205F))))
_SPACES = frozenset("\t\n\v\f\r \x85\xa0")  # Unicode's White_Space; `str.isspace` has more
_MAX_WORDS, _MAX_WORD_CHARS = 100_000, 64  # that are remembered: about 20 MB

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # ByteLevel's own
_SHOWN: Mapping[int, str] = bytes_to_unicode()  # how the vocabulary spells a byte
# What patterns may be made of. Here engines differ in nothing but their classes: no captures, no anchors, no looking back.
_IN_PATTERN = re.compile(
    r"""(?P<property>\\p\{(?P<category>[A-Z][a-z]?)\})
    |(?P<space>\\s)|(?P<other>\\S)
    |(?P<set>\[(?P<negated>\^?)(?P<members>(?:[^\[\]\\]|\\.)+)\])
    |(?P<kept>\(\?i:(?:[a-z'|]|\[[a-z]+\])+\)|\(\?[:!]|[)|]|\\[rnt]|\\[^\w\s]|[\w '/\r\n"<>=,;:@#%&!~`-]
        |(?:[?*+]\+?|\{\d+(?:,\d*)?\})(?![?*+{]))""",
    re.VERBOSE | re.DOTALL,
)
_IN_SET = re.compile(
    r"(?P<property>\\p\{(?P<category>[A-Z][a-z]?)\})|(?P<space>\\s)|(?P<escape>\\(?:[rnt]|[^\w\s]))"
    r"|(?P<first>[^\\])(?:-(?P<last>[^\\]))?",
    re.DOTALL,
)
_ESCAPES = {"r": "\r", "n": "\n", "t": "\t"}


class WordTokens:
    """Tokens of pieces of text, which begin with an added token or hold none."""

    def __init__(self, backend: Any, added: re.Pattern[str], stages: tuple[_Stage, ...]) -> None:
        names = backend.get_added_tokens_decoder()
        self._added = added
        self._added_ids = {token.content: array("i", [id_]).tobytes() for id_, token in names.items()}
        self._stages = stages
        self._may_drop = any(stage.drops for stage in stages)
        self._words = _Words(backend.model)

    @classmethod
    def of(cls, backend: Any, added: re.Pattern[str] | None) -> WordTokens | None:
        """For a tokenizer whose texts are cut before its `added` tokens; None where it may not work word by word."""
        if backend is None or added is None or not _has_plain_parts(backend):
            return None
        try:
            description = json.loads(backend.pre_tokenizer.__getstate__())
        except Exception:  # the library's own kind of error: one of its steps is a program, which has no description
            return None
        stages = _stages_of(description)
        if stages is None:
            return None
        found = cls(backend, added, stages)
        probe = _probe()
        try:
            ids = found.ids(probe)
        except UnknownWord:  # its vocabulary lacks some bytes
            return None
        return found if ids is not None and list(ids) == backend.encode(probe, add_special_tokens=False).ids else None

    def ids(self, text: str) -> array[int] | None:
        """The tokens of a piece; None for one that the library has to be asked about."""
        if not text.isascii() and _FOREIGN.search(text):
            return None
        begun = b""
        if name := self._added.match(text):
            begun, text = self._added_ids[name.group()], text[name.end() :]
        words = self._stages[0].cut(text) if self._stages else [text]
        for stage in self._stages[1:]:
            words = [part for word in words for part in stage.cut(word)]
        if self._may_drop and "".join(words) != text:
            return None
        try:
            return array("i", begun + b"".join(map(self._words.__getitem__, words)))
        except UnknownWord:
            return None


class UnknownWord(Exception):
    """A word whose tokens do not spell it."""


class _Words(dict[str, bytes]):
    """The tokens of words, as bytes of an array; found when they are asked for."""

    def __init__(self, model: Any) -> None:
        super().__init__({"": b""})
        self._model = model

    def __missing__(self, word: str) -> bytes:
        shown = "".join(map(_SHOWN.__getitem__, word.encode()))
        tokens = self._model.tokenize(shown)
        if "".join(token.value for token in tokens) != shown:
            raise UnknownWord
        found = array("i", [token.id for token in tokens]).tobytes()
        if len(word) <= _MAX_WORD_CHARS:
            if len(self) >= _MAX_WORDS:
                self.clear()
                self[""] = b""
            self[word] = found
        return found


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """One of the steps that cut a text into words, of which some may be empty."""

    cut: Callable[[str], list[str]]
    drops: bool = False  # what lies between the matches of its pattern


def _has_plain_parts(backend: Any) -> bool:
    """Whether nothing but the cutting and the words themselves has a say in the tokens."""
    model = backend.model
    if type(model) is not models.BPE or model.dropout or model.continuing_subword_prefix or model.end_of_word_suffix:
        return False
    if backend.normalizer is not None and type(backend.normalizer) is not normalizers.NFC:
        return False
    if backend.pre_tokenizer is None:
        return False
    return not any(token.normalized or token.rstrip for token in backend.get_added_tokens_decoder().values())


def _stages_of(pre_tokenizer: Mapping[str, Any]) -> tuple[_Stage, ...] | None:
    """The steps of a pre-tokenizer that ends with the byte-level one; None where one is of another kind."""
    parts = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    if not parts or parts[-1]["type"] != "ByteLevel" or parts[-1]["add_prefix_space"]:
        return None
    stages = [_stage_of(part) for part in parts[:-1]]
    if parts[-1]["use_regex"]:
        stages.append(_stage(_GPT2))
    return tuple(stage for stage in stages if stage is not None) if all(stages) else None


def _stage_of(part: Mapping[str, Any]) -> _Stage | None:
    if part["type"] == "Digits":
        return _stage(r"\p{N}" if part["individual_digits"] else r"\p{N}+")
    if part["type"] != "Split" or "Regex" not in part["pattern"]:
        return None
    drops: bool | None = {("Isolated", False): False, ("Removed", True): True}.get((part["behavior"], part["invert"]))
    return None if drops is None else _stage(part["pattern"]["Regex"], drops=drops)


def _stage(pattern: str, *, drops: bool = False) -> _Stage | None:
    rewritten = rewrite(pattern)
    if rewritten is None:
        return None
    try:
        compiled = re.compile(f"({rewritten})")
    except re.error:
        return None
    if compiled.groups != 1 or compiled.match(""):
        return None
    return _Stage(cut=compiled.findall if drops else compiled.split, drops=drops)


def rewrite(pattern: str) -> str | None:
    """A tokenizer's pattern for Python's `re` and texts of settled characters; None where it may mean something else."""
    found: list[str] = []
    at = 0
    while at < len(pattern):
        token = _IN_PATTERN.match(pattern, at)
        if token is None:
            return None
        at = token.end()
        if token["kept"] is not None:
            found.append(token["kept"])
            continue
        members = token["members"] if token["set"] is not None else token.group()
        negated = bool(token["negated"]) or token["other"] is not None
        characters = _members(r"\s" if token["other"] is not None else members)
        if characters is None:
            return None
        found.append(_spelled(negated=negated, characters=characters))
    return "".join(found)


def _members(text: str) -> frozenset[str] | None:
    """The settled characters of a set; None where it may mean something else."""
    found: set[str] = set()
    at = 0
    while at < len(text):
        item = _IN_SET.match(text, at)
        is_dash = text[at] == "-" and 0 < at < len(text) - 1  # a range in some engines and a character in others
        if item is None or is_dash or text.startswith("&&", at):
            return None
        at = item.end()
        if item["category"] is not None:
            found.update(one for one in _ALPHABET if unicodedata.category(one).startswith(item["category"]))
        elif item["space"] is not None:
            found |= _SPACES
        elif item["escape"] is not None:
            found.add(_ESCAPES.get(item["escape"][1], item["escape"][1]))
        else:
            first, last = item["first"], item["last"] or item["first"]
            found.update(one for one in _ALPHABET if first <= one <= last)
    return frozenset(found)


def _spelled(*, negated: bool, characters: frozenset[str]) -> str:
    """A set of characters for `re`, in ranges; what it holds beyond the settled ones never meets a text."""
    ranges = list(_ranges(sorted(map(ord, characters)))) or ["\\U0010ffff"]
    return f"[{'^' if negated else ''}{''.join(ranges)}]"


def _ranges(codes: list[int]) -> Iterator[str]:
    begin = 0
    for at, code in enumerate(codes):
        if at + 1 == len(codes) or codes[at + 1] != code + 1:
            yield f"\\u{codes[begin]:04x}-\\u{code:04x}"
            begin = at + 1


_FOREIGN = re.compile(_spelled(negated=True, characters=frozenset(_ALPHABET)))


def _probe() -> str:
    """All settled characters beside letters, digits, spaces, line ends and one another."""
    around = "".join(f"{one}a {one}1{one}{one}\n a{one}  {one}" for one in _ALPHABET)
    return f"{around} don't  DON'T\r\n  x \t\n 123456789 it's-we'Ve"
