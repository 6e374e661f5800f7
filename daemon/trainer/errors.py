"""A run's failure, typed; torch-free so that every part of the trainer can raise it."""

from __future__ import annotations

from typing import Any

from daemon.job import FailureKind


class RunFailure(Exception):
    """The run cannot succeed as things are; the kind decides what the daemon does next."""

    def __init__(self, kind: FailureKind, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[Any, ...]:
        """It travels whole from the processes that tokenise."""
        return _rebuild, (self.kind, self.message, self.hint)


def _rebuild(kind: FailureKind, message: str, hint: str) -> RunFailure:
    return RunFailure(kind, message, hint=hint)


class Interrupted(Exception):
    """The run was asked to stop before it had anything to save."""
