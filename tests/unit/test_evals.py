"""The administrator's evals: rows that can be used, sentences for those that cannot, and how answers are judged."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from daemon.evaluation.checks import NotRun, is_right, passes_command
from daemon.evaluation.evals import MOST_ROWS, EvalRow, parse_row, read_evals
from daemon.evaluation.gate import with_evals
from daemon.evaluation.matrix import read_matrix, summarise
from daemon.evaluation.scores import AdapterScores, read_scores, write_scores
from daemon.evaluation.settings import GateSettings
from daemon.evaluation.statistics import MeasuredEval, describe_eval, judge_evals
from daemon.evaluation.values import EvalAnswer, Evaluation, GateVerdict
from daemon.job import to_json
from daemon.trainer.encode import alarm

GATE = GateSettings()


def row(**facts: Any) -> EvalRow:
    return parse_row(json.dumps({"prompt": "2 + 2 =", **facts}).encode(), 1, Path())


def write(folder: Path, name: str, *lines: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))


# -- answers


@pytest.mark.parametrize(
    ("facts", "right", "wrong"),
    [
        ({"expected": "4"}, [" 4\n"], ["4.", "", "44"]),
        ({"check": "contains", "expected": "four"}, ["it is four"], ["Four"]),
        ({"check": "contains", "expected": ["a", "b"]}, ["b a"], ["a"]),
        ({"check": "regex", "expected": r"^(4|four)\b"}, ["four."], ["It is four"]),
        ({"check": "numeric", "expected": 4}, ["4", "so 2 + 2 = 4.0.", "4e0"], ["", "four", "4 or 5", "-4", "1e999"]),
        ({"check": "numeric", "expected": -1234.5}, ["-1,234.50"], ["1234.5", "234.5"]),
        ({"check": "numeric", "expected": 12}, ["3-12"], ["3 -12"]),
        ({"check": "numeric", "expected": 3.14, "tolerance": 0.01}, ["3.1415"], ["3.16"]),
        ({"check": "json"}, ["{}", " [1]\n"], ["", "{", "```json\n{}\n```", "[" * 100_000]),
        ({"check": "json", "expected": {"a": 1}}, ['{"a": 1.0, "b": 2}'], ['{"a": true}', "[1]", '{"b": 1}']),
        ({"check": "json", "expected": [1, {"a": None}]}, ['[1, {"a": null}]'], ["[1, {}]", "[1]"]),
    ],
)
def test_an_answer_passes_as_its_row_says(facts: dict[str, Any], right: list[str], wrong: list[str]) -> None:
    assert [is_right(row(**facts), answer) for answer in right] == [True] * len(right)
    assert [is_right(row(**facts), answer) for answer in wrong] == [False] * len(wrong)


def test_a_regular_expression_that_takes_for_ever_is_interrupted() -> None:
    began = time.monotonic()
    endless = row(check="regex", expected="(a+)+$")
    with alarm() as set_alarm:
        set_alarm(0.2)
        with pytest.raises(TimeoutError):
            is_right(endless, "a" * 64 + "b")
    assert time.monotonic() - began < 30


def test_a_program_judges_by_its_exit_code_and_gets_the_answer(tmp_path: Path) -> None:
    program = tmp_path / "judge.sh"
    program.write_text('#!/bin/sh\ncat > given.json\ngrep -q "\\"answer\\": \\"4\\"" given.json\n')
    program.chmod(0o755)
    asked = parse_row(b'{"prompt": "2 + 2 =", "check": "command", "command": ["./judge.sh"]}', 3, tmp_path)

    def passes(one: EvalRow, answer: str, seconds: float = 30.0) -> bool:
        return passes_command(one, answer, name="sums", folder=tmp_path, seconds=seconds, check_stop=lambda: None)

    assert passes(asked, "4")
    assert not passes(asked, "5")
    assert json.loads((tmp_path / "given.json").read_bytes()) == {
        "eval": "sums",
        "line": 3,
        "prompt": "2 + 2 =",
        "answer": "5",
        "expected": None,
    }
    assert passes(replace(asked, command=("true",)), "x" * 2**20)  # which does not read it
    began = time.monotonic()
    assert not passes(replace(asked, command=("sh", "-c", "sleep 600 & sleep 600")), "4", 0.1)
    assert time.monotonic() - began < 30
    with pytest.raises(NotRun, match="no-such-program"):
        passes(replace(asked, command=("no-such-program",)), "4")
    with pytest.raises(NotRun, match="ended with 127"):
        passes(replace(asked, command=("sh", "-c", "no-such-program 2> /dev/null")), "4")


# -- rows


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "not JSON"),
        ("[1]", "no JSON object"),
        ('{"prompt": "a", "expected": "\\ud800"}', "not JSON"),
        ('{"expected": "4"}', "either prompt or messages"),
        ('{"prompt": "a", "messages": [], "expected": "4"}', "either prompt or messages"),
        ('{"prompt": " ", "expected": "4"}', "prompt is empty"),
        ('{"messages": [{"role": "user"}], "expected": "4"}', "message 1 needs content"),
        ('{"messages": [{"role": "me", "content": "a"}], "expected": "4"}', "message 1 needs a role"),
        ('{"messages": [{"role": "assistant", "content": "a"}], "expected": "4"}', "last message is the assistant's"),
        ('{"prompt": "a"}', 'check "exact" needs expected'),
        ('{"prompt": "a", "expected": 4}', 'check "exact" needs expected'),
        ('{"prompt": "a", "expected": "4", "check": "equals"}', "unknown check 'equals': known are exact, contains"),
        ('{"prompt": "a", "expected": "4", "check": ["exact"]}', "unknown check"),
        ('{"prompt": "a", "expected": "4", "tolerence": 1}', "unknown key 'tolerence'"),
        ('{"prompt": "a", "expected": "4", "tolerance": 1}', "tolerance belongs to"),
        ('{"prompt": "a", "check": "numeric", "expected": "4"}', "needs expected, a number"),
        ('{"prompt": "a", "check": "numeric", "expected": NaN}', "needs expected, a number"),
        ('{"prompt": "a", "check": "numeric", "expected": 4, "tolerance": -1}', "0 or more"),
        ('{"prompt": "a", "check": "contains", "expected": [""]}', "a text or a list of texts"),
        ('{"prompt": "a", "check": "regex", "expected": "("}', "regular expression cannot be used"),
        ('{"prompt": "a", "check": "command", "command": "grep"}', "a list of a program"),
        ('{"prompt": "a", "check": "command", "command": ["./none"]}', "./none cannot be run"),
        ('{"prompt": "a", "check": "command", "command": ["no-such-program"]}', "no program no-such-program"),
        ('{"prompt": "a", "expected": "4", "command": ["true"]}', "command belongs to"),
        ('{"prompt": "good", "expected": "4"}', "says the same as line 1"),
    ],
)
def test_a_wrong_row_is_told_with_its_line_and_leaves_its_file_out(tmp_path: Path, line: str, told: str) -> None:
    write(tmp_path / "evals", "bad", '{"prompt": "good", "expected": "4"}', "", line)
    write(tmp_path / "evals", "good", '{"prompt": "good", "expected": "4"}')
    found = read_evals(tmp_path / "evals")
    [problem] = found.problems
    assert problem.startswith("evals/bad.jsonl line 3: ")
    assert told in problem
    assert [one.name for one in found.usable] == ["good"]


def test_files_that_are_too_long_empty_or_no_files_are_told_and_nothing_waits(tmp_path: Path) -> None:
    write(tmp_path, "long", *(f'{{"prompt": "{n}", "expected": "4"}}' for n in range(MOST_ROWS + 1)))
    write(tmp_path, "empty")
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "judge.py").write_text("")  # a program of theirs is none
    found = read_evals(tmp_path)
    assert found.usable == ()
    assert [problem.partition(":")[0] for problem in found.problems] == [
        "evals/empty.jsonl",
        "evals/folder.jsonl",
        f"evals/long.jsonl line {MOST_ROWS + 1}",
        "evals/pipe.jsonl",
    ]
    assert read_evals(tmp_path / "none").problems == ()


def test_evals_that_other_accounts_may_write_are_not_used(tmp_path: Path) -> None:
    """They hold programs that are run, and what the gate judges by."""
    write(tmp_path / "evals", "open", '{"prompt": "a", "expected": "4"}')
    (tmp_path / "evals/open.jsonl").chmod(0o666)
    assert "other accounts may write" in read_evals(tmp_path / "evals").problems[0]
    (tmp_path / "evals").chmod(0o777)
    [problem] = read_evals(tmp_path / "evals").problems
    assert "so no eval is used" in problem


def test_a_changed_program_makes_it_another_row(tmp_path: Path) -> None:
    """What was judged by another program is not taken for judged by this one."""
    text = b'{"prompt": "a", "check": "command", "command": ["sh", "judge.sh"]}'
    (tmp_path / "judge.sh").write_text("true")
    first = parse_row(text, 1, tmp_path).digest
    assert parse_row(text, 2, tmp_path).digest == first
    (tmp_path / "judge.sh").write_text("false")
    assert parse_row(text, 1, tmp_path).digest != first


# -- the gate


def answers(passed: list[bool]) -> dict[str, EvalAnswer]:
    return {
        str(n): EvalAnswer(line=n, prompt="2 + 2 =", answer="4" if flag else "5", passed=flag)
        for n, flag in enumerate(passed)
    }


def measured(before: list[bool], after: list[bool], rows: int = 40) -> MeasuredEval:
    return MeasuredEval(name="sums", rows=rows, before=answers(before), after=answers(after))


def test_an_eval_takes_part_in_the_gate_as_a_dataset_does() -> None:
    kept = Evaluation(verdict=GateVerdict.KEPT, passes=True)
    lost = with_evals(kept, judge_evals([measured([True] * 40, [True] * 20 + [False] * 20)], GATE), GATE)
    assert lost.verdict is GateVerdict.REGRESSED
    assert not lost.passes
    assert lost.reasons[0].startswith("eval sums 100% -> 50% pass (-50%, ")
    same = with_evals(kept, judge_evals([measured([True] * 40, [True] * 40)], GATE), GATE)
    assert same.passes
    assert same.verdict is GateVerdict.KEPT
    few = judge_evals([measured([True] * 4, [False] * 4, rows=4)], GATE)
    assert with_evals(kept, few, GATE).passes
    assert not with_evals(kept, few, GateSettings(strict=True)).passes


def test_without_a_parents_answers_it_is_told_and_not_judged() -> None:
    [first] = judge_evals([measured([], [True, False], rows=2)], GATE)
    assert first.verdict is GateVerdict.UNMEASURED
    assert first.passed == 0.5
    assert describe_eval(first) == "50% of 2 rows pass"
    assert with_evals(Evaluation(verdict=GateVerdict.UNMEASURED, passes=True), [first], GATE).passes
    [none] = judge_evals([measured([True], [], rows=1)], GATE)
    assert describe_eval(none) == "none of 1 row was answered"


def test_answers_are_kept_beside_scores_and_in_the_matrix(tmp_path: Path) -> None:
    kept = AdapterScores(environment="cpu", evals={"sums": answers([True, False])})
    write_scores(tmp_path, "a" * 64, kept)
    write_scores(tmp_path, "a" * 64, AdapterScores(environment="cpu", evals={"more": answers([True])}))
    found = read_scores(tmp_path, "a" * 64, "cpu")
    assert found.answers("sums") == answers([True, False])
    assert found.answers("more") == answers([True])
    evaluation = with_evals(
        Evaluation(verdict=GateVerdict.UNMEASURED, passes=True), judge_evals([measured([], [True], rows=1)], GATE), GATE
    )
    summary = summarise(read_matrix([{"version": "0001", "evaluation": json.loads(to_json(evaluation))}]), "0001")
    assert summary is not None
    assert summary.evals == {"sums": 1.0}
