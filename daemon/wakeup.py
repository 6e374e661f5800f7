"""Wakeup: ends the service's sleep; safe to set in a signal handler, a thread, or the loop itself."""

from __future__ import annotations

import os
import select
from typing import Protocol


class SupportsSet(Protocol):
    """What wakes the service."""

    def set(self) -> None: ...


class Wakeup:
    """An event on an eventfd.

    threading.Event is not safe here: a signal handler that sets it can meet the very lock that the interrupted wait holds.
    """

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def set(self) -> None:
        """Wake whoever waits; stays set until cleared."""
        os.eventfd_write(self._fd, 1)

    def clear(self) -> None:
        """Unset it."""
        try:
            os.eventfd_read(self._fd)
        except BlockingIOError:
            return  # it was not set

    def wait(self, timeout: float | None) -> bool:
        """Wait at most `timeout` seconds, without end for None; returns whether it is set."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        return bool(poll.poll(None if timeout is None else max(0.0, timeout) * 1000))

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._fd)
