"""Processes by identity: a pid alone may belong to somebody else after a restart."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from daemon.text import escape


@dataclass(frozen=True, kw_only=True)
class ProcessIdentity:
    """One process of this machine, for ever: no two share all three."""

    pid: int
    start_ticks: int  # since boot, field 22 of /proc/PID/stat
    boot_id: str

    @property
    def alive(self) -> bool:
        """Whether this very process exists and is more than a zombie."""
        found = identify(self.pid)
        return found == self and _stat(self.pid)[0] not in ("Z", "X")


def boot_id() -> str:
    """The kernel's name for this boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def identify(pid: int) -> ProcessIdentity | None:
    """Who has this pid now, None when nobody has."""
    try:
        ticks = int(_stat(pid)[19])
    except (OSError, IndexError, ValueError):
        return None
    return ProcessIdentity(pid=pid, start_ticks=ticks, boot_id=boot_id())


def _stat(pid: int) -> list[str]:
    """/proc/PID/stat from its third field on (the second may hold spaces and brackets)."""
    text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    return text.rpartition(")")[2].split()


def command_of(pid: int) -> str:
    """The short name of a process, "gone" when there is none."""
    try:
        name = Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return "gone"
    return escape(name)
