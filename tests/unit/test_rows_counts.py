"""What a pass counts besides good and bad rows, where that is told, and files of which nothing would be learned."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from daemon.cli import render
from daemon.cli.check import CheckReport, check_files, render_text
from daemon.config import Settings
from daemon.dataset.rows import Columns, Rules
from daemon.dataset.validate import DatasetReport, RejectedDataset, scan_dataset
from daemon.inbox.report import report_json, report_text
from daemon.job import Dataset, Job, JobState, from_json, to_json

USER = {"role": "user", "content": "q"}
SKIP = Rules(on_bad_rows="skip", max_bad_fraction=1.0)


def answer(text: str | None, **more: Any) -> dict[str, Any]:
    return {"messages": [USER, {"role": "assistant", "content": text}], **more}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def refused(path: Path, rules: Rules | None = None) -> DatasetReport:
    with pytest.raises(RejectedDataset) as caught:
        scan_dataset(path, rules or Rules())
    return caught.value.report


@pytest.fixture
def told(tmp_path: Path) -> Path:
    """A good file with keys that are not used, an empty answer and a row without an answer."""
    rows = [answer("a", id=1, source="web"), answer(" \n", id=2), {"messages": [USER]}, "", answer("b", id=None)]
    return write(tmp_path / "x.jsonl", *rows)


def test_unused_keys_warnings_and_blank_lines_are_counted(told: Path) -> None:
    """By rows that have the key with a value, most frequent first; the lines are named."""
    scan = scan_dataset(told, Rules())
    assert scan.dataset.unused_keys == {"id": 2, "source": 1}
    assert [(w.code, w.rows, w.lines) for w in scan.dataset.warnings] == [
        ("empty_answer", 1, (2,)),
        ("no_answer", 1, (3,)),
    ]
    assert scan.report.blank_lines == 1
    assert scan.dataset.rows == 4
    assert scan.dataset.notes == ("1 blank line was skipped",)


def test_placeholders_among_words_are_trained_and_told(tmp_path: Path) -> None:
    """With their lines, in what is asked and in plain text; a page's own elements are none."""
    rows = [answer("a"), {"messages": [{"role": "user", "content": "Is <image> a tag?"}, answer("b")["messages"][1]]}]
    (warning,) = scan_dataset(write(tmp_path / "x.jsonl", *rows), Rules()).dataset.warnings
    assert (warning.code, warning.rows, warning.lines) == ("media_placeholder", 1, (2,))
    texts = [{"text": "<image>\nA cat."}, {"text": "<video></video>"}, {"text": "a < b"}]
    (warning,) = scan_dataset(write(tmp_path / "t.jsonl", *texts), Rules()).dataset.warnings
    assert warning.lines == (1,)


def test_the_counts_travel_to_check_report_and_show(told: Path, tmp_path: Path) -> None:
    """In the texts and in the JSON of each, and through the store's form."""
    (found,) = check_files([told], Settings(root=tmp_path), None)
    assert found.accepted
    dataset = from_json(to_json(found.dataset), Dataset)
    assert dataset == found.dataset
    job = Job(id="20260101-000000-0000", name="x.jsonl", state=JobState.SUCCEEDED, dataset=dataset)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render.job(job, [], Settings(root=tmp_path)))
    for text in (render_text(found), report_text(job, None), console.export_text()):
        assert "id (2 rows), source (1)" in text
        assert "empty or only white space: 1 row, line 2" in text
        assert "no turn of the assistant that would be learned: 1 row, line 3" in text
        assert "1 blank line was skipped" in text
    checked = json.loads(to_json(found.to_dict()))
    for value in (checked["dataset"], checked["rows"], json.loads(report_json(job, None))["dataset"]):
        assert value["unused_keys"] == {"id": 2, "source": 1}
        assert [warning["lines"] for warning in value["warnings"]] == [[2], [3]]


def test_a_file_with_a_new_key_in_every_row_is_counted_in_bounded_memory(tmp_path: Path) -> None:
    """The first hundred by name, the others together."""
    path = write(tmp_path / "x.jsonl", *({"text": "t", f"key{number}": 1} for number in range(300)))
    counted = scan_dataset(path, Rules()).dataset.unused_keys
    assert len(counted) == 101
    assert counted["(other keys)"] == 200
    assert "and 81 more" in render_text(check_files([path], Settings(root=tmp_path), None)[0])


@pytest.mark.parametrize(
    "rows",
    [
        [answer(""), answer("  ")],
        [{"prompt": "q", "completion": ""}],
        [{"text": ""}, {"text": "\n"}],
        [{"instruction": "q", "output": ""}],
        [{"messages": [USER]}],
        [{"messages": [{"role": "system", "content": "s"}]}, answer("")],
        [{"messages": [USER, {"role": "assistant", "content": "a", "weight": 0}]}],
    ],
)
def test_a_file_of_which_nothing_would_be_learned_is_refused(tmp_path: Path, rows: list[Any]) -> None:
    """By check as by the daemon, with the lines."""
    path = write(tmp_path / "x.jsonl", *rows)
    report = refused(path)
    assert report.reason.startswith("nothing would be learned")
    assert report.hint
    (found,) = check_files([path], Settings(root=tmp_path), None)
    assert not found.accepted
    assert "line" in render_text(found)


