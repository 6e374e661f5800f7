"""A row's identity is what it says: not how it is written, in which format, or under which settings."""

from __future__ import annotations

import json
from typing import Any

import pytest

from daemon.dataset.rows import Format, Rules, check_row, identity_of

ASKED, ANSWERED = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4."}
MESSAGES = {"messages": [ASKED, ANSWERED]}


def digest(row: dict[str, Any] | bytes, format_: Format = Format.MESSAGES, **rules: Any) -> str:
    line = row if isinstance(row, bytes) else json.dumps(row).encode()
    return identity_of(check_row(line, format_, Rules(**rules))).digest


@pytest.mark.parametrize(
    ("row", "format_", "rules"),
    [
        (b'{ "messages" : [ {"content":"2 + 2?", "role":"user"},{"content":"4.","role":"assistant"} ] }', "messages", {}),
        (b'{"messages":[{"role":"user","content":"2 \\u002b 2?"},{"role":"assistant","content":"4."}]}\r', "messages", {}),
        ({"id": 7, "source": "web", **MESSAGES}, "messages", {}),
        ({"messages": [{**ASKED, "weight": 0}, {**ANSWERED, "weight": 1}]}, "messages", {}),
        ({"messages": [ASKED, {**ANSWERED, "content": "4.\n"}]}, "messages", {}),
        ({"prompt": [ASKED], "completion": [ANSWERED]}, "prompt_completion", {}),
        ({"prompt": "2 + 2?", "completion": "4."}, "prompt_completion", {}),
        ({"prompt": "2 + 2? ", "completion": " 4."}, "prompt_completion", {"prompt_completion": "chat"}),
        ({"instruction": "2 + 2?", "input": "", "output": "4."}, "alpaca", {}),
        ({"query": "2 + 2?", "response": "4."}, "query_response", {}),
        ({"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4."}]}, "sharegpt", {}),
    ],
)  # fmt: skip
def test_however_it_is_written_it_is_the_same_row(row: Any, format_: str, rules: dict[str, Any]) -> None:
    assert digest(row, Format(format_), **rules) == digest(MESSAGES)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASKED, {**ANSWERED, "content": "5."}]},
        {"messages": [{**ASKED, "content": "2 + 3?"}, ANSWERED]},
        {"messages": [{"role": "system", "content": "Be brief."}, ASKED, ANSWERED]},
        {"messages": [ASKED, ANSWERED, ASKED, ANSWERED]},
        {"messages": [ASKED, {**ANSWERED, "reasoning_content": "easy"}]},
        {**MESSAGES, "tools": [{"type": "function", "function": {"name": "add"}}]},
    ],
)
def test_what_says_something_else_is_another_row(row: dict[str, Any]) -> None:
    assert digest(row) != digest(MESSAGES)


def test_composed_and_decomposed_letters_are_the_same() -> None:
    assert digest({"text": "é"}, Format.TEXT) == digest({"text": "e\u0301 "}, Format.TEXT)


def test_rows_that_answer_the_same_question_have_one_prompt_and_texts_have_none() -> None:
    def prompt(row: dict[str, Any], format_: Format) -> str:
        return identity_of(check_row(json.dumps(row).encode(), format_, Rules())).prompt

    asked = prompt(MESSAGES, Format.MESSAGES)
    assert asked == prompt({"prompt": "2 + 2?", "completion": "Five."}, Format.PROMPT_COMPLETION) != ""
    assert asked != prompt({"prompt": "2 + 3?", "completion": "4."}, Format.PROMPT_COMPLETION)
    assert (
        prompt({"text": "2 + 2? 4."}, Format.TEXT)
        == prompt({"prompt": "", "completion": "x"}, Format("prompt_completion"))
        == ""
    )
