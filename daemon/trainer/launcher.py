"""Several processes that share one run: torchrun starts them on this machine, this process speaks for them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from daemon.job import FailureKind, Outcome, RunResult, RunSpec
from daemon.processes import die_with_parent, oom_kills
from daemon.run_dir import RESULT_NAME, RunWriter, read_result, worker_dir
from daemon.trainer.attempt import StopFlag
from daemon.trainer.errors import Interrupted, RunFailure
from daemon.trainer.torchrun import killing_signal

LOOK_SECONDS = 0.2


def run_several(spec: RunSpec, report: RunWriter, stop: StopFlag) -> RunResult:
    """Start the processes, pass a request to stop on, and tell what became of them."""
    run_dir = Path(spec.run_dir)
    count = int(spec.recipe["training"]["num_processes"])
    for process in range(count):
        folder = worker_dir(run_dir, process)
        folder.mkdir(exist_ok=True)
        (folder / RESULT_NAME).unlink(missing_ok=True)
    killed_before = oom_kills()
    threads = str(max(1, len(os.sched_getaffinity(0)) // count))
    torchrun = subprocess.Popen(
        [
            *(sys.executable, "-P", "-m", "daemon.trainer.torchrun"),
            *("--standalone", "--nproc-per-node", str(count), "--max-restarts", "0"),
            *("-m", "daemon.trainer.worker", str(run_dir)),
        ],
        stdin=subprocess.DEVNULL,
        # torchrun starts its processes without -P: what lies in the current folder must not be imported.
        env={"OMP_NUM_THREADS": threads, **os.environ, "PYTHONSAFEPATH": "1"},
        preexec_fn=die_with_parent,  # noqa: PLW1509  no threads here
    )
    passed_on = False
    while torchrun.poll() is None:
        if stop.requested and not passed_on:
            passed_on = _ask_one(torchrun.pid)
        time.sleep(LOOK_SECONDS)
    results = sorted(_results(run_dir, count), key=lambda found: found[0])
    failed = [result for _, result in results if result.outcome is Outcome.FAILED]
    if len(results) == count and not failed:  # whatever became of a process after its last word
        return next(result for _, result in results if result.candidate or result.outcome is Outcome.INTERRUPTED)
    # A failure with a type of its own is the cause, also where another process is aborted because of it. The others have
    # only missed somebody: the one that was killed, if one was.
    typed = [result for result in failed if result.failure is not FailureKind.INTERNAL]
    killed_by = killing_signal(torchrun.returncode)
    if typed or (failed and killed_by is None):
        return (typed or failed)[0]
    if stop.requested:
        raise Interrupted
    if killed_by == signal.SIGKILL and oom_kills() > killed_before:
        raise RunFailure(
            FailureKind.OUT_OF_MEMORY,
            "the kernel ran out of memory and killed one of the processes",
            hint="lower per_device_train_batch_size or max_length",
        )
    raise RunFailure(
        FailureKind.LOST,
        f"one of the processes was killed by signal {killed_by}"
        if killed_by
        else f"torchrun ended with {torchrun.returncode}",
        hint="the trainer's log tells more",
    )


def _ask_one(pid: int) -> bool:
    """SIGTERM to the first of torchrun's children; they agree among themselves. False when there is none yet.

    torchrun itself would give them half a minute and then kill them.
    """
    with suppress(OSError, ProcessLookupError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
        if children:
            os.kill(int(children[0]), signal.SIGTERM)
            return True
    return False


def _results(run_dir: Path, count: int) -> list[tuple[int, RunResult]]:
    """(time of writing, result) of the processes that have one."""
    found = (read_result(worker_dir(run_dir, process)) for process in range(count))
    return [result for result in found if result is not None]