def test_an_answer_with_a_call_or_with_reasoning_is_not_empty(tmp_path: Path) -> None:
    """Nor is anything missing under train_on = "all"."""
    call = {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}]}
    thought = {"messages": [USER, {"role": "assistant", "content": "", "reasoning": "t"}]}
    assert scan_dataset(write(tmp_path / "x.jsonl", call, thought), Rules()).dataset.warnings == ()
    path = write(tmp_path / "y.jsonl", {"messages": [USER]})
    assert scan_dataset(path, Rules(train_on="all")).dataset.warnings == ()


def test_a_key_that_only_the_900th_row_has_refuses_the_file(tmp_path: Path) -> None:
    """With its line and column, and what to do; under "skip" that row alone is left out."""
    rows = [answer("a") for _ in range(899)] + [answer("a", label=False)]
    path = write(tmp_path / "x.jsonl", *rows, answer("b"))
    report = refused(path)
    assert report.reason.startswith('1 of 901 lines is bad; line 900, column 98: "label" says')
    assert "keep the rows" in report.hint
    assert scan_dataset(path, SKIP).report.bad_lines == (900,)


def test_one_fault_in_all_rows_is_one_sentence_and_skipping_them_is_not_proposed(tmp_path: Path) -> None:
    """The excerpt of three lines is enough to see it."""
    path = write(tmp_path / "x.jsonl", *(answer("a", label=number % 2 == 0) for number in range(50)))
    report = refused(path)
    assert "all 50 rows" in report.reason
    assert "line" not in report.reason
    assert len(report.problems) == 3
    assert "on_bad_rows" not in report.hint
    assert refused(path, SKIP).reason == report.reason


def test_one_fault_at_different_places_is_one_sentence_as_well(tmp_path: Path) -> None:
    """With the first place."""
    path = write(
        tmp_path / "x.jsonl", *({"messages": [*[USER] * n, {"role": "cat", "content": "a"}]} for n in range(9))
    )
    report = refused(path)
    assert report.reason.startswith("all 9 rows are refused, the first on line 1: messages[0].role: unknown role 'cat'")


@pytest.mark.parametrize(("bad", "good"), [(1, 200), (3, 10), (30, 1)])
def test_what_the_hint_proposes_makes_the_file_pass(tmp_path: Path, bad: int, good: int) -> None:
    """Leaving bad rows out is proposed with the bound that it needs."""
    path = write(tmp_path / "x.jsonl", *[{"text": 1}] * bad, *[{"text": "t"}] * good)
    hint = refused(path).hint
    assert 'on_bad_rows = "skip"' in hint
    bound = float(hint.partition("max_bad_fraction = ")[2].split()[0]) if "max_bad_fraction" in hint else 0.01
    assert scan_dataset(path, Rules(on_bad_rows="skip", max_bad_fraction=bound)).dataset.rows == good


def test_how_prompt_and_completion_are_joined_is_said(tmp_path: Path) -> None:
    """With the setting that makes turns of them; under that setting there is nothing to say."""
    rows = [{"prompt": "How many are there?", "completion": "There are 7."}, {"prompt": "Q: ", "completion": "A"}]
    path = write(tmp_path / "x.jsonl", *rows)
    (note,) = scan_dataset(path, Rules()).dataset.notes
    assert "joined as they stand, in 1 row with no white space between" in note
    assert '[data] prompt_completion = "chat"' in note
    assert scan_dataset(path, Rules(prompt_completion="chat")).dataset.notes == ()


UNKNOWN = {
    "question_answer_id": ({"id": "1", "question": "a", "answer": "b"}, Columns(prompt="question", completion="answer")),
    "dolly": (
        {"instruction": "a", "context": "c", "response": "b", "category": "d"},
        Columns(prompt="instruction", completion="response"),
    ),
    "prompt_response": ({"prompt": "a", "response": "b"}, Columns(prompt="prompt", completion="response")),
    "input_output": ({"input": "a", "output": "b"}, Columns(prompt="input", completion="output")),
    "capitals": ({"Question": "a", "Complex_CoT": "c", "Response": "b"}, Columns(prompt="Question", completion="Response")),
    "two_texts": ({"headline": "a", "lead": "b"}, Columns(prompt="headline", completion="lead")),
    "one_text": ({"id": "1", "content": "a", "url": "u"}, Columns(text="content")),
    "xlam_in_words": ({"query": "q", "answers": "yes", "tools": '[{"name": "f"}]'}, Columns(prompt="query", completion="answers")),
}  # fmt: skip


