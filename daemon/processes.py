"""Processes: who they are, how they end, and what a child of ours gets along."""

from __future__ import annotations

import ctypes
import grp
import os
import pwd
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from daemon.text import escape

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
VMSTAT = Path("/proc/vmstat")


@dataclass(frozen=True, kw_only=True)
class ProcessIdentity:
    """One process of this machine, for ever: no two share all three, while a pid alone is given again."""

    pid: int
    start_ticks: int  # since boot, field 22 of /proc/PID/stat
    boot_id: str

    @property
    def alive(self) -> bool:
        """Whether this very process exists and is more than a zombie."""
        return identify(self.pid) == self and _stat(self.pid)[0] not in ("Z", "X")


def identify(pid: int) -> ProcessIdentity | None:
    """Return who has this pid now, None when nobody has."""
    try:
        ticks = int(_stat(pid)[19])
    except (OSError, IndexError, ValueError):
        return None
    return ProcessIdentity(pid=pid, start_ticks=ticks, boot_id=boot_id())


def boot_id() -> str:
    """Return the kernel's name for this boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def command_of(pid: int) -> str:
    """Return the short name of a process, "gone" when there is none."""
    try:
        name = Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return "gone"
    return escape(name)


def account_name(uid: int) -> str:
    """Return the name of an account, `user 4001` for one without."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def group_name(gid: int) -> str:
    """Return the name of a group, its number for one without."""
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def _stat(pid: int) -> list[str]:
    """/proc/PID/stat from its third field on (the second may hold spaces and brackets)."""
    text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    return text.rpartition(")")[2].split()


def child_environment() -> dict[str, str]:
    """Return the environment for a child that runs one of our modules: these very packages, and no GPU.

    A running job has the GPU to itself, and a library may open it at its import.
    """
    own = str(Path(__file__).resolve().parent.parent)
    rest = os.environ.get("PYTHONPATH")
    path = f"{own}{os.pathsep}{rest}" if rest else own
    return {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}


def die_with_parent(parent_pid: int | None = None, *, by: signal.Signals = signal.SIGKILL) -> None:
    """Let the kernel send this process a signal when the thread that started it ends.

    With `parent_pid`, leave at once when that parent is gone already.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, by, 0, 0, 0)
    if parent_pid is not None and os.getppid() != parent_pid:
        os._exit(1)


def adopt_orphans() -> None:
    """Make this process the parent of its descendants whose own parent ends, so that it can reap them."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def prefer_oom_kill() -> None:
    """Let the kernel end this process rather than the daemon when the machine runs out of memory."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500", encoding="ascii")


def oom_kills(path: Path = VMSTAT) -> int:
    """Return how many processes the kernel killed for want of memory since boot; 0 when it does not say."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def signal_name(number: int) -> str:
    """Return `SIGTERM` for 15, `signal 99` for one without a name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def describe_exit(returncode: int) -> str:
    """Describe a child's return code as subprocess gives it (negative: the signal)."""
    if returncode >= 0:
        return f"it ended with exit code {returncode}"
    name = signal_name(-returncode)
    return f"it was ended by {name}" + (", as the kernel does when memory runs out" if name == "SIGKILL" else "")
