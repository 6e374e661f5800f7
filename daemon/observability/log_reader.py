"""The log as people read it: one line an event, followed across rotation.

Reading is by inode: a file that was rotated away while it was followed is read to its end before the next one.
"""

from __future__ import annotations

import json
import os
import re
import textwrap
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from daemon.observability.events import CONSOLE_KEYS
from daemon.text import escape, format_bytes, printable
from guard.json_text import parse_json

LEVELS = ("debug", "info", "warning", "error", "critical")
VALUE_CHARACTERS = 2000
CONTINUED = "    "  # before what goes on from the line above
JOB_ID_END = 4  # characters after the last dash of a job's id
_COLOURS = {"debug": "2", "info": "32", "warning": "33", "error": "1;31", "critical": "1;31"}

_FRAME = ("timestamp", "level", "event", "exception")
_SENTENCES = frozenset({"reason", "reasons", "hint", "error", "warnings"})


def brief(event: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a person needs of an event: no zero, no digest, nothing nested, short numbers, its job last.

    Of the events in CONSOLE_KEYS their keys alone; of any other one everything that is short.
    """
    chosen = CONSOLE_KEYS.get(str(event.get("event", "")))
    keys = [key for key in (event if chosen is None else chosen) if key not in _FRAME and key != "job"]
    shown = {key: _brief_value(key, event.get(key), chosen=chosen is not None) for key in (*keys, "job")}
    frame = {key: event[key] for key in _FRAME if key in event}
    return frame | {key: value for key, value in shown.items() if value is not None}


def _brief_value(key: str, value: Any, *, chosen: bool) -> str | int | float | None:
    """Return the short form of a value; None for one that is left out."""
    match value:
        case str():
            if key in _SENTENCES:
                value = _one_line(value)
            return value if value and not _DIGEST.fullmatch(value) else None
        case bool():
            return value or None
        case int() if key.endswith("_bytes"):
            return format_bytes(value) if value else None
        case int() | float():
            return (float(f"{value:.4g}") if isinstance(value, float) else value) or None
        case Mapping() if not chosen:
            return None
        case Mapping() | list() | tuple():
            parts = [_brief_value(key, item, chosen=False) for item in value]
            return "; ".join(str(part) for part in parts if part is not None) or None
    return None if value is None else str(value)


_DIGEST = re.compile("[0-9a-f]{64}")
_BREAK = re.compile(r"\n|\\([\\n])")  # a newline, itself or escaped; an escaped backslash before an n is none


def _one_line(text: str) -> str:
    """Return a text of several lines as one, its lines after semicolons."""
    lines = _BREAK.sub(lambda found: "\n" if found[1] != "\\" else found[0], text).split("\n")
    return "; ".join(line.strip() for line in lines if line.strip())


def format_line(event: Mapping[str, Any], *, colours: bool, short: bool = False, width: int | None = None) -> str:
    """Return `2026-11-23 04:41:07 info  job.started  job=...`: one line, and one for each of a traceback.

    With `short`, for who watches: the time of day alone, a level that is not info, and the end of a job's id, which commands
    take for it. With `width`, of a terminal, a long line goes on in further ones, which are indented.
    """
    level = str(event.get("level", "info"))
    when = escape(str(event.get("timestamp", "")).replace("T", " ")[:19])
    mark = f"{escape(level, most=8):<7}"
    if short:
        when, mark = when[11:], "" if level == "info" else mark.rstrip()
        if isinstance(event.get("job"), str):
            event = {**event, "job": event["job"][-JOB_ID_END:]}
    name = escape(str(event.get("event", "")), most=VALUE_CHARACTERS)
    used = len(" ".join(filter(None, (when, mark, name)))) + 2
    if colours:
        when, mark, name = (
            f"\x1b[2m{when}\x1b[0m",
            mark and f"\x1b[{_COLOURS.get(level, '0')}m{mark}\x1b[0m",
            f"\x1b[1m{name}\x1b[0m",
        )
    data = _wrapped(_data(event, VALUE_CHARACTERS), used, width)
    between = "" if data.startswith("\n") else "  "
    text = f"{' '.join(filter(None, (when, mark, name)))}{between}{data}".rstrip()
    if isinstance(event.get("exception"), str):
        # Each line is marked as part of this event: an error's own text must not pass for another one.
        for part in event["exception"].splitlines():
            text += f"\n    | {escape(part, most=VALUE_CHARACTERS)}"
    return text


def terminal_width(stream: TextIO) -> int | None:
    """Return how wide the terminal is that a stream writes to; None where it writes to none, or to one that does not tell."""
    try:
        return (os.get_terminal_size(stream.fileno()).columns or None) if stream.isatty() else None
    except (OSError, ValueError):
        return None


def _wrapped(text: str, used: int, width: int | None) -> str:
    """Break a text between words, where `used` columns of its first line are taken; a longer word stays whole."""
    if width is None or used + len(text) <= width:
        return text
    taken = "x" * (used - 1)  # a word, so that what does not fit behind it goes on below
    lines = textwrap.wrap(
        f"{taken} {text}",
        width=max(width, len(CONTINUED) + 1),
        subsequent_indent=CONTINUED,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "\n".join([lines[0][used:], *lines[1:]])


def format_data(event: Mapping[str, Any], *, most: int) -> str:
    """Return `job.started  job=... attempt=1`, cut to `most` characters: the event without time and level."""
    text = f"{escape(str(event.get('event', '')))}  {_data(event, most)}".rstrip()
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _data(event: Mapping[str, Any], most: int) -> str:
    return " ".join(f"{escape(str(key))}={_value(value, most)}" for key, value in event.items() if key not in _FRAME)


def _value(value: Any, most: int) -> str:
    """Format one value; a text is quoted unless it is one word, so that it cannot pass for another key."""
    if isinstance(value, str):
        shown = printable(value, most=most)
        return shown if shown and not set(' "=') & set(shown) else '"' + shown.replace('"', '\\"') + '"'
    if isinstance(value, float):
        return f"{value:.6g}"
    shown = json.dumps(value, default=str, ensure_ascii=True)
    return shown if len(shown) <= most else f"{shown[: most - 1]}…"


@dataclass(frozen=True, kw_only=True)
class EventFilter:
    """Which events of the log are shown."""

    job: str = ""  # beginning or end of a job's id
    level: str = "debug"  # the least severe one

    def __call__(self, event: Mapping[str, Any]) -> bool:
        severity = event.get("level")
        if severity in LEVELS and LEVELS.index(str(severity)) < LEVELS.index(self.level):
            return False
        job = str(event.get("job", ""))
        return not self.job or job.startswith(self.job) or job.endswith(self.job)


@dataclass(frozen=True, kw_only=True)
class _LogFile:
    path: Path
    identity: tuple[int, int]  # device and inode


class LogReader:
    """Reads a log and its rotated files (`NAME`, `NAME.1`, ...), oldest first, then whatever is added."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._rest = b""

    def read(self) -> Iterator[tuple[bytes, dict[str, Any]]]:
        """Iterate over the whole lines since the last call, raw and parsed; what is no JSON object is left out."""
        while True:
            yield from self._read_open()
            following = self._following()
            if following is None:
                return
            try:
                opened = following.path.open("rb")
            except FileNotFoundError:
                continue  # rotated in this moment: look again
            if _identity(os.fstat(opened.fileno())) != following.identity:
                opened.close()
                continue  # likewise: another file has that name by now
            # Once more: the last lines may have been written between our read and the rotation.
            yield from self._read_open()
            self.close()
            self._file, self._rest = opened, b""

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _read_open(self) -> Iterator[tuple[bytes, dict[str, Any]]]:
        if self._file is None:
            return
        if os.fstat(self._file.fileno()).st_size < self._file.tell():  # cut in place, as copytruncate does
            self._file.seek(0)
            self._rest = b""
        while block := self._file.read(1 << 20):
            *whole, self._rest = (self._rest + block).split(b"\n")
            for text in whole:
                try:
                    event = parse_json(text)
                except ValueError:
                    continue
                if isinstance(event, dict):
                    yield text, event

    def _following(self) -> _LogFile | None:
        """The file after the open one, None when that is the newest."""
        files = self._files()
        if self._file is None:
            return files[0] if files else None
        ours = _identity(os.fstat(self._file.fileno()))
        places = [number for number, file in enumerate(files) if file.identity == ours]
        if not places:  # it is gone by now: everything that is there is newer
            return files[0] if files else None
        return files[places[0] + 1] if places[0] + 1 < len(files) else None

    def _files(self) -> list[_LogFile]:
        """The log's files, oldest first."""
        prefix = f"{self._path.name}."
        numbered = [
            (int(entry.name.removeprefix(prefix)), entry)
            for entry in self._path.parent.glob(f"{self._path.name}.*")
            if entry.name.removeprefix(prefix).isdecimal()
        ]
        files = []
        for path in [*(entry for _, entry in sorted(numbered, reverse=True)), self._path]:
            try:
                files.append(_LogFile(path=path, identity=_identity(path.stat())))
            except FileNotFoundError:
                continue
        return files


def _identity(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_dev, stat.st_ino


def newest(
    events: Iterable[tuple[bytes, dict[str, Any]]], matches: EventFilter, most: int | None
) -> Iterable[tuple[bytes, dict[str, Any]]]:
    """Return the last `most` events that match, in their order; all of them when it is None."""
    chosen = ((raw, event) for raw, event in events if matches(event))
    return chosen if most is None else deque(chosen, maxlen=most)
