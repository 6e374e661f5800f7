"""The list of events and the code agree: whatever is logged is listed, whatever is listed is logged."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from daemon.events import EVENTS, by_noun
from tests.support.root import REPOSITORY

NAME = re.compile(rf"({'|'.join(by_noun())})\.[a-z_]+")
METHODS = {"_tell", "debug", "info", "warning", "error", "critical", "exception", "event", "tell", "log", "_log"}
# Names that are put together at run time: every end of a job is one.
COMPOSED = {"job.failed", "job.cancelled"}


def emitted() -> Iterator[tuple[str, str]]:
    """(event, place): every name of that form that is written out in a call to a logger, or in a mapping of names."""
    for path in sorted((*REPOSITORY.glob("daemon/**/*.py"), *REPOSITORY.glob("guard/**/*.py"))):
        if path.name == "events.py":
            continue
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                words = [part for argument in node.args[:1] for part in ast.walk(argument)] if called in METHODS else []
            elif isinstance(node, ast.Dict) and path.name == "scheduler.py":
                words = list(node.values)
            else:
                continue
            for word in words:
                if (
                    isinstance(word, ast.Constant)
                    and isinstance(word.value, str)
                    and re.fullmatch(r"[a-z]+\.[a-z_]+", word.value)
                ):
                    yield word.value, f"{path.relative_to(REPOSITORY)}:{word.lineno}"


def test_every_event_that_the_code_emits_is_listed() -> None:
    unlisted = {f"{name} ({place})" for name, place in emitted() if name not in EVENTS}
    assert unlisted == set()


def written() -> set[str]:
    """Every text of the code that has the form of an event's name, wherever it stands."""
    texts = set()
    for path in (*REPOSITORY.glob("daemon/**/*.py"), *REPOSITORY.glob("guard/**/*.py")):
        if path.name != "events.py":
            texts |= {
                str(node.value) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)
            }
    return texts


def test_every_event_that_is_listed_is_emitted() -> None:
    assert set(EVENTS) - written() - COMPOSED == set()


@pytest.mark.parametrize("name", EVENTS)
def test_names_are_a_noun_and_a_past_verb_with_a_meaning(name: str) -> None:
    assert NAME.fullmatch(name)
    assert EVENTS[name].level in ("debug", "info", "warning", "error")
    assert EVENTS[name].meaning.endswith(".")
    assert len(set(EVENTS[name].keys)) == len(EVENTS[name].keys)
