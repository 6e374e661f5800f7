"""Executors: ways to run a trainer."""

from __future__ import annotations

from daemon.config import ExecutorSettings
from daemon.executors.base import Executor
from daemon.executors.local import LocalExecutor
from daemon.gpu import GpuLock


def make_executor(settings: ExecutorSettings, *, gpu: GpuLock | None = None) -> Executor:
    """Return the executor that the settings ask for. Only our own trainer, in our own environment, can be forked."""
    own = ExecutorSettings.model_fields["command"].default
    if settings.warm_start and settings.command == own:
        from daemon.executors.forked import ForkedExecutor

        return ForkedExecutor(settings.command, idle_seconds=settings.idle_timeout, gpu=gpu)
    return LocalExecutor(settings.command, gpu=gpu)
