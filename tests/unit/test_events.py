"""The list of events and the code agree: whatever is logged is listed, with its level and keys, and the other way round."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import pytest

from daemon.job import Job, JobState, JobTransition, Outcome, RunResult
from daemon.notifications import RESULT_FIELDS_IN_JOB, canonical
from daemon.observability.events import EVENTS, by_noun
from tests.support.root import REPOSITORY

NAME = re.compile(rf"({'|'.join(by_noun())})\.[a-z_]+")
LEVELS = ("debug", "info", "warning", "error", "critical")
# What a logger, a trainer's report and the guard's own progress are called with an event's name.
METHODS = {"_tell", "_event", "exception", "event", "tell", "log", "_log", *LEVELS}


class Call(NamedTuple):
    name: str
    level: str  # empty where it is decided elsewhere
    keys: frozenset[str]
    place: str


def sources() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted((*REPOSITORY.glob("daemon/**/*.py"), *REPOSITORY.glob("guard/**/*.py"))):
        if path.name != "events.py":
            yield path, ast.parse(path.read_text())


def names_in(node: ast.AST) -> Iterator[str]:
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str) and re.fullmatch(NAME, part.value):
            yield part.value


def calls() -> Iterator[Call]:
    """Every call that is given the name of an event first."""
    for path, tree in sources():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in METHODS:
                tables = (argument for argument in node.args[1:] if isinstance(argument, ast.Dict))
                given = (keyword.arg for keyword in node.keywords if keyword.arg)
                keys = frozenset("exception" if key == "exc_info" else key for key in given) | frozenset(
                    str(key.value) for table in tables for key in table.keys if isinstance(key, ast.Constant)
                )
                for name in names_in(node.args[0]):
                    place = f"{path.relative_to(REPOSITORY)}:{node.lineno}"
                    yield Call(name, called if called in LEVELS else "", keys, place)


def test_every_event_that_the_code_emits_is_listed() -> None:
    emitted = {call.name for call in calls()}
    # The ends of jobs are written out in a table.
    emitted |= {name for path, tree in sources() if path.name == "notifications.py" for name in names_in(tree)}
    assert len(emitted) > 40
    assert emitted - set(EVENTS) == set()


def test_every_event_that_is_listed_is_emitted() -> None:
    """Somewhere: a trainer's events also travel under names that are handed on."""
    assert set(EVENTS) - {name for _, tree in sources() for name in names_in(tree)} == set()


def test_levels_and_keys_are_those_of_the_calls() -> None:
    for call in calls():
        listed = EVENTS[call.name]
        assert call.level in ("", listed.level), call
        assert call.keys <= set(listed.keys), f"{call}: {call.keys - set(listed.keys)}"


def test_the_ends_of_jobs_list_every_field_of_a_result() -> None:
    """They are not written out at a call: the line is made from the result itself."""
    job = Job(id="a", name="a", state=JobState.SUCCEEDED, result=RunResult(outcome=Outcome.SUCCEEDED))
    whole = {field.name for field in fields(RunResult)} - set(RESULT_FIELDS_IN_JOB)
    end = JobTransition(at="", job_id="a", old="running", new="succeeded", reason="")
    assert canonical(job, end).keys() <= set(EVENTS["job.succeeded"].keys)
    assert whole <= set(EVENTS["job.succeeded"].keys)


@pytest.mark.parametrize("name", EVENTS)
def test_names_are_a_noun_and_a_past_verb_with_a_meaning(name: str) -> None:
    assert NAME.fullmatch(name)
    assert EVENTS[name].level in ("debug", "info", "warning", "error")
    assert EVENTS[name].meaning.endswith(".")
    assert len(set(EVENTS[name].keys)) == len(EVENTS[name].keys)
