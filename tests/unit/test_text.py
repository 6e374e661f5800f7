"""Untrusted text: no name can forge a line, a colour, or the direction of what follows."""

from __future__ import annotations

import codecs
import os
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.text import escape, plain_characters, printable


@given(st.text(max_size=100).map(lambda text: text + "\x1b[31m\n\u202e"))
def test_nothing_that_a_terminal_interprets_is_left(text: str) -> None:
    assert all(unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in escape(text, most=10_000))


def test_what_is_replaced_stays_readable() -> None:
    assert escape(os.fsdecode(b"caf\xe9\n\t.jsonl")) == "caf\\xe9\\n\\t.jsonl"
    assert escape("Ærøskøbing 数据.jsonl") == "Ærøskøbing 数据.jsonl"


@given(st.text(max_size=100).map(lambda text: text + "\x1b[31m\n\u202e"))
def test_what_was_escaped_once_is_shown_as_it_is_and_everything_else_is_made_safe(text: str) -> None:
    once = escape(text, most=10_000)
    assert printable(once, most=10_000) == once
    assert all(unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in printable(text, most=10_000))


def test_different_texts_are_shown_differently() -> None:
    assert escape("a\nb") != escape("a\\nb")


def test_long_text_is_cut() -> None:
    assert len(escape("x" * 5000)) == 200


def test_a_terminal_without_an_arrow_gets_two_characters_and_an_escape_for_all_else() -> None:
    codecs.register_error("plain", plain_characters)
    assert "a → \u00e9 \udc80 \U0001f600".encode("ascii", "plain") == rb"a -> \xe9 \udc80 \U0001f600"
    with pytest.raises(UnicodeDecodeError):
        b"\xff".decode("utf-8", "plain")
