"""Whether an answer passes its row. Those who call set a clock: a regular expression may take for ever, a program too."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from daemon.evaluation.evals import Check, EvalRow
from guard.json_text import parse_json

NOT_RUN = (126, 127)  # exit codes by which a shell, env and others say that a program cannot be run, or is not there
POLL_SECONDS = 0.05  # between two looks at a program
# A sign right behind a digit or a letter is a dash: of "3-12" the last number is 12.
NUMBER = re.compile(
    r"(?:(?<![\w.])[-+])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?", re.ASCII
)


class NotRun(Exception):
    """A row's program could not be started, which says nothing about the answer."""


def is_right(row: EvalRow, answer: str) -> bool:
    """Whether an answer passes; not of a row with a command."""
    match row.check:
        case Check.EXACT:
            return answer.strip() == str(row.expected).strip()
        case Check.CONTAINS:
            parts = [row.expected] if isinstance(row.expected, str) else row.expected
            return all(part in answer for part in parts)
        case Check.REGEX:
            return re.search(row.expected, answer) is not None
        case Check.NUMERIC:
            return is_number(answer, row.expected, row.tolerance)
        case _:
            return is_json(answer, row.expected)


def is_number(answer: str, expected: float, tolerance: float) -> bool:
    """Whether the last number of an answer is the expected one, as near as `tolerance` and as floats are."""
    numbers = NUMBER.findall(answer)
    if not numbers:
        return False
    value = float(numbers[-1].replace(",", ""))
    return math.isfinite(value) and (
        abs(value - expected) <= tolerance or math.isclose(value, expected, rel_tol=1e-9, abs_tol=1e-12)
    )


def is_json(answer: str, expected: Any) -> bool:
    """Whether an answer is JSON; with an object expected, with equal values under its keys; else equal to it."""
    try:
        value = parse_json(answer.strip())
    except ValueError:
        return False
    if expected is None:
        return True
    if isinstance(expected, Mapping):
        return isinstance(value, dict) and all(
            key in value and _same(value[key], wanted) for key, wanted in expected.items()
        )
    return _same(value, expected)


def _same(one: Any, other: Any) -> bool:
    """Whether two JSON values are equal; true is not 1, and 1.0 is 1."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def passes_command(
    row: EvalRow, answer: str, *, name: str, folder: Path, seconds: float, check_stop: Callable[[], None]
) -> bool:
    """Give the row and its answer to its program, in the evals' folder; whether it ends with 0 within so many seconds.

    It gets {eval, line, prompt, answer, expected} on stdin. What it started is ended with it. Raises NotRun, and what
    `check_stop` raises.
    """
    facts = {"eval": name, "line": row.line, "prompt": row.prompt, "answer": answer, "expected": row.expected}
    until = time.monotonic() + seconds
    try:
        process = _start(row.command, json.dumps(facts).encode("ascii"), folder)
    except (OSError, ValueError) as error:
        raise NotRun(f"{row.command[0]} cannot be run: {error}") from error
    try:
        while time.monotonic() < until:
            check_stop()
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(POLL_SECONDS)
                if code in NOT_RUN:
                    raise NotRun(f"{row.command[0]} ended with {code}: it, or what it starts, cannot be run")
                return code == 0
        return False
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _start(command: Sequence[str], given: bytes, folder: Path) -> subprocess.Popen[bytes]:
    """Start a program with `given` on its stdin. Raises OSError, ValueError."""
    with tempfile.TemporaryFile() as stdin:  # a program may end without reading it, and a pipe would fill
        stdin.write(given)
        stdin.seek(0)
        return subprocess.Popen(
            command,
            stdin=stdin,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            start_new_session=True,
        )
