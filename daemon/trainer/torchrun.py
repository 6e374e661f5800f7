"""`python -m daemon.trainer.torchrun ARGUMENTS`: torchrun, whose exit code tells whether a process of it was killed.

torchrun itself ends with 1 whatever happened. The processes that are left when one is killed fail as well, each with an
error of its own: only who supervises them knows which was first.
"""

from __future__ import annotations

import sys

KILLED = 128  # and the signal's number, as a shell has it


def killing_signal(code: int) -> int | None:
    """The signal that ended torchrun, or the first of its processes that failed; None when none did."""
    if code < 0:
        return -code
    return code - KILLED if code > KILLED else None


if __name__ == "__main__":
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    try:
        main(sys.argv[1:])
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        _, first = error.get_first_failure()
        sys.exit(KILLED - first.exitcode if first.exitcode < 0 else 1)
