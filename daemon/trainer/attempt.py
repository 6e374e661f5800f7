"""What every trainer process does around its run: read the specification, hear signals, write the last word.

Torch-free, so that a run can fail with a clear sentence before seconds of imports, and so that another engine (the tests'
quick one) is conducted by the same code.
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
from pathlib import Path
from typing import NoReturn

from daemon.errors import is_no_space
from daemon.job import FailureKind, Outcome, RunResult, RunSpec
from daemon.processes import die_with_parent, prefer_oom_kill
from daemon.run_dir import RunWriter, read_spec
from daemon.trainer.errors import Interrupted, RunFailure
from guard import FileChanged, GuardError, ModelLocked, UsageError, WeightsNotFinite, digest_file

EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED = 0, 1, 75


class StopFlag:
    """Set by SIGTERM or SIGINT: finish the step, seal a checkpoint, leave."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: object) -> None:
        self.requested = True

    def check(self) -> None:
        """Raise Interrupted where nothing has been trained yet and so nothing needs saving."""
        if self.requested:
            raise Interrupted


Engine = Callable[[RunSpec, RunWriter, StopFlag], RunResult]


def conduct(
    run_dir: Path,
    load_engine: Callable[[], Engine],
    *,
    load_several: Callable[[], Engine] | None = None,
    member: Path | None = None,
) -> int:
    """Run one attempt in this process and write `result.json`; returns the exit code.

    `load_engine` does the heavy imports; `load_several` loads the engine for a recipe of several processes, one of which
    has its own folder `member` and writes its result there. A run that ends without a result (SIGKILL, a crash of the
    interpreter) is told apart by that: the daemon calls it lost.
    """
    stop = StopFlag()
    # SIGTERM: the run seals a checkpoint and leaves, never an orphan. One of several has nothing to save by itself: it goes
    # when the process that speaks for all of them does.
    die_with_parent(by=signal.SIGTERM if member is None else signal.SIGKILL)
    prefer_oom_kill()
    home = member or run_dir
    report = RunWriter(home if member and os.environ.get("RANK") != "0" else run_dir, result_dir=home)
    try:
        spec = require_spec(run_dir)
        if spec.daemon_pid and member is None and os.getppid() != spec.daemon_pid:
            raise Interrupted  # the daemon died before the death signal was set
        if spec.gpu:  # also for a fork of a warm process, which has started no CUDA yet
            os.environ["CUDA_VISIBLE_DEVICES"] = spec.gpu
        report.progress(phase="starting")
        stop.check()
        several = load_several is not None and spec.recipe.get("training", {}).get("num_processes", 1) > 1
        result = (load_several if several and load_several else load_engine)()(spec, report, stop)
    except Interrupted:
        result = RunResult(outcome=Outcome.INTERRUPTED, message="stopped before the first step")
    except RunFailure as failure:
        result = failed(failure.kind, failure.message, failure.hint)
    except FileChanged as error:
        result = failed(FailureKind.BAD_DATA, error.cause, "drop a finished copy")
    except ModelLocked as error:
        result = failed(FailureKind.LOST, str(error), "the job is tried again when the model directory is free")
    except WeightsNotFinite as error:
        result = failed(FailureKind.DIVERGED, error.cause, "lower learning_rate; nothing of this run is promoted")
    except GuardError as error:
        result = failed(kind_of(error), f"cannot {error.operation} {error.path}: {error.cause}", error.hint)
    except OSError as error:
        traceback.print_exc()
        result = failed(kind_of(error), str(error), "free some space" if is_no_space(error) else "")
    # The last line of defence: whatever else a library raises becomes a typed result, with its traceback in the log.
    except Exception as error:
        traceback.print_exc()
        result = failed(*_classify(error))
    report.result(result)
    return {Outcome.SUCCEEDED: EXIT_DONE, Outcome.FAILED: EXIT_FAILED, Outcome.INTERRUPTED: EXIT_INTERRUPTED}[
        result.outcome
    ]


def end(run: Callable[[], int]) -> NoReturn:
    """Do the run, and end with its exit code, whatever happens.

    As the interpreter ends: threads that are to be waited for, what libraries registered for the end (one that reports
    the run elsewhere says there that it is over), the streams. Then the kernel takes the process, not the interpreter: a
    library's thread that lets go of a Python object while that goes down, as gloo's does after a collective, aborts it.
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


def kind_of(error: GuardError | OSError) -> FailureKind:
    """A full disk waits for room, a wrong setting (a key file open to others) for a person; the rest is tried again."""
    if is_no_space(error):
        return FailureKind.NO_SPACE
    return FailureKind.CONFIG if isinstance(error, UsageError) else FailureKind.INTERNAL


def failed(kind: FailureKind, message: str, hint: str = "") -> RunResult:
    """A result that says why."""
    return RunResult(outcome=Outcome.FAILED, failure=kind, message=message, hint=hint)


def require_spec(run_dir: Path) -> RunSpec:
    """The specification that the daemon wrote. Raises RunFailure(INTERNAL) when it is of another version."""
    try:
        return read_spec(run_dir)
    except ValueError as error:
        raise RunFailure(
            FailureKind.INTERNAL,
            str(error),
            hint="daemon and trainer must be of one installation; restart the daemon",
        ) from error


def check_unchanged(spec: RunSpec) -> None:
    """The bytes that were checked are the bytes that are trained, whoever still holds the file open."""
    if digest_file(Path(spec.dataset.path)).blake3_hex != spec.dataset.digest:
        raise RunFailure(
            FailureKind.BAD_DATA,
            f"{spec.dataset.name} changed after it was checked",
            hint="a program still writes to it; drop a finished copy",
        )


def _classify(error: Exception) -> tuple[FailureKind, str, str]:
    message = f"{type(error).__name__}: {error}"
    # torch's class, by name: torch may not even be imported here. On the CPU it has none of its own.
    starved = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if starved or "DefaultCPUAllocator: can't allocate memory" in message:
        return FailureKind.OUT_OF_MEMORY, message, "lower per_device_train_batch_size or max_length"
    return FailureKind.INTERNAL, message, "the traceback is in the trainer's log"
