"""The administrator's evals, `evals/NAME.jsonl`: what is asked of every version, and how its answers are judged.

A row is

    {"prompt" | "messages": ..., "check": "exact", "expected": ...}

A file with one row that cannot be used is not used at all, so that its share of passed rows is always of all that it says.
"""

from __future__ import annotations

import json
import math
import os
import pwd
import re
import shutil
import stat
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from hashlib import blake2b, file_digest
from pathlib import Path
from typing import Any

from daemon.evaluation.settings import EvaluationSettings, GateSettings
from daemon.processes import account_name
from daemon.text import escape, format_bytes
from guard.json_text import parse_json

SUFFIX = ".jsonl"
MOST_EVALS = 100
MOST_ROWS = 1000  # of one eval
MOST_BYTES = 16 * 2**20  # of one file
PROMPT_CHARACTERS = 500  # of a prompt, where it is shown
ROLES = ("system", "developer", "user", "assistant", "tool")
KEYS = frozenset({"prompt", "messages", "tools", "check", "expected", "tolerance", "command", "id"})


class Check(StrEnum):
    """How an answer is judged."""

    EXACT = "exact"  # it is `expected`, but for white space around it
    CONTAINS = "contains"  # `expected` is part of it; of a list, every item
    REGEX = "regex"  # `expected` is found in it
    NUMERIC = "numeric"  # its last number is within `tolerance` of `expected`
    JSON = "json"  # it is JSON; with `expected`, equal to it, or equal in the keys of that object
    COMMAND = "command"  # the program `command` gets it on stdin and ends with 0


@dataclass(frozen=True, kw_only=True)
class EvalRow:
    """One question."""

    line: int
    prompt: str | Sequence[Mapping[str, Any]]  # text to go on with, or a conversation to answer
    tools: Any = None
    check: Check = Check.EXACT
    expected: Any = None
    tolerance: float = 0.0
    command: tuple[str, ...] = ()
    digest: str  # of all that the row says, and of the files in its folder that its command names

    @property
    def asked(self) -> str:
        """The prompt, or the last message of the conversation, cut to what is shown."""
        text = self.prompt if isinstance(self.prompt, str) else str(self.prompt[-1].get("content") or "")
        return text[:PROMPT_CHARACTERS]


@dataclass(frozen=True, kw_only=True)
class Eval:
    """One file of questions."""

    name: str  # of the file, without its suffix
    rows: tuple[EvalRow, ...]


@dataclass(frozen=True, kw_only=True)
class Evals:
    """What a folder holds: evals that can be used, and a sentence for each file that cannot."""

    folder: Path
    usable: tuple[Eval, ...] = ()
    problems: tuple[str, ...] = ()


def read_evals(folder: Path) -> Evals:
    """Read all evals of a folder, by name; none where there is no such folder."""
    try:
        account = folder.parent.stat().st_uid  # whose root it is, whoever asks
        if fault := _others_may_write(folder.stat(), account):
            return Evals(folder=folder, problems=(f"{folder}: {fault}, so no eval is used",))
        names = sorted(
            path.name for path in folder.iterdir() if path.name.endswith(SUFFIX) and not path.name.startswith(".")
        )
    except FileNotFoundError:
        return Evals(folder=folder)
    except OSError as error:
        return Evals(folder=folder, problems=(f"{folder} cannot be read: {error.strerror}",))
    usable: list[Eval] = []
    problems: list[str] = []
    for name in names[:MOST_EVALS]:
        try:
            usable.append(Eval(name=name.removesuffix(SUFFIX), rows=_read_rows(folder / name, account)))
        except EvalError as error:
            problems.append(f"evals/{escape(name)}{f' line {error.line}' if error.line else ''}: {error}")
    if len(names) > MOST_EVALS:
        problems.append(f"{folder} has {len(names)} evals, and the first {MOST_EVALS} by name are used: remove some")
    return Evals(folder=folder, usable=tuple(usable), problems=tuple(problems))


def why_unused(evaluation: EvaluationSettings, gate: GateSettings) -> str:
    """Say which setting keeps evals from being answered; empty where none does."""
    if gate.action == "off":
        return 'with [gate] action = "off" nothing is scored'
    return "" if evaluation.evals_seconds else "[evaluation] evals_seconds is 0"


class EvalError(Exception):
    """Why a file is not used, in one sentence; `line` 0: it is about the whole file."""

    def __init__(self, message: str, line: int = 0) -> None:
        super().__init__(message)
        self.line = line


def _read_rows(path: Path, account: int) -> tuple[EvalRow, ...]:
    rows: list[EvalRow] = []
    lines_of: dict[str, int] = {}
    for number, text in enumerate(_read(path, account).split(b"\n"), start=1):
        if not text.strip():
            continue
        if len(rows) >= MOST_ROWS:
            raise EvalError(f"it has more than {MOST_ROWS:,} rows: divide it, or leave some out", number)
        row = parse_row(text, number, path.parent)
        if (first := lines_of.setdefault(row.digest, number)) != number:
            raise EvalError(f"it says the same as line {first}: leave one out", number)
        rows.append(row)
    if not rows:
        raise EvalError("it holds no row: write some, or remove it")
    return tuple(rows)


def _read(path: Path, account: int) -> bytes:
    try:
        # Neither a pipe nor a device is waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise EvalError("it is no file")
            if fault := _others_may_write(status, account):
                raise EvalError(fault)
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise EvalError(f"it cannot be read: {error.strerror}") from error
    if len(content) > MOST_BYTES:
        raise EvalError(f"it is larger than {format_bytes(MOST_BYTES)}: divide it, or leave some rows out")
    return content


