"""The formats: what a row of each may hold, what it becomes, and where a bad one is bad."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from daemon.dataset.rows import Columns, Format, Rules, check_row, detect_format, iter_rows
from daemon.dataset.strict_json import LineError
from daemon.recipe import DataSettings

GSM8K = Path(__file__).parent.parent / "data" / "gsm8k" / "train_head.jsonl"
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "ho"}


def line(value: object) -> bytes:
    return json.dumps(value).encode()


def chat(*messages: object, **more: object) -> bytes:
    return line({"messages": messages, **more})


GOOD = [
    (Format.MESSAGES, {"messages": [USER, ANSWER]}, "messages"),
    (Format.MESSAGES, {"messages": [{"role": "developer", "content": "d"}, USER, {**ANSWER, "weight": 0}]}, "messages"),
    (Format.MESSAGES, {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}, "messages"),
    (Format.MESSAGES, {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}], "tools": [TOOL]}, "messages"),
    (Format.MESSAGES, {"messages": [{**USER, "name": "bob"}, {**ANSWER, "content": None, "tool_calls": [CALL]}]}, "messages"),
    (Format.PROMPT_COMPLETION, {"prompt": "p", "completion": "c"}, "prompt_completion"),
    (Format.PROMPT_COMPLETION, {"prompt": [USER], "completion": [ANSWER], "tools": [TOOL]}, "prompt_completion"),
    (Format.TEXT, {"text": "t", "meta": {"a": [1, None]}}, "text"),
    (Format.ALPACA, {"instruction": "i", "input": "", "output": "o"}, "messages"),
    (Format.SHAREGPT, {"conversations": [{"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}]}, "messages"),
    (Format.COLUMNS, {"q": "a", "a": "b", "n": 3}, "prompt_completion"),
]  # fmt: skip


@pytest.mark.parametrize(("format_", "value", "kind"), GOOD)
def test_a_good_row_is_detected_and_becomes_one_of_three_kinds(format_: Format, value: dict, kind: str) -> None:
    """Detection looks at keys alone; the kind is what training sees."""
    rules = Rules(columns=Columns(prompt="q", completion="a") if format_ is Format.COLUMNS else Columns())
    assert detect_format(value, rules.columns) is format_
    assert check_row(line(value), format_, rules).kind == kind


BAD = [
    pytest.param(Format.MESSAGES, chat(), "messages: the list is empty", 14, id="no_messages"),
    pytest.param(Format.MESSAGES, line({"messages": "x"}), "expected a list, found a string", 14, id="not_a_list"),
    pytest.param(Format.MESSAGES, line({"text": "x"}), "'messages' is missing", 1, id="missing_key"),
    pytest.param(Format.MESSAGES, chat({"role": "cat", "content": "x"}), "unknown role 'cat'", 24, id="role"),
    pytest.param(Format.MESSAGES, chat({"role": "user", "content": 7}), "found a number", 43, id="number_as_content"),
    pytest.param(Format.MESSAGES, chat({"role": "user"}), "needs content", 15, id="no_content"),
    pytest.param(Format.MESSAGES, chat({"role": "user", "content": None}), "needs content", 43, id="null_content"),
    pytest.param(Format.MESSAGES, chat({**USER, "tool_calls": [CALL]}), "only the assistant", 63, id="user_calls_tools"),
    pytest.param(Format.MESSAGES, chat({**ANSWER, "weight": 0.5}), "a weight is 0 or 1", 64, id="weight"),
    pytest.param(Format.MESSAGES, chat({**ANSWER, "weight": "no"}), "a weight is 0 or 1", 64, id="weight_word"),
    pytest.param(
        Format.MESSAGES, chat({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}),
        "only text can be trained", 53, id="image",
    ),
    pytest.param(
        Format.MESSAGES,
        chat({"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{"}}]}),
        "a string that should hold JSON", b'"{"', id="broken_arguments",
    ),
    pytest.param(Format.MESSAGES, chat(USER, tools=[{"function": {"a": 1}}]), "tools[0]: a tool needs", b'{"function": {"a"', id="tool"),
    pytest.param(Format.PROMPT_COMPLETION, line({"prompt": "p"}), "'completion' is missing", 1, id="no_completion"),
    pytest.param(Format.PROMPT_COMPLETION, line({"prompt": [USER], "completion": "c"}), "list of messages", b'"c"', id="mixed"),
    pytest.param(Format.TEXT, line({"text": None}), "expected a string, found null", 10, id="null_text"),
    pytest.param(Format.ALPACA, line({"instruction": "i", "output": ["o"]}), "found an array", 32, id="alpaca_output"),
    pytest.param(
        Format.SHAREGPT, line({"conversations": [{"from": "robot", "value": "x"}]}), "unknown role 'robot'", 29, id="speaker"
    ),
    pytest.param(
        Format.SHAREGPT, line({"conversations": [{"from": "function_call", "value": "f(x)"}]}),
        "should hold JSON", 55, id="call_that_is_no_json",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("format_", "row", "reason", "column"), BAD)
def test_a_bad_row_is_named_by_reason_and_by_the_column_of_its_value(
    format_: Format, row: bytes, reason: str, column: int | bytes
) -> None:
    """The column is that of the value that is wrong, or of the object that lacks it."""
    with pytest.raises(LineError) as caught:
        check_row(row, format_, Rules())
    assert reason in caught.value.reason
    assert caught.value.column == (row.index(column) + 1 if isinstance(column, bytes) else column)


def test_sharegpt_becomes_openai_messages_with_calls_and_tools() -> None:
    """Roles are translated, calls become tool_calls with object arguments, bare tools and lists in text are wrapped."""
    row = check_row(
        line(
            {
                "conversations": [
                    {"from": "human", "value": "q"},
                    {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
                    {"from": "observation", "value": "{}"},
                    {"from": "gpt", "value": "a"},
                ],
                "tools": '[{"name": "f", "parameters": {}}]',
            }
        ),
        Format.SHAREGPT,
        Rules(),
    )
    assert [message["role"] for message in row.messages] == ["user", "assistant", "tool", "assistant"]
    assert row.messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}
    assert row.tools == [{"type": "function", "function": {"name": "f", "parameters": {}}}]


def test_text_parts_are_joined_and_string_arguments_become_objects() -> None:
    """What chat templates expect."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    row = check_row(
        chat({"role": "user", "content": parts}, {"role": "assistant", "tool_calls": [CALL]}),
        Format.MESSAGES,
        Rules(),
    )
    assert row.messages[0]["content"] == "ab"
    assert row.messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}


