"""What every trainer process does around its run: read the specification, hear signals, write the result.

Torch-free, so that a run can fail with a clear sentence before seconds of imports, and so that another engine (the tests'
quick one) runs in the same code.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from daemon.errors import is_no_space
from daemon.job import FailureKind, Outcome, RunResult, RunSpec
from daemon.processes import die_with_parent, prefer_oom_kill
from daemon.run_dir import RunWriter, read_spec
from daemon.trainer import distributed
from daemon.trainer.errors import Interrupted, RunFailure
from guard import FileChanged, GuardError, ModelLocked, UsageError, WeightsNotFinite, digest_file
from guard.atomic import fsync_dir, fsync_tree

EXIT_CODES = {Outcome.SUCCEEDED: 0, Outcome.FAILED: 1, Outcome.INTERRUPTED: 75}


class StopFlag:
    """Set by SIGTERM or SIGINT: finish the step, seal a checkpoint, exit."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._request)

    def _request(self, number: int, frame: object) -> None:
        self.requested = True

    def check(self) -> None:
        """Raise Interrupted where nothing has been trained yet and so nothing needs saving."""
        if self.requested:
            raise Interrupted


Engine = Callable[[RunSpec, RunWriter, StopFlag], RunResult]


def run_attempt(
    run_dir: Path,
    load_engine: Callable[[], Engine],
    *,
    load_launcher: Callable[[], Engine] | None = None,
    worker_dir: Path | None = None,
) -> int:
    """Run one attempt in this process and write `result.json`; returns the exit code.

    `load_engine` does the heavy imports; `load_launcher` loads the engine for a recipe of several processes. One of those
    has `worker_dir`, and writes its result there. A process that ends without a result (SIGKILL, a crash of the
    interpreter) is known by that: the daemon calls the run lost.
    """
    stop = StopFlag()
    # SIGTERM: the run seals a checkpoint and exits, never an orphan. A worker has nothing to save by itself: it goes when
    # its launcher does.
    die_with_parent(by=signal.SIGTERM if worker_dir is None else signal.SIGKILL)
    prefer_oom_kill()
    # Of several workers the main one writes the run's events and progress.
    silent = worker_dir is not None and not distributed.is_main_process()
    writer = RunWriter(worker_dir if worker_dir and silent else run_dir, result_dir=worker_dir)
    try:
        spec = require_spec(run_dir)
        if spec.daemon_pid and worker_dir is None and os.getppid() != spec.daemon_pid:
            raise Interrupted  # the daemon died before the death signal was set
        if spec.gpu:  # also for a fork of the server, which has started no CUDA yet
            os.environ["CUDA_VISIBLE_DEVICES"] = spec.gpu
        writer.progress(phase="starting")
        stop.check()
        shared = spec.recipe.get("training", {}).get("num_processes", 1) > 1
        engine = load_launcher() if shared and load_launcher is not None else load_engine()
        result = engine(spec, writer, stop)
        if result.candidate is not None:  # the result is durable, so what it names is so before
            fsync_tree(result.candidate)
            fsync_dir(Path(result.candidate).parent)
    # The last line of defence: whatever a library raises becomes a typed result, with its traceback in the log.
    except Exception as error:
        if not isinstance(error, Interrupted | RunFailure | GuardError):
            traceback.print_exc()
        result = result_of(error)
    writer.result(result)
    return EXIT_CODES[result.outcome]


def result_of(error: Exception) -> RunResult:
    """Return the typed result of a run that ended with `error`."""
    match error:
        case Interrupted():
            return RunResult(outcome=Outcome.INTERRUPTED, message="stopped before the first step")
        case RunFailure():
            return replace(failed(error.kind, error.message, error.hint), tried=error.tried)
        case FileChanged():
            return failed(FailureKind.BAD_DATA, error.cause, "drop a finished copy")
        case ModelLocked():
            return failed(FailureKind.LOST, str(error), "the job is tried again when the model directory is free")
        case WeightsNotFinite():
            return failed(FailureKind.DIVERGED, error.cause, "lower learning_rate; nothing of this run is promoted")
        case GuardError():
            return failed(kind_of(error), f"cannot {error.operation} {error.path}: {error.cause}", error.hint)
        case OSError():
            return failed(kind_of(error), str(error), "free some space" if is_no_space(error) else "")
    message = f"{type(error).__name__}: {error}"
    if is_out_of_memory(error):
        return failed(FailureKind.OUT_OF_MEMORY, message)  # what to do about it, the daemon decides
    return failed(FailureKind.INTERNAL, message, "the traceback is in the trainer's log")


def failed(kind: FailureKind, message: str, hint: str = "") -> RunResult:
    """Return a failed result with its reason."""
    return RunResult(outcome=Outcome.FAILED, failure=kind, message=message, hint=hint)


def kind_of(error: GuardError | OSError) -> FailureKind:
    """Return NO_SPACE for a full disk, CONFIG for what a user must set right (a key file open to others), else INTERNAL."""
    if is_no_space(error):
        return FailureKind.NO_SPACE
    return FailureKind.CONFIG if isinstance(error, UsageError) else FailureKind.INTERNAL


def is_out_of_memory(error: Exception) -> bool:
    """Return whether a device or the machine had no memory left; without importing torch, which may not be loaded."""
    # On the CPU torch has no class of its own for it.
    on_cpu = "DefaultCPUAllocator: can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or on_cpu


def exit_process(run: Callable[[], int]) -> NoReturn:
    """Call `run` and exit with its code, whatever libraries do at exit.

    As the interpreter does: join non-daemon threads, call the exit handlers (one that reports the run elsewhere closes it
    there), flush the streams. Then the kernel ends the process, not the interpreter: a library's thread that drops a Python
    object during finalisation, as gloo's does after a collective, aborts it.
    """
    code = 1
    try:
        code = run()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        for step in (threading._shutdown, atexit._run_exitfuncs, sys.stdout.flush, sys.stderr.flush):  # type: ignore[attr-defined]
            with suppress(Exception):
                step()
        os._exit(code)


def require_spec(run_dir: Path) -> RunSpec:
    """Return the specification that the daemon wrote. Raises RunFailure(INTERNAL) when it is of another version."""
    try:
        return read_spec(run_dir)
    except ValueError as error:
        raise RunFailure(
            FailureKind.INTERNAL,
            str(error),
            hint="daemon and trainer must be of one installation; restart the daemon",
        ) from error


def check_unchanged(spec: RunSpec) -> None:
    """Raise RunFailure(BAD_DATA) unless the dataset's bytes are those that were checked, whoever holds the file open."""
    if digest_file(Path(spec.dataset.path)).blake3_hex != spec.dataset.digest:
        raise RunFailure(
            FailureKind.BAD_DATA,
            f"{spec.dataset.name} changed after it was checked",
            hint="a program still writes to it; drop a finished copy",
        )
