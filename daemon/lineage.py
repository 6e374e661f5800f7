"""The lineage of a model directory: which versions were made, in which order, and which became current.

Append-only, each line with the digest of the one before it. It is the authority: it says which numbers were used, also
when a version's folder is gone, and which version is current when `latest` is lost.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from guard.atomic import append_line_durable
from guard.json_text import parse_json

LINEAGE = "lineage.jsonl"
VERSION_NAME = re.compile(r"[0-9]{4,18}")
PROMOTED, HELD, DISCARDED = "promoted", "held", "discarded"  # events about one version
ROLLED_BACK = "rolled_back"
PRUNED = "pruned"  # names several versions, and the current one as `version`
TAIL_BYTES = 65_536  # of a lineage's end, where its last line is looked for first


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """The events of a model directory's lineage, oldest first, and where their chain breaks."""

    events: tuple[Mapping[str, Any], ...] = ()
    broken: tuple[str, ...] = ()  # a sentence for each line that does not follow from the one before

    @property
    def newest_number(self) -> int:
        """The highest number that any line names as a version or as used elsewhere; 0 before the first."""
        return max(map(_newest_in, self.events), default=0)

    @property
    def _made_current(self) -> Mapping[str, Any] | None:
        """The last line that made a version current; what was held or discarded never was."""
        others = (HELD, DISCARDED, PRUNED)
        return next((event for event in reversed(self.events) if event.get("event") not in others), None)

    @property
    def rolled_back(self) -> Mapping[str, Any] | None:
        """The rollback that made the current version current; None where something else did."""
        last = self._made_current
        return last if last is not None and last.get("event") == ROLLED_BACK else None

    @property
    def current(self) -> str | None:
        """The version that the last line made current."""
        last = self._made_current
        named = last.get("version") if last is not None else None
        return None if named is None else str(named)

    def recorded(self) -> dict[str, Mapping[str, Any]]:
        """What was noted when each version was promoted or held, by its name; not of those that were discarded."""
        found: dict[str, Mapping[str, Any]] = {}
        for event in self.events:
            name = str(event.get("version") or "")
            if name and event.get("event") in (PROMOTED, HELD):
                found[name] = event
            elif event.get("event") == DISCARDED:
                found.pop(name, None)
        return found

    def held(self) -> list[str]:
        """The versions that the gate keeps from becoming current, oldest first."""
        return sorted((name for name, event in self.recorded().items() if event.get("event") == HELD), key=number_of)

    def pruned(self) -> set[str]:
        """The versions that were moved aside to save room; one that was brought back since has its folder again."""
        named = (event.get("pruned") for event in self.events if event.get("event") == PRUNED)
        return {str(name) for names in named if isinstance(names, list) for name in names}

    def taken_away(self) -> set[str]:
        """The versions that may be gone from `versions/`, because somebody moved them aside or gave them up."""
        return self.pruned() | self.discarded().keys()

    def discarded(self) -> dict[str, Mapping[str, Any]]:
        """What was noted of each version that was held and then given up, by its name."""
        given_up = (event for event in self.events if event.get("event") == DISCARDED and event.get("version"))
        return {str(event["version"]): event for event in given_up}


def read_lineage(model_dir: Path) -> Lineage:
    """Read `lineage.jsonl`; empty where there is none. Raises OSError."""
    events: list[Mapping[str, Any]] = []
    broken: list[str] = []
    before = b""
    try:
        lines = (model_dir / LINEAGE).read_bytes().splitlines()
    except FileNotFoundError:
        return Lineage()
    for number, line in enumerate(lines, start=1):
        event = _event_in(line)
        # Torn by a crash: it was never acknowledged, and was written again. The next line tells one that was altered.
        if event is None:
            continue
        # Lines of before there was a chain have no `previous`; from the first that has one, all must.
        if event.get("previous", None if not _chained(events) else "") not in (None, _line_digest(before)):
            broken.append(f"line {number} of {LINEAGE} does not follow from the line before it")
        events.append(event)
        before = line
    return Lineage(events=tuple(events), broken=tuple(broken))


@dataclass(frozen=True, kw_only=True)
class _ReadPart:
    """The beginning of a lineage that was read already, up to the end of a line."""

    size_bytes: int = 0
    digest: bytes = b""  # BLAKE3
    newest: int = 0


_read_parts: dict[Path, _ReadPart] = {}  # of the lineages that this process asks for again and again
MOST_READ_PARTS = 16


def newest_number(model_dir: Path) -> int:
    """Return `read_lineage(model_dir).newest_number`; what was parsed at an earlier call is only compared.

    Raises OSError.
    """
    path = model_dir / LINEAGE
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return 0
    part = _read_parts.get(path, _ReadPart())
    if _digest(content[: part.size_bytes]) != part.digest:  # it was replaced, or altered
        part = _ReadPart()
    end = content.rfind(b"\n") + 1  # a last line without one may still be written
    if end > part.size_bytes:
        newest = max(part.newest, _newest_of(content[part.size_bytes : end]))
        part = _ReadPart(size_bytes=end, digest=_digest(content[:end]), newest=newest)
        if len(_read_parts) >= MOST_READ_PARTS:
            _read_parts.clear()
        _read_parts[path] = part
    return max(part.newest, _newest_of(content[end:]))


def number_of(name: Any) -> int:
    """The number that a version's name stands for; 0 of what is none."""
    return int(name) if isinstance(name, str) and VERSION_NAME.fullmatch(name) else 0


def append_event(model_dir: Path, event: Mapping[str, Any]) -> None:
    """Append one line that carries the digest of the last whole one. Raises OSError."""
    path = model_dir / LINEAGE
    append_line_durable(path, json.dumps({**event, "previous": _line_digest(_last_line(path))}))


def _last_line(path: Path) -> bytes:
    """The last line that is an event; empty where there is none. However long the file is, its end is read alone."""
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        for start in (max(0, size - TAIL_BYTES), 0):
            file.seek(start)
            lines = file.read().splitlines()
            whole = lines if start == 0 else lines[1:]  # the first may be the end of a longer one
            found = next((line for line in reversed(whole) if _event_in(line) is not None), None)
            if found is not None:
                return found
    return b""


def _event_in(line: bytes) -> Mapping[str, Any] | None:
    """The event of a line; None of one that is none."""
    try:
        event = parse_json(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and (event.get("version") or event.get("used")) else None


def _chained(events: Sequence[Mapping[str, Any]]) -> bool:
    return bool(events) and "previous" in events[-1]


def _line_digest(line: bytes) -> str:
    """BLAKE3 of a line without its newline, 32 hex characters."""
    return blake3(line).hexdigest(length=16)


def _digest(content: bytes) -> bytes:
    return blake3(content).digest()


def _newest_of(content: bytes) -> int:
    """The highest number that any of these lines names; 0 when none does."""
    return max(map(_newest_in, filter(None, map(_event_in, content.splitlines()))), default=0)


def _newest_in(event: Mapping[str, Any]) -> int:
    return max(number_of(event.get("version")), number_of(event.get("used")))