def test_gsm8k_as_published_works_through_columns() -> None:
    """`[data.columns] prompt = "question"`, `completion = "answer"`."""
    data = DataSettings.model_validate({"columns": {"prompt": "question", "completion": "answer"}})
    rows = list(iter_rows(GSM8K, "columns", data))
    assert len(rows) == 40
    assert rows[0].prompt.startswith("Natalia sold clips")
    assert rows[0].completion.endswith("#### 72")
    assert [row.line for row in rows] == list(range(1, 41))


def test_skipping_rows_is_not_refusing_them(tmp_path: Path) -> None:
    """Under "reject" a bad row that appeared after the pass stops the reader; under "skip" it is left out."""
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": 1}\n{"text": "b"}')
    assert [row.line for row in iter_rows(path, "text", Rules(on_bad_rows="skip"))] == [1, 3]
    with pytest.raises(LineError, match="line 2, column 10"):
        list(iter_rows(path, "text", Rules()))


def test_columns_that_are_set_do_not_touch_a_file_of_a_known_format() -> None:
    """The root's settings name a column; a dropped file of texts has none of it."""
    rules = Rules(columns=Columns(text="body"))
    assert check_row(line({"text": "t"}), Format.TEXT, rules).text == "t"
    assert check_row(line({"prompt": "p", "completion": "c"}), Format.PROMPT_COMPLETION, rules).prompt == "p"
