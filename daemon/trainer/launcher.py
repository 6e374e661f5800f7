"""Several processes that share one run: this process starts them through torchrun and reports for all of them.

`python -m daemon.trainer.launcher ARGUMENTS` is torchrun itself, with an exit code that tells whether a worker was killed.
torchrun alone ends with 1 whatever happened, and the workers that are left when one is killed fail as well, each with an
error of its own and often before anybody has looked at the first: only their exit codes tell who was killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from daemon.job import FailureKind, Outcome, RunResult, RunSpec
from daemon.processes import die_with_parent, oom_kills
from daemon.run_dir import RESULT_NAME, RunWriter, read_result, worker_dir
from daemon.trainer.attempt import StopFlag
from daemon.trainer.errors import Interrupted, RunFailure

POLL_SECONDS = 0.2
KILLED = 128  # plus the signal's number, as a shell has it
# torchrun notes whole seconds. The signals that it sends itself come with the first failure, or 30 s later.
SAME_TIME_SECONDS = 1


def launch(spec: RunSpec, writer: RunWriter, stop: StopFlag) -> RunResult:
    """Start the workers, forward a stop request, and return the run's result.

    Raises RunFailure when a worker was killed or torchrun failed, Interrupted when the workers stopped without a result.
    """
    run_dir = Path(spec.run_dir)
    num_processes = int(spec.recipe["training"]["num_processes"])
    for rank in range(num_processes):
        folder = worker_dir(run_dir, rank)
        folder.mkdir(exist_ok=True)
        (folder / RESULT_NAME).unlink(missing_ok=True)
    oom_kills_before = oom_kills()
    torchrun = _start_torchrun(run_dir, num_processes)
    forwarded = False
    while torchrun.poll() is None:
        if stop.requested and not forwarded:
            forwarded = _terminate_first_worker(torchrun.pid)
        time.sleep(POLL_SECONDS)
    results = [found for rank in range(num_processes) if (found := read_result(worker_dir(run_dir, rank)))]
    result = decide_result(
        [result for _, result in sorted(results, key=lambda found: found[0])],
        num_processes=num_processes,
        killed_by=killing_signal(torchrun.returncode),
    )
    if result is not None:
        return result
    if stop.requested:
        raise Interrupted
    raise _unexplained(torchrun.returncode, oom_killed=oom_kills() > oom_kills_before)


def decide_result(results: list[RunResult], *, num_processes: int, killed_by: int | None) -> RunResult | None:
    """Return the run's result from its workers' (oldest first), None when they do not explain how it ended."""
    failures = [result for result in results if result.outcome is Outcome.FAILED]
    if len(results) == num_processes and not failures:  # whatever became of a worker after its result
        return next(result for result in results if result.candidate or result.outcome is Outcome.INTERRUPTED)
    # A failure with a type of its own is the cause, also where another worker is aborted because of it. The others have
    # only lost their connection, to the worker that was killed if one was.
    typed = [result for result in failures if result.failure is not FailureKind.INTERNAL]
    if typed:
        return typed[0]
    return failures[0] if failures and killed_by is None else None


def _start_torchrun(run_dir: Path, num_processes: int) -> subprocess.Popen[bytes]:
    threads = str(max(1, len(os.sched_getaffinity(0)) // num_processes))
    return subprocess.Popen(
        [
            *(sys.executable, "-P", "-m", "daemon.trainer.launcher"),
            *("--standalone", "--nproc-per-node", str(num_processes), "--max-restarts", "0"),
            *("-m", "daemon.trainer.worker", str(run_dir)),
        ],
        stdin=subprocess.DEVNULL,
        # torchrun starts its processes without -P: what is in the current folder must not be imported.
        env={"OMP_NUM_THREADS": threads, **os.environ, "PYTHONSAFEPATH": "1"},
        preexec_fn=die_with_parent,  # noqa: PLW1509  no threads here
    )


def _terminate_first_worker(torchrun_pid: int) -> bool:
    """Send SIGTERM to one worker; they agree among themselves. Returns False when there is none yet.

    torchrun itself would give them half a minute and then kill them.
    """
    with suppress(OSError, ProcessLookupError):
        children = Path(f"/proc/{torchrun_pid}/task/{torchrun_pid}/children").read_text(encoding="ascii").split()
        if children:
            os.kill(int(children[0]), signal.SIGTERM)
            return True
    return False


def _unexplained(returncode: int, *, oom_killed: bool) -> RunFailure:
    """Return the failure of a run whose workers left no result that explains it."""
    killed_by = killing_signal(returncode)
    if killed_by == signal.SIGKILL and oom_killed:
        return RunFailure(FailureKind.OUT_OF_MEMORY, "the kernel ran out of memory and killed one of the processes")
    return RunFailure(
        FailureKind.LOST,
        f"one of the processes was killed by signal {killed_by}"
        if killed_by
        else f"torchrun exited with code {returncode}",
        hint="the trainer's log tells more",
    )


class WorkerFailure(Protocol):
    """What torchrun knows of a worker that failed: its exit code, as subprocess has it, and the second it was noticed in."""

    exitcode: int
    timestamp: int


def exit_code(failures: Iterable[WorkerFailure]) -> int:
    """Return KILLED plus the signal that killed a worker by itself, whichever was noticed first; 1 when none was."""
    failed = sorted(failures, key=lambda failure: failure.timestamp)
    for failure in failed:
        killed = failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM
        if killed and failure.timestamp <= failed[0].timestamp + SAME_TIME_SECONDS:
            return KILLED - failure.exitcode
    first = failed[0].exitcode
    return KILLED - first if first < 0 else 1


def killing_signal(returncode: int) -> int | None:
    """Return the signal that ended torchrun or one of its workers, None when none did."""
    if returncode < 0:
        return -returncode
    return returncode - KILLED if returncode > KILLED else None


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