@pytest.mark.parametrize(("row", "columns"), UNKNOWN.values(), ids=UNKNOWN)
def test_likely_columns_are_proposed_and_pass(tmp_path: Path, row: dict[str, Any], columns: Columns) -> None:
    """Also among more than two; what would not be used then is named."""
    path = write(tmp_path / "x.jsonl", row)
    report = refused(path)
    wanted = columns.text or columns.prompt
    assert f"[data.columns] {'text' if columns.text else 'prompt'} = {json.dumps(wanted)}" in report.hint
    if columns.completion:
        assert f"completion = {json.dumps(columns.completion)}" in report.hint
        assert '[data] prompt_completion = "chat"' in report.hint
    chat = "prompt_completion" in report.hint and "for a chat model" not in report.hint
    rules = Rules(columns=columns, prompt_completion="chat" if chat else "as_is")
    dataset = scan_dataset(path, rules).dataset
    assert all(f'"{key}"' in report.hint for key in dataset.unused_keys)


REFUSED_AS_THEY_ARE = {
    "trl_dpo": ({"prompt": "q", "chosen": "a", "rejected": "b"}, "preference data"),
    "implicit_prompt": ({"chosen": [USER], "rejected": [USER]}, "preference data"),
    "openai_preference": ({"input": {"messages": [USER]}, "preferred_output": [USER], "non_preferred_output": [USER]}, "preference data"),
    "steps": ({"prompt": "q", "completions": ["a"], "labels": [True]}, "step supervision"),
    "tokens": ({"input_ids": [1, 2], "labels": [1, 2]}, "finished tokens"),
    "picture_and_caption": ({"image": "a.png", "caption": "a barn"}, "only text"),
    "one_turn": ({"role": "user", "content": "q"}, "one turn of a conversation"),
    "verl_prompts": ({"data_source": "x", "prompt": [USER], "ability": "math", "reward_model": {"ground_truth": "4"}}, "no known format"),
    "openai_batch": ({"custom_id": "1", "method": "POST", "body": {"model": "x", **answer("a")}}, 'inside "body"'),
    "capital_keys": ({"Messages": answer("a")["messages"]}, "small letters"),
    "speakers_in_one_line": ({"system": "SYSTEM: s", "chat": "USER: q ASSISTANT: a"}, "no known format"),
}  # fmt: skip


@pytest.mark.parametrize(("row", "reason"), REFUSED_AS_THEY_ARE.values(), ids=REFUSED_AS_THEY_ARE)
def test_rows_of_no_format_are_refused_as_what_they_are(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    """And no columns are proposed that would be refused again."""
    report = refused(write(tmp_path / "x.jsonl", row, row))
    assert reason in report.reason
    assert report.hint
    assert "[data.columns] prompt" not in report.hint


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "a",}', "a comma with nothing behind it"),
        ('{"text": "a"},', "a comma behind the object"),
        ("{'text': 'a'}", "single quotes"),
        ('{"text": None}', "None"),
        ('{"text": "a" // b', "a comment"),
        ('{"text": "a", # b', "a comment"),
        ('{text: "a"}', "double quotes"),
        ('{"text" "a"}', "a colon"),
        ('{"text": "a" "more": 1}', "a comma"),
        ('{"text": "\\x41"}', "an escape that JSON does not have"),
        ('{"text": "\\u12"}', "hexadecimal digits"),
        ('{"text": }', "a value"),
        ('{"text": "a', "ends inside"),
        ('{"text": "a"} {"text": "b"}', "a second value on the same line"),
    ],
)
def test_a_line_that_is_no_json_is_told_in_plain_words(tmp_path: Path, line: str, reason: str) -> None:
    """Never in Python's; among good lines, so that the line itself is what is told."""
    report = refused(write(tmp_path / "x.jsonl", {"text": "a"}, line))
    assert reason in report.problems[0].reason
    for words in ("property name", "delimiter", "Expecting", "expecting", "Extra data", "Unterminated"):
        assert words not in report.problems[0].reason


def test_check_report_has_the_types_it_says() -> None:
    """A check of an absent file has no counts, and no error."""
    assert render_text(CheckReport(path="x", accepted=False, reason="r"))


@pytest.mark.parametrize(
    ("line", "reason", "hint"),
    [
        ('{"text": "a",}', "its lines are not JSON: line 1, column 13: a comma with nothing behind it", "JSON library"),
        (
            '{"text": -Infinity}',
            "its lines are not JSON: line 1, column 10: -Infinity, which is not JSON",
            "write null",
        ),
        ('{"text": undefined}', "line 1, column 10: undefined, which is JavaScript; JSON has null", "JSON library"),
        ('{"path": "C:\\Users"}', "is an escape that JSON does not have", "JSON library"),
    ],
)
def test_lines_that_are_no_json_are_told_as_that(tmp_path: Path, line: str, reason: str, hint: str) -> None:
    """Not as rows of an unknown format, whose formats would be no help."""
    report = refused(write(tmp_path / "x.jsonl", *[line] * 3))
    assert reason in report.reason
    assert hint in report.hint
