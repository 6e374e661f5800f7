"""`python -m daemon.trainer.torchrun ARGUMENTS`: torchrun, whose exit code tells whether a process of it was killed.

torchrun itself ends with 1 whatever happened. The processes that are left when one is killed fail as well, each with an
error of its own, and often before anybody has looked at the first: only their exit codes tell who was killed.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterable
from typing import Protocol

KILLED = 128  # and the signal's number, as a shell has it
TOGETHER_SECONDS = (
    1  # torchrun notes whole seconds; the signals that it sends itself come with the first failure, or 30 s later
)


class Failure(Protocol):
    """What torchrun knows of a process that failed: its exit code, as subprocess has it, and the second it was noticed in."""

    exitcode: int
    timestamp: int


def exit_code(failures: Iterable[Failure]) -> int:
    """128 and the signal that killed a process by itself, whichever was noticed first; 1 when none was."""
    failed = sorted(failures, key=lambda failure: failure.timestamp)
    for failure in failed:
        killed = failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM
        if killed and failure.timestamp <= failed[0].timestamp + TOGETHER_SECONDS:
            return KILLED - failure.exitcode
    first = failed[0].exitcode
    return KILLED - first if first < 0 else 1


def killing_signal(code: int) -> int | None:
    """The signal that ended torchrun, or one of its processes; None when none did."""
    if code < 0:
        return -code
    return code - KILLED if code > KILLED else None


if __name__ == "__main__":
    from daemon.trainer.bootstrap import collector_paused

    with collector_paused():
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.run import main

    try:
        main(sys.argv[1:])
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        sys.exit(exit_code(error.failures.values()))
