"""The bell that wakes the service: safe to ring from a signal handler, a thread, or the loop itself."""

from __future__ import annotations

import os
import select


class Wakeup:
    """An event on an eventfd.

    threading.Event is not safe here: a signal handler that sets it can meet the very lock that the interrupted wait holds.
    """

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def set(self) -> None:
        """Ring; it stays rung until cleared."""
        os.eventfd_write(self._fd, 1)

    def clear(self) -> None:
        """Silence it."""
        try:
            os.eventfd_read(self._fd)
        except BlockingIOError:
            return  # it had not been rung

    def is_set(self) -> bool:
        """Whether it has been rung since it was cleared."""
        return self.wait(0)

    def wait(self, timeout: float | None) -> bool:
        """Wait at most `timeout` seconds for it; True when it has been rung."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        return bool(poll.poll(None if timeout is None else max(0.0, timeout) * 1000))

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self._fd)
