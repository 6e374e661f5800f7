"""Whether a job may run now, by `[schedule]`: before a launch as a hold, while one runs as a reason to leave."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

from daemon.config import Settings
from daemon.errors import ConfigError
from daemon.gpu import Gpu, GpuProbe, GpuUnavailable, choose
from daemon.holds import Hold, HoldKind
from daemon.logins import logged_in
from daemon.processes import command_of
from daemon.retry import StopReason
from daemon.schedule import is_open, parse_hours, resume_celsius, too_hot, why_closed
from daemon.text import escape

LOOK_SECONDS = 2.0  # between two looks at a machine whose job runs
MOST_NAMED = 5


class RunWindow:
    """Looks at the clock, the people and the GPU. One thread calls everything."""

    def __init__(self, probe: GpuProbe, *, sessions: Callable[[], Sequence[str]] = logged_in) -> None:
        """`sessions`: the accounts that are logged in. Raises OSError when it cannot be told."""
        self._probe = probe
        self._sessions = sessions
        self._is_hot = False
        self._looked_at = float("-inf")  # monotonic

    def hold(self, settings: Settings) -> Hold | None:
        """Return what the next launch has to wait for."""
        schedule = settings.schedule
        reason = why_closed(schedule, time.time())
        if not reason and schedule.nobody_logged_in:
            reason = self._who_is_here()
        if not reason and (schedule.gpu_idle or schedule.pause_celsius):
            reason = self._why_not_free(settings)
        return Hold(kind=HoldKind.SCHEDULE, reason=reason) if reason else None

    def stop(self, settings: Settings) -> StopReason | None:
        """Return why the running job has to leave; a checkpoint is sealed first."""
        schedule = settings.schedule
        if time.monotonic() - self._looked_at < LOOK_SECONDS:
            return None
        self._looked_at = time.monotonic()
        if schedule.pause_celsius and self._is_too_hot(settings, _chosen(settings, self._probe.known())):
            return StopReason.TOO_HOT
        if schedule.at_end == "finish":
            return None
        if not is_open(parse_hours(schedule.hours), time.time()):
            return StopReason.WINDOW_ENDED
        return StopReason.LOGGED_IN if schedule.nobody_logged_in and self._who_is_here() else None

    def _who_is_here(self) -> str:
        """Say who is logged in, or that it cannot be told: a machine that may be somebody's is left to him."""
        try:
            names = list(self._sessions())
        except OSError as error:
            return f"{error.strerror or error}; nobody_logged_in under [schedule] cannot be kept"
        told = ", ".join(map(escape, names[:MOST_NAMED]))
        return f"{told} is logged in; jobs start when nobody is ([schedule] nobody_logged_in)" if names else ""

    def _why_not_free(self, settings: Settings) -> str:
        """Say what the GPU is used for by others, or how hot it is; empty without a GPU."""
        schedule = settings.schedule
        try:
            gpu = _chosen(settings, self._probe.fresh())
        except GpuUnavailable:  # the reservation says so
            return ""
        if gpu is None:
            return ""
        others = [f"pid {pid} ({command_of(pid)})" for pid in gpu.processes if pid != os.getpid()]
        if schedule.gpu_idle and others:
            return f"{gpu.name} is in use by {', '.join(others[:MOST_NAMED])}; jobs start when it is idle ([schedule] gpu_idle)"
        if schedule.pause_celsius and gpu.celsius is None:
            return f"the driver does not tell how hot {gpu.name} is; pause_celsius under [schedule] cannot be kept"
        if self._is_too_hot(settings, gpu):
            return f"{gpu.name} has {gpu.celsius:g} degrees Celsius; it goes on at {resume_celsius(schedule):g} ([schedule] pause_celsius)"
        return ""

    def _is_too_hot(self, settings: Settings, gpu: Gpu | None) -> bool:
        """Whether the GPU is too hot, which it stays until it has cooled; remembered between two looks."""
        celsius = gpu.celsius if gpu is not None else None
        self._is_hot = too_hot(settings.schedule, celsius, was_hot=self._is_hot)
        return self._is_hot


def _chosen(settings: Settings, gpus: Sequence[Gpu]) -> Gpu | None:
    try:
        return choose(gpus, settings.gpu.device)
    except ConfigError:  # the reservation says so
        return None