def _others_may_write(status: os.stat_result, account: int) -> str:
    """Say that others may change what is run here and what the gate judges by; empty where they may not.

    `account` is the daemon's; its files may be open to the group that it has for itself.
    """
    if status.st_uid not in (0, account):
        return f"it belongs to {account_name(status.st_uid)}: give it to {account_name(account)} or to root"
    own_groups = {0}
    with suppress(KeyError):
        own_groups.add(pwd.getpwuid(account).pw_gid)
    by_group = status.st_mode & stat.S_IWGRP and status.st_gid not in own_groups
    if status.st_mode & stat.S_IWOTH or by_group:
        return "other accounts may write to it: `chmod go-w` takes that away"
    return ""


def parse_row(text: bytes, line: int, folder: Path) -> EvalRow:
    """Return the row that a line holds. Raises EvalError."""
    try:
        row = parse_json(text.decode("utf-8-sig" if line == 1 else "utf-8"))
        said = json.dumps(row, sort_keys=True, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, half a character
        raise EvalError(f"it is not JSON: {escape(str(error))}", line) from error
    if not isinstance(row, dict):
        raise EvalError("it is no JSON object: write {...}", line)
    if unknown := sorted(row.keys() - KEYS):
        raise EvalError(f"unknown key {escape(unknown[0])!r}: known are {', '.join(sorted(KEYS))}", line)
    try:
        check = Check(row.get("check", Check.EXACT))
    except ValueError:
        raise EvalError(f"unknown check {escape(str(row['check']))!r}: known are {', '.join(Check)}", line) from None
    try:
        prompt = _prompt(row)
        command = _command(row, check, folder)
        expected = _expected(row, check)
        tolerance = _tolerance(row, check)
    except ValueError as error:
        raise EvalError(str(error), line) from error
    digest = blake2b(said, digest_size=16)
    for argument in command:
        with suppress(OSError, ValueError):
            if (file := folder / argument).is_file() and file.resolve().is_relative_to(folder.resolve()):
                status = file.stat()
                digest.update(_digest_of(file, status.st_mtime_ns, status.st_size))
    return EvalRow(
        line=line,
        prompt=prompt,
        tools=row.get("tools") or None,
        check=check,
        expected=expected,
        tolerance=tolerance,
        command=command,
        digest=digest.hexdigest(),
    )


@lru_cache(maxsize=64)
def _digest_of(file: Path, mtime_ns: int, size: int) -> bytes:
    with file.open("rb") as content:
        return file_digest(content, "blake2b").digest()


def _prompt(row: Mapping[str, Any]) -> str | list[dict[str, Any]]:
    if ("prompt" in row) == ("messages" in row):
        raise ValueError("it needs either prompt or messages")
    asked = row.get("prompt", row.get("messages"))
    if isinstance(asked, str) and "prompt" in row:
        if not asked.strip():
            raise ValueError("its prompt is empty")
        if row.get("tools"):
            raise ValueError("tools belong to messages: a prompt that is text has none")
        return asked
    if not isinstance(asked, list) or not asked or not all(isinstance(message, dict) for message in asked):
        raise ValueError("messages are a list of objects with role and content")
    for number, message in enumerate(asked, start=1):
        if message.get("role") not in ROLES:
            raise ValueError(f"message {number} needs a role: {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            raise ValueError(f"message {number} needs content that is text")
    if asked[-1]["role"] == "assistant":
        raise ValueError("its last message is the assistant's: leave out the answer, which is asked for")
    return asked


def _command(row: Mapping[str, Any], check: Check, folder: Path) -> tuple[str, ...]:
    command = row.get("command")
    if check is not Check.COMMAND:
        if command is not None:
            raise ValueError('command belongs to check = "command"')
        return ()
    if not isinstance(command, list) or not command or not all(isinstance(part, str) for part in command):
        raise ValueError('check "command" needs command, a list of a program and its arguments')
    if any("\0" in part for part in command) or not command[0]:
        raise ValueError("its command names no program")
    if "/" in command[0] and not os.access(folder / command[0], os.X_OK):
        raise ValueError(f"{escape(command[0])} cannot be run: make it executable, or mend its path")
    if "/" not in command[0] and shutil.which(command[0]) is None:
        raise ValueError(f"there is no program {escape(command[0])} on the PATH: name it in full")
    return tuple(command)


def _expected(row: Mapping[str, Any], check: Check) -> Any:
    expected = row.get("expected")
    if check in (Check.EXACT, Check.REGEX) and not isinstance(expected, str):
        raise ValueError(f'check "{check}" needs expected, a text')
    if check is Check.CONTAINS:
        parts = [expected] if isinstance(expected, str) else expected
        if not isinstance(parts, list) or not parts or not all(isinstance(part, str) and part for part in parts):
            raise ValueError('check "contains" needs expected, a text or a list of texts')
    if check is Check.NUMERIC and not _is_number(expected):
        raise ValueError('check "numeric" needs expected, a number')
    if check is Check.REGEX and isinstance(expected, str):
        try:
            re.compile(expected)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"its regular expression cannot be used: {escape(str(error))}") from error
    return expected


def _tolerance(row: Mapping[str, Any], check: Check) -> float:
    tolerance = row.get("tolerance", 0.0)
    if "tolerance" in row and check is not Check.NUMERIC:
        raise ValueError('tolerance belongs to check = "numeric"')
    if not _is_number(tolerance) or tolerance < 0:
        raise ValueError("tolerance is a number, 0 or more")
    return float(tolerance)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max if isinstance(value, int) else math.isfinite(value)
