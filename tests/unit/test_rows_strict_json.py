"""Strict JSON, line by line: what others accept or die of is an error with a column here."""

from __future__ import annotations

import pytest

from daemon.dataset.strict_json import MAX_DEPTH, LineError, column_of, excerpt, parse_object

HOSTILE = [
    pytest.param(b'{"text": NaN}', 10, "NaN", id="nan"),
    pytest.param(b'{"text": "NaN", "x": -Infinity}', 22, "-Infinity", id="infinity_after_a_string_that_says_nan"),
    pytest.param(b'{"text": "\\ud800"}', 11, "half of a surrogate pair", id="lone_high_surrogate"),
    pytest.param(b'{"text": "a\\udc00"}', 12, "half of a surrogate pair", id="lone_low_surrogate"),
    pytest.param(b'{"text": "\\ud83d\\ud83d\\ude00"}', 11, "half of a surrogate pair", id="high_before_a_pair"),
    pytest.param(b'{"x": {"\\udc00": 1}}', 9, "half of a surrogate pair", id="surrogate_in_a_key"),
    pytest.param(b'{"text": "a\xffb"}', 12, "byte 0xff is not UTF-8", id="bad_utf8"),
    pytest.param('{"ä": "'.encode() + b'\xff"}', 8, "byte 0xff", id="columns_count_characters"),
    pytest.param(b'{"text": "ok", "nobody reads": "\xed\xa0\x80"}', 33, "byte 0xed", id="encoded_surrogate_unread"),
    pytest.param(b'{"text": "a\x00b"}', 12, "NUL", id="nul"),
    pytest.param(b"\x00\x00\x00", 1, "NUL", id="a_tail_of_nul"),
    pytest.param(b'{"text": "a\x07b"}', 12, "control character U+0007", id="control_character"),
    pytest.param(b'{"text": "a\tb"}', 12, "control character", id="raw_tab_in_a_string"),
    pytest.param(b'{"x": ' + b"[" * 100_000, 6 + MAX_DEPTH, "nested deeper", id="deep_and_open"),
    pytest.param(b'{"x": ' + b"[" * 200 + b"]" * 200 + b"}", 6 + MAX_DEPTH, "nested deeper", id="deep_and_closed"),
    pytest.param(b'{"text": "a"} {"text": "b"}', 15, "a second value on the same line", id="two_on_a_line"),
    pytest.param(b'{"text": "a"} oops', 15, "more text after the object", id="text_after"),
    pytest.param(b'[{"text": "a"},', 16, "ends inside", id="first_line_of_an_array"),
    pytest.param(b'["a"]', 1, "expected an object, found an array", id="array"),
    pytest.param(b"{", 2, "the line ends inside", id="first_line_of_a_pretty_object"),
    pytest.param(b'{"text": "a"', 13, "ends inside", id="cut_short"),
    pytest.param(b'{"x": 1e400}', 7, "out of range", id="float_out_of_range"),
    pytest.param(b'{"x": ' + b"9" * 5000 + b"}", 7, "5000 digits", id="integer_of_5000_digits"),
    pytest.param(b'{"x": "1e400", "y": 1e999}', 21, "out of range", id="number_in_a_string_is_no_number"),
    pytest.param(b"\xef\xbb\xbf{}", 1, "byte order mark inside", id="bom_inside"),
    pytest.param(b'{"x": 01}', 8, "a number that begins with 0", id="leading_zero"),
    pytest.param(b"{'x': 1}", 2, "single quotes", id="single_quotes"),
    pytest.param(b'{"x": 1,}', 8, "a comma with nothing behind it", id="trailing_comma"),
    pytest.param(b'{"text": "\\x41"}', 11, "escape", id="bad_escape"),
]


@pytest.mark.parametrize(("line", "column", "reason"), HOSTILE)
def test_a_hostile_line_is_named_by_column_and_reason(line: bytes, column: int, reason: str) -> None:
    """Never an exception of the parser's own, never a crash."""
    with pytest.raises(LineError) as caught:
        parse_object(line)
    assert reason in caught.value.reason
    assert caught.value.column == column


@pytest.mark.parametrize(
    "line",
    [
        b'{"text": "\\ud83d\\ude00"}',
        b'{"text": "\\\\ud800"}',  # an escaped backslash, then plain letters
        '{"text": "\u2028 \u0085 \ufeff"}'.encode(),
        b'{"text": "\\u0000"}',
        b' {"text" :\t"a"}\r\n',
        b'{"x": ' + b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1) + b"}",
        b'{"x": "' + b"[" * 1000 + b'"}',
    ],
)
def test_odd_but_sound_lines_are_taken(line: bytes) -> None:
    """Strict is not narrow."""
    assert isinstance(parse_object(line), dict)


def test_the_column_is_that_of_the_value_or_of_what_lacks_it() -> None:
    """Down a path of keys and places."""
    line = b'{"a": 1, "b": {"c": [0, 5]}}'
    assert column_of(line, ("a",)) == 7
    assert column_of(line, ("b", "c", 1)) == 25
    assert column_of(line, ("b", "missing")) == 15


@pytest.mark.parametrize(
    ("line", "column"),
    [
        (b'{"a": 1, "b": {"c": [0, 5]}, "a": 2}', 30),
        (b'{"a": {"x": 1, "\\u0078": 1}}', 16),
        (b'{"a": [{"x": 1}, {"x": "\\": {"}, {"y": 1, "z": {"y": 1}, "y" : 2}]}', 58),
    ],
)
def test_a_key_that_stands_twice_in_one_object_is_named(line: bytes, column: int) -> None:
    """One of its values would vanish, and parsers differ in which; the same key in other objects is another one."""
    with pytest.raises(LineError, match="for the second time") as caught:
        parse_object(line)
    assert caught.value.column == column


def test_an_excerpt_is_short_and_holds_nothing_that_a_terminal_would_obey() -> None:
    """Escapes, whatever the line holds, around the column."""
    line = b"x" * 500 + b"\x1b[31m\xff\xe2\x80\xae" + b"y" * 500
    shown = excerpt(line, 505)
    assert "\\x1b[31m" in shown
    assert shown.isprintable()
    assert len(shown) < 100
    assert shown.startswith("…")
    assert shown.endswith("…")


@pytest.mark.parametrize("before", ['"\\\\"', '"\\""', '"\\\\\\""', '"[[{"', '"\\u005b]"', "1"])
@pytest.mark.parametrize(("levels", "sound"), [(MAX_DEPTH - 1, True), (MAX_DEPTH, False), (100_000, False)])
def test_depth_is_counted_past_strings_that_hold_quotes_and_brackets(before: str, levels: int, sound: bool) -> None:
    """An unlimited depth would end the process; one level too many is named."""
    line = f'{{"s": {before}, "x": {"[" * levels}{"]" * levels}, "y": []}}'.encode()
    if sound:
        assert len(parse_object(line)["x"]) == 1
        return
    with pytest.raises(LineError, match="nested deeper") as caught:
        parse_object(line)
    assert line.decode()[caught.value.column - 1] == "["
