"""A tokenizer's special tokens: the chat template writes them, a conversation's strings never do.

Whoever types `<|im_end|>` into a message has typed ten characters. Tokenised with the rendering as a whole they would
become the token that ends a turn, and rows could forge turns of other roles, which only the template may write. So they
are marked before the conversation is rendered, and what is marked is tokenised as text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, TypeVar

from daemon.job import FailureKind
from daemon.trainer.chat_template import special_strings
from daemon.trainer.errors import RunFailure

# Noncharacters: Unicode keeps them for a program's own use inside itself.
_BEGIN, _END = "\ufdd0", "\ufdd1"
_LONE = re.compile(f"[{_BEGIN}{_END}]")
_NOTHING = "(?!)"

Value = TypeVar("Value")
Token = tuple[int, int, int]  # id, and the characters that it stands for: begin, end


class SpecialTokens:
    """The special tokens of one tokenizer, as strings to look for, and how they are spelled in plain tokens.

    Only a tokenizer that says where its tokens stand (`is_fast`) can spell them.
    """

    def __init__(self, tokenizer: Any) -> None:
        names = "|".join(map(re.escape, special_strings(tokenizer))) or _NOTHING
        self._tokenizer = tokenizer
        self._names = re.compile(names)
        self._marked = re.compile(f"{_BEGIN}({names}){_END}|[{_BEGIN}{_END}]")

    def found_in(self, value: Any) -> bool:
        """Whether a string anywhere in messages or tools holds one."""
        if isinstance(value, str):
            return self._names.search(value) is not None
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        for item in inner:
            if isinstance(item, str):  # searched here: a call for each would take as long
                if self._names.search(item) is not None:
                    return True
            elif self.found_in(item):
                return True
        return False

    def mark(self, value: Value) -> Value:
        """A copy of messages or tools in which every special token stands between marks."""
        if isinstance(value, str):
            return self._names.sub(f"{_BEGIN}\\g<0>{_END}", _LONE.sub("", value))  # type: ignore[return-value]
        if isinstance(value, dict):
            return {key: self.mark(item) for key, item in value.items()}  # type: ignore[return-value]
        if isinstance(value, list):
            return [self.mark(item) for item in value]  # type: ignore[return-value]
        return value

    def tokens(self, text: str) -> list[Token]:
        """The tokens of a rendering with marks, which themselves give none; characters are counted with the marks.

        Raises RunFailure(BAD_DATA) for a tokenizer whose plain text yields the special token itself.
        """
        found: list[Token] = []
        begin = 0
        for mark in self._marked.finditer(text):
            found += self._plain(text[begin : mark.start()], begin)
            if name := mark.group(1):
                ids = self._spelled(name)
                if self._tokenizer.convert_tokens_to_ids(name) in ids:
                    raise RunFailure(
                        FailureKind.BAD_DATA,
                        f"a message holds the special token {name!r}, which this tokenizer cannot spell as text",
                        hint="take it out of the row",
                    )
                found += [(token, mark.start(1), mark.end(1)) for token in ids]
            begin = mark.end()
        return found + self._plain(text[begin:], begin)

    def _plain(self, piece: str, begin: int) -> list[Token]:
        """A piece's tokens as in the middle of a text: where tokenizers put a space before a beginning, not here."""
        if not piece:
            return []
        newline = self._ids("\n")
        if begin and self._ids("\n" + piece)[: len(newline)] == newline:
            return [
                (token, begin + max(first - 1, 0), begin + last - 1)
                for token, first, last in self._with_offsets("\n" + piece)[len(newline) :]
            ]
        return [(token, begin + first, begin + last) for token, first, last in self._with_offsets(piece)]

    def _spelled(self, name: str) -> list[int]:
        """A special token's name in tokens of plain text, as in the middle of a text."""
        newline, ids = self._as_text("\n"), self._as_text("\n" + name)
        return ids[len(newline) :] if ids[: len(newline)] == newline else self._as_text(name)

    def _as_text(self, text: str) -> list[int]:
        backend = self._tokenizer.backend_tokenizer  # its own steps, without the one that looks for added tokens
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        words: Sequence[tuple[str, Any]] = [(text, None)]
        if backend.pre_tokenizer is not None:
            words = backend.pre_tokenizer.pre_tokenize_str(text)
        return [token.id for word, _ in words for token in backend.model.tokenize(word)]

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _with_offsets(self, text: str) -> list[Token]:
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return [(token, *place) for token, place in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)]
