"""What the command line tells people to type can be typed: every hint's command exists, and so does every example's."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from daemon.cli.arguments import reorder
from daemon.cli.main import app
from tests.support.root import REPOSITORY

APPLICATION: Any = typer.main.get_command(app)
MENTION = re.compile(r"`(?:sudo -u \S+ |runuser -u \S+ -- )?dropforge ([^`]*)`")
EXAMPLE = re.compile(r"Example: dropforge (.+)")
PLACEHOLDER = "1"  # of an f-string, and of an argument that is a number


def commands(group: Any = APPLICATION, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


def texts(path: Path) -> Iterator[str]:
    """Every text of a module, with its values left out."""
    inside: set[int] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            inside |= {id(part) for part in node.values}
            yield "".join(
                str(part.value) if isinstance(part, ast.Constant) else PLACEHOLDER for part in node.values
            ).replace("{{", "{")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield node.value


def mentions() -> list[tuple[str, str]]:
    """Place and command line of each `dropforge ...` in a text of the product."""
    found = {
        (str(path.relative_to(REPOSITORY)), " ".join(match[1].split()))
        for folder in ("daemon", "guard")
        for path in (REPOSITORY / folder).rglob("*.py")
        for text in texts(path)
        for match in MENTION.finditer(text)
    }
    return sorted(found)


def fault(line: str) -> str:
    """Why a command line is refused before it does anything; empty when it is not, or lacks what a person fills in."""
    arguments = [word for word in shlex.split(re.split(r" [|>] ", line)[0]) if word != "..."]
    if not arguments:
        return ""
    arguments = reorder(arguments, APPLICATION)
    context = None
    command = APPLICATION
    while True:
        try:
            context = command.make_context(command.name, list(arguments), parent=context)
        except Exception as error:  # click's usage errors
            lacks = type(error).__name__ in ("MissingParameter", "NoArgsIsHelpError", "BadOptionUsage")
            return "" if lacks else f"{type(error).__name__}: {error}"
        if not hasattr(command, "commands"):
            return ""
        arguments = [*context._protected_args, *context.args]
        if not arguments:
            return ""
        command = command.get_command(context, arguments[0])
        if command is None:
            return f"there is no command {arguments[0]}"
        arguments = arguments[1:]


def test_what_this_test_reads_is_there() -> None:
    assert len(mentions()) > 30
    assert fault("nonsense") == "there is no command nonsense"
    assert "nosuch" in fault("jobs --nosuch")
    assert fault("rollback") == ""


@pytest.mark.parametrize("place_and_line", mentions(), ids=lambda item: " ".join(item))
def test_every_command_that_a_message_names_can_be_typed(place_and_line: tuple[str, str]) -> None:
    assert fault(place_and_line[1]) == ""


@pytest.mark.parametrize(("name", "command"), list(commands()), ids=[name for name, _ in commands()])
def test_each_command_has_an_example_that_is_that_command_and_can_be_typed(name: str, command: Any) -> None:
    found = EXAMPLE.search(command.help or "")
    assert found is not None, f"`dropforge {name} --help` has no example"
    assert f" {name} " in f" {found[1]} "
    assert fault(found[1]) == ""
