"""The typed decoder takes a row only if the exact check takes it too, and both scan to the same verdict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.dataset import scan_dataset
from daemon.dataset.fast_path import MAX_EXTRA_KEYS, NOT_TAKEN, RowDecoder
from daemon.dataset.rows import Columns, Format, Rules, check_row
from daemon.dataset.scan import LineScanner
from daemon.dataset.strict_json import LineError
from daemon.recipe import DataSettings
from tests.unit.test_rows_formats import BAD, GOOD
from tests.unit.test_rows_strict_json import HOSTILE

COLUMNS = Columns(prompt="q", completion="a")
EVERY_LINE = [json.dumps(value).encode() for _, value, _ in GOOD] + [case.values[1] for case in BAD]
HOSTILE_LINES = [case.values[0] for case in HOSTILE if len(case.values[0]) < 10_000]

scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8)
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=8
)  # fmt: skip
keys = st.sampled_from(
    ["role", "content", "name", "weight", "tool_calls", "reasoning_content", "from", "value", "text", "type", "x", "input_ids"]
)  # fmt: skip
pieces = st.sampled_from(
    ["user", "assistant", "tool", "human", "gpt", "function_call", "text", "", "{}", "\ud83d\ude00"]
)
messages = st.lists(st.dictionaries(keys, pieces | values, max_size=4), max_size=3)
rows = st.dictionaries(
    st.sampled_from(
        ["messages", "conversations", "prompt", "completion", "text", "instruction", "input", "output", "tools", "system",
         "q", "a", "meta", "labels", "class", "_x", "x y"]
    ),
    pieces | values | messages,
    max_size=5,
)  # fmt: skip


def exact(line: bytes, format_: Format) -> bool:
    try:
        check_row(line, format_, COLUMNS)
    except LineError:
        return False
    return True


def taught(format_: Format, lines: list[bytes]) -> RowDecoder:
    """A decoder that has seen these lines, and learned what keys they have."""
    decoder = RowDecoder(format_, COLUMNS)
    for line in lines:
        try:
            decoder.examine(line)
        except LineError:
            continue
    return decoder


def takes(decoder: RowDecoder, line: bytes) -> bool:
    try:
        decoder.decode(line)
    except NOT_TAKEN:
        return False
    return True


@pytest.mark.parametrize("format_", list(Format))
def test_no_line_of_the_tables_is_taken_that_the_exact_check_refuses(format_: Format) -> None:
    """Hostile lines and bad rows, before and after the decoder has learned extra keys."""
    lines = EVERY_LINE + HOSTILE_LINES
    decoder = taught(format_, lines)
    assert not [line for line in lines if takes(decoder, line) and not exact(line, format_)]


@given(st.sampled_from(list(Format)), st.lists(rows, min_size=1, max_size=6))
@settings(max_examples=400, deadline=None)
def test_no_generated_row_is_taken_that_the_exact_check_refuses(format_: Format, found: list[dict[str, Any]]) -> None:
    """Whatever keys and values stand where."""
    lines = [json.dumps(row).encode() for row in found]
    decoder = taught(format_, lines)
    for line in lines:
        assert not takes(decoder, line) or exact(line, format_), line


@given(
    st.sampled_from(EVERY_LINE), st.integers(0, 500), st.binary(min_size=1, max_size=3), st.sampled_from(list(Format))
)
@settings(max_examples=400, deadline=None)
def test_no_damaged_row_is_taken_that_the_exact_check_refuses(
    line: bytes, at: int, junk: bytes, format_: Format
) -> None:
    """One to three bytes overwritten anywhere: invalid UTF-8, stray quotes, control characters, cut escapes."""
    at %= len(line)
    damaged = (line[:at] + junk + line[at + len(junk) :]).replace(b"\n", b" ")
    assert not takes(taught(format_, [line]), damaged) or exact(damaged, format_), damaged


@given(st.sampled_from(list(Format)), st.lists(rows, min_size=1, max_size=8))
@settings(max_examples=200, deadline=None)
def test_the_scanner_finds_exactly_the_bad_lines(format_: Format, found: list[dict[str, Any]]) -> None:
    """Block by block in C, it names the same lines as one exact check a line."""
    lines = [json.dumps(row).encode() for row in found]
    tally = LineScanner(format_, Rules(columns=COLUMNS, on_bad_rows="skip")).scan([b"\n".join(lines)])
    good = tally.finish()
    bad = [number for number, line in enumerate(lines, 1) if not exact(line, format_)]
    assert tally.bad_lines == bad
    assert good == len(lines) - len(bad)


def test_common_rows_are_taken_after_one_look() -> None:
    """The quick path is really used: a row with unknown keys is looked at once, the next one like it is taken."""
    for format_, value, _ in GOOD:
        row = json.dumps({**value, "id": "a", "meta": {"tags": ["x"], "score": 0.5}}).encode()
        decoder = RowDecoder(format_, COLUMNS)
        assert not takes(decoder, row)
        decoder.examine(row)
        if "tool_calls" not in str(value) and "tools" not in value and not isinstance(value.get("prompt"), list):
            assert takes(decoder, row), value


def test_a_decoder_learns_only_so_many_keys() -> None:
    """A file whose rows all have other keys stays correct, and its decoder small."""
    decoder = RowDecoder(Format.TEXT, COLUMNS)
    for number in range(MAX_EXTRA_KEYS * 3):
        decoder.examine(json.dumps({"text": "t", f"key{number}": 1}).encode())
    assert not takes(decoder, json.dumps({"text": "t", f"key{MAX_EXTRA_KEYS * 2}": 1}).encode())
    assert takes(decoder, b'{"text": "t", "key1": 1}')


def test_what_typed_decoding_skips_elsewhere_is_refused_here(tmp_path: Path) -> None:
    """A bare typed decode passes over bad bytes in fields that it does not name; this one has no such fields."""
    line = b'{"text": "ok", "unread": "\xff"}'

    class Bare(msgspec.Struct):
        text: str

    assert msgspec.json.decode(line, type=Bare).text == "ok"
    decoder = taught(Format.TEXT, [b'{"text": "ok", "unread": "fine"}'])
    assert takes(decoder, b'{"text": "ok", "unread": "fine"}')
    assert not takes(decoder, line)


@pytest.mark.parametrize("key", ["\x1f", '"', "\\", "a\nb", "\x00"])
def test_a_key_that_has_to_be_escaped_is_read_the_exact_way(tmp_path: Path, key: str) -> None:
    """Such a key, first seen beside good ones, must not end the pass."""
    path = tmp_path / "odd.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {n}", key: n, "other": {key: None}}) + "\n" for n in range(200)))
    found = scan_dataset(path, DataSettings())
    assert found.dataset.rows == 200
