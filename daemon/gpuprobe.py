"""What the GPUs are doing, as nvidia-smi tells it: asked now and then, and never waited for."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from typing import IO, TypedDict

from daemon.text import escape

ASK_SECONDS = 10.0
PATIENCE_SECONDS = 8.0  # a driver in trouble may never answer
_QUERY = ("--query-gpu=name,memory.used,memory.total,utilization.gpu", "--format=csv,noheader,nounits")


class Gpu(TypedDict):
    """One device."""

    name: str
    used_bytes: int
    total_bytes: int
    utilization: float | None  # 0 to 1


class GpuProbe:
    """Call `look` at each tick; it returns what is known, and asks again when that is old."""

    def __init__(self) -> None:
        self._program = shutil.which("nvidia-smi")
        self._known: tuple[Gpu, ...] = ()
        self._asked_at = float("-inf")
        self._child: subprocess.Popen[bytes] | None = None
        self._answer: IO[bytes] | None = None

    def look(self) -> tuple[Gpu, ...]:
        """The devices as they were told last; empty without nvidia-smi or without an answer."""
        if self._program is None:
            return ()
        now = time.monotonic()
        if self._child is not None:
            self._collect(self._child, now)
        elif now - self._asked_at >= ASK_SECONDS:
            self._ask(self._program, now)
        return self._known

    def close(self) -> None:
        """End what still runs."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            self._child = None
        if self._answer is not None:
            self._answer.close()
            self._answer = None

    def _ask(self, program: str, now: float) -> None:
        self._asked_at = now
        self._answer = tempfile.TemporaryFile()  # noqa: SIM115  read at a later tick; a pipe could fill and block
        try:
            self._child = subprocess.Popen(
                [program, *_QUERY], stdin=subprocess.DEVNULL, stdout=self._answer, stderr=subprocess.DEVNULL
            )
        except OSError:
            self.close()

    def _collect(self, child: subprocess.Popen[bytes], now: float) -> None:
        code = child.poll()
        if code is None and now - self._asked_at < PATIENCE_SECONDS:
            return
        text = b""
        if code == 0 and self._answer is not None:
            self._answer.seek(0)
            text = self._answer.read(65_536)
        self.close()
        self._known = parse(text.decode("utf-8", "replace"))


def parse(text: str) -> tuple[Gpu, ...]:
    """nvidia-smi's lines `name, MiB used, MiB in all, per cent busy`; a line of another form is left out."""
    found = []
    for line in text.splitlines():
        name, *values = (part.strip() for part in line.rsplit(",", 3))
        try:
            used, total = int(values[0]), int(values[1])
        except (ValueError, IndexError):
            continue
        busy = values[2]
        found.append(
            Gpu(
                name=escape(name, most=60),
                used_bytes=used * 2**20,
                total_bytes=total * 2**20,
                utilization=int(busy) / 100 if busy.isdecimal() else None,
            )
        )
    return tuple(found)
