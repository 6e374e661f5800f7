"""Where options may stand: those that all commands share also behind the command, a command's own flags also before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SHARED = ("--root",)  # the application's own that take a value
FLAGS = ("--json",)  # of single commands
_PLAIN = {
    "Value error, ": "",
    "Input should be ": "it has to be ",
    "a valid integer, unable to parse string as an integer": "a whole number",
    "a valid number, unable to parse string as a number": "a number",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
}


def reorder(arguments: Sequence[str], application: Any) -> list[str]:
    """Return the arguments in the places in which the parser of `application` (a click group) expects them.

    An option of the same name that a command has itself (`dropforge restore --root`) stays with it, and what stands
    behind `--` is left alone.
    """
    end = arguments.index("--") if "--" in arguments else len(arguments)
    before, rest, flags = _split(arguments[:end])
    path, command = _command(rest, application)
    own = {name for parameter in getattr(command, "params", ()) for name in parameter.opts} if path else set()
    shared: list[str] = []
    kept: list[str] = []
    tail = iter(rest[path:])
    for argument in tail:
        name, equals, _ = argument.partition("=")
        if name in SHARED and name not in own and path:
            shared.append(argument)
            if not equals:
                shared += [value for value in (next(tail, None),) if value is not None]
        else:
            kept.append(argument)
    return [*before, *shared, *rest[:path], *(flags if path else ()), *kept, *(() if path else flags), *arguments[end:]]


def in_plain_words(message: str) -> str:
    """Return the sentence of a parser about a wrong value in words of people: the parser of numbers speaks of inputs."""
    for theirs, ours in _PLAIN.items():
        message = message.replace(theirs, ours)
    return message


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """The options before the command, what begins with the command, and flags that stood before it."""
    before: list[str] = []
    flags: list[str] = []
    at = 0
    while at < len(arguments) and arguments[at].startswith("-"):
        taken = 2 if arguments[at] in SHARED else 1
        (flags if arguments[at] in FLAGS else before).extend(arguments[at : at + taken])
        at += taken
    return before, list(arguments[at:]), flags


def _command(arguments: Sequence[str], application: Any) -> tuple[int, Any]:
    """How many of the arguments name the command, as in `memory forget`, and the command."""
    command, length = application, 0
    for argument in arguments:
        inner = getattr(command, "commands", {}).get(argument)
        if inner is None:
            break
        command, length = inner, length + 1
    return length, command
