"""The last lines of a terminal in which `dropforge run` trains: progress and the loss so far. Log lines scroll above them.

What the terminal refuses costs these lines and nothing else: the daemon goes on without them.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from daemon.cli.chart import uses_ascii
from daemon.cli.dashboard import running_job
from daemon.observability.journald import is_stderr

REDRAW_SECONDS = 0.5
CHART_LINES = 5
LEAST_LINES = 20  # of a terminal in which a chart leaves room for the log


def open_screen() -> RunScreen | None:
    """Return the screen of a terminal on stderr; None where stderr is none, or one that cannot move its cursor."""
    if is_stderr() or not sys.stderr.isatty() or os.environ.get("TERM", "dumb") == "dumb":
        return None
    return RunScreen(
        Console(stderr=True, highlight=False, markup=False),
        ascii_only=uses_ascii(sys.stderr.encoding, os.environ),
    )


class RunScreen:
    """Draws the running job in place below the log. One thread calls everything; also the stream of a log handler."""

    def __init__(self, console: Console, *, ascii_only: bool = False) -> None:
        self._console = console
        self._ascii_only = ascii_only
        self._live: Live | None = None
        self._drawn: tuple[float, str] = (float("-inf"), "")  # monotonic; the job and its phase
        self._usable = True

    def show(self, job: Mapping[str, Any] | None) -> None:
        """Draw the status file's `job`, at most every REDRAW_SECONDS; None takes the lines away."""
        if job is None:
            self.close()
            return
        now, what = time.monotonic(), f"{job['id']} {job['attempt']} {job['phase']}"
        if not self._usable or (now - self._drawn[0] < REDRAW_SECONDS and what == self._drawn[1]):
            return
        self._drawn = now, what
        try:
            self._draw(job)
        except OSError:  # the terminal is gone
            self._usable, self._live = False, None

    def _draw(self, job: Mapping[str, Any]) -> None:
        width, height = self._console.size
        chart = CHART_LINES if height >= LEAST_LINES else 0
        lines = Group("", *running_job(job, width, chart_lines=chart, ascii_only=self._ascii_only))
        if self._live is None:
            self._live = Live(
                console=self._console,
                auto_refresh=False,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start()
            self._console.show_cursor(True)  # a daemon that is killed could not bring it back
        self._live.update(lines, refresh=True)

    def close(self) -> None:
        """Take the lines away."""
        live, self._live = self._live, None
        self._drawn = (float("-inf"), "")
        if live is not None:
            with suppress(OSError):
                live.stop()

    # -- the stream of a log handler

    def write(self, text: str) -> None:
        """Print a line of the log above the job's lines. Raises OSError."""
        self._console.print(Text.from_ansi(text.removesuffix("\n")), soft_wrap=True)

    def flush(self) -> None:
        """Do nothing: every line is written at once."""
