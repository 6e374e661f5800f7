"""Child processes: they end with the daemon, and how they ended is told in words."""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """Let the kernel kill this process when the thread that started it ends; leave at once if that has happened."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(1)


def describe_exit(returncode: int) -> str:
    """A child's return code as subprocess gives it (negative: the signal), in words."""
    if returncode >= 0:
        return f"it ended with exit code {returncode}"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = f"signal {-returncode}"
    return f"it was ended by {name}" + (", as the kernel does when memory runs out" if name == "SIGKILL" else "")


def environment() -> dict[str, str]:
    """For a child that runs one of our modules: it imports these very packages, also from a checkout, and sees no GPU.

    A running job has that to itself, and a library may open it at its import.
    """
    own = str(Path(__file__).resolve().parent.parent)
    rest = os.environ.get("PYTHONPATH")
    path = f"{own}{os.pathsep}{rest}" if rest else own
    return {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
