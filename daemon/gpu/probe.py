"""What the GPUs are doing, asked in a thread: a driver in trouble may never answer, and the daemon goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from daemon import gpu
from daemon.gpu import Gpu

ASK_SECONDS = 10.0
PATIENCE_SECONDS = 5.0


class GpuSilent(Exception):
    """The driver has not answered in time."""


class GpuProbe:
    """One thread calls everything here; another waits for the driver."""

    def __init__(self, ask: Callable[[], tuple[Gpu, ...]] = gpu.devices) -> None:
        self._ask = ask
        self._known: tuple[Gpu, ...] = ()
        self._asked_at = float("-inf")
        self._question: threading.Thread | None = None

    def known(self) -> tuple[Gpu, ...]:
        """The devices as they were told last; asks again when that is old, and never waits."""
        if time.monotonic() - self._asked_at >= ASK_SECONDS:
            self._start()
        return self._known

    def fresh(self) -> tuple[Gpu, ...]:
        """The devices as they are now. Waits PATIENCE_SECONDS at most, and once for a driver that is silent.

        Raises GpuSilent.
        """
        question = self._start()
        question.join(max(0.0, self._asked_at + PATIENCE_SECONDS - time.monotonic()))
        if question.is_alive():
            raise GpuSilent
        return self._known

    def _start(self) -> threading.Thread:
        """Put the question, unless the driver still owes the answer to the last one."""
        if self._question is None or not self._question.is_alive():
            self._asked_at = time.monotonic()
            self._question = threading.Thread(target=self._wait, name="gpu", daemon=True)
            self._question.start()
        return self._question

    def _wait(self) -> None:
        self._known = self._ask()
