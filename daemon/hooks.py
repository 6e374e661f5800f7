"""Commands of the administrator's own, run when something happened, with the facts as JSON on stdin.

They come from dropforge.toml alone; nothing in a dropped file or its sidecar reaches their command line. A hook never
delays a job: it runs beside, with a time limit, and its failure is a line in the log.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from daemon.config import HookSettings
from daemon.job import to_json


@dataclass
class _Running:
    name: str
    process: subprocess.Popen[bytes]
    deadline: float  # monotonic


class Hooks:
    """Starts hooks and collects them; one thread calls everything."""

    def __init__(self, settings: HookSettings, log: Any) -> None:
        self.settings = settings
        self._log = log
        self._running: list[_Running] = []

    def fire(self, name: str, facts: Mapping[str, Any]) -> None:
        """Start the hook of that name, if one is configured."""
        command: Sequence[str] = getattr(self.settings, name)
        if not command:
            return
        stdin = os.memfd_create("dropforge-hook")
        try:
            os.write(stdin, to_json({"hook": name, **facts}).encode("ascii"))
            os.lseek(stdin, 0, os.SEEK_SET)
            process = subprocess.Popen(
                list(command),
                stdin=stdin,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            self._log.error("hook.failed", hook=name, error=str(error))
            return
        finally:
            os.close(stdin)
        self._running.append(_Running(name=name, process=process, deadline=time.monotonic() + self.settings.timeout))

    def collect(self) -> None:
        """Take note of hooks that ended, and end those over their time."""
        for hook in list(self._running):
            code = hook.process.poll()
            if code is None and time.monotonic() < hook.deadline:
                continue
            self._running.remove(hook)
            if code is None:
                _end(hook.process)
                self._log.error("hook.failed", hook=hook.name, error=f"ended after {self.settings.timeout:g} s")
            elif code:
                self._log.error("hook.failed", hook=hook.name, error=f"exit code {code}")

    def close(self, patience: float = 2.0) -> None:
        """Give running hooks a moment, then end them."""
        deadline = time.monotonic() + patience
        for hook in self._running:
            try:
                hook.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                _end(hook.process)
        self._running.clear()


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # it ended meanwhile
    process.wait()
