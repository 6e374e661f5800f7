"""A run directory, `state/runs/JOB`: the only channel between the daemon and a trainer.

| file             | written by              | when                                  | durable | when it is missing                     |
|------------------|-------------------------|---------------------------------------|---------|----------------------------------------|
| `run.json`       | daemon, `write_spec`    | before the trainer is started         | yes     | no attempt was launched                |
| `trainer.json`   | daemon, `write_identity`| once the trainer is started           | yes     | no trainer to adopt: the run is lost   |
| `trainer.log`    | trainer's output        | appended, over all attempts           | no      | nothing was printed                    |
| `events.jsonl`   | trainer, `RunWriter`    | appended as things happen             | no      | nothing has happened yet               |
| `progress.json`  | trainer, `RunWriter`    | replaced, at most every 0.2 s         | no      | the trainer has not begun              |
| `.result.reserve`| trainer, `RunWriter`    | first: room for the result            | no      | a full disk may cost the result        |
| `result.json`    | trainer, `RunWriter`    | last, once an attempt                 | yes     | it still runs, or it is lost           |
| `replay.jsonl`   | trainer of rank 0       | once a run, before its first step     | yes     | nothing is rehearsed, or not drawn yet |
| `replay.json`    | trainer of rank 0       | after `replay.jsonl`: what of         | yes     | the rows are drawn at the next attempt |
| `memory/`        | trainer of rank 0       | each attempt; the promotion moves it  | yes     | it was moved, or tokens come first     |
| `process-N/`     | worker N of several     | as above: its result; events from 1 on| as above| the run has one process                |
| `tensorboard/`   | trainer of rank 0       | at each logged step                   | no      | no step was logged                     |

`launch` removes the result, progress and identity of the attempt before. A reader meets files that are torn by a crash,
missing or unreadable for the moment; none of that is an error here. Torch-free.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from daemon.job import RUN_SPEC_VERSION, Progress, RunResult, RunSpec, from_json, to_json, utc_now
from daemon.processes import ProcessIdentity
from guard.atomic import (
    append_or_nothing,
    end_last_line,
    last_line,
    make_folder_durable,
    rename_durable,
    write_all,
    write_atomic,
)
from guard.json_text import parse_json

RUNS_NAME = "runs"
SPEC_NAME = "run.json"
IDENTITY_NAME = "trainer.json"
LOG_NAME = "trainer.log"
EVENTS_NAME = "events.jsonl"
PROGRESS_NAME = "progress.json"
RESULT_NAME = "result.json"
RESERVE_NAME = ".result.reserve"  # becomes the result
RESERVED_BYTES = 64 * 1024  # no result was ever longer
UNWRITTEN_EVENTS = 10_000  # that wait in memory for room on the disk; of more, the newest
TENSORBOARD_NAME = "tensorboard"
# What an attempt leaves behind and the next one must not read as its own.
ATTEMPT_NAMES = (RESULT_NAME, PROGRESS_NAME, IDENTITY_NAME)
# Keys of an event that are the log's own, or would be read as parameters of its methods.
RESERVED_KEYS = ("at", "timestamp", "level", "self", "args", "exc_info", "stack_info")
PROGRESS_SECONDS = 0.2  # a step of the tiny model takes 10 ms; nobody reads faster than this

T = TypeVar("T")
RunEvent = tuple[str, dict[str, Any]]  # name and data


def run_dir_of(state_dir: Path, job_id: str) -> Path:
    """Return a job's run directory."""
    return state_dir / RUNS_NAME / job_id


def worker_dir(run_dir: Path, rank: int) -> Path:
    """Return where one of several processes leaves its result."""
    return run_dir / f"process-{rank}"


# -- the daemon's side: launch and adopt


def begin_attempt(spec: RunSpec) -> Path:
    """Make the run directory ready for the attempt that `spec` describes; returns it. Raises OSError."""
    run_dir = Path(spec.run_dir)
    make_folder_durable(run_dir)
    for name in ATTEMPT_NAMES:
        (run_dir / name).unlink(missing_ok=True)
    with (run_dir / EVENTS_NAME).open("ab+") as events:
        end_last_line(events.fileno())  # the machine may have lost its power in the attempt before
    write_atomic(run_dir / SPEC_NAME, to_json(spec, indent=1))
    return run_dir


def discard_earlier(run_dir: Path, attempt: int) -> None:
    """Remove the result of an earlier attempt where this one was recorded and never begun. Raises OSError."""
    try:
        is_earlier = read_spec(run_dir).attempt < attempt
    except (OSError, ValueError):  # whose result it is cannot be told
        return
    if is_earlier:
        for name in ATTEMPT_NAMES:
            (run_dir / name).unlink(missing_ok=True)


def write_identity(run_dir: Path, identity: ProcessIdentity) -> None:
    """Note which process the trainer is, for the daemon's next life. Raises OSError."""
    write_atomic(run_dir / IDENTITY_NAME, to_json(identity))


def read_identity(run_dir: Path) -> ProcessIdentity | None:
    """Return which process the latest trainer is or was, None when that is not known."""
    return _read(run_dir / IDENTITY_NAME, ProcessIdentity)


def latest_spec(state_dir: Path) -> RunSpec | None:
    """Return the specification of the run that was launched last; None when there is none that can be read."""
    paths = (state_dir / RUNS_NAME).glob(f"*/{SPEC_NAME}")
    path = max(paths, key=lambda path: path.stat().st_mtime_ns, default=None)
    try:
        return None if path is None else read_spec(path.parent)
    except (OSError, ValueError):
        return None


class RunReader:
    """Reads one attempt: the events from where an earlier attempt's end, progress and result."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._bytes_read = _size_in_lines(run_dir / EVENTS_NAME)

    def events(self) -> list[RunEvent]:
        """Return the events since the last call. Whole lines only: the trainer may be in the middle of one."""
        try:
            with (self._run_dir / EVENTS_NAME).open("rb") as events:
                events.seek(self._bytes_read)
                text = events.read()
        except OSError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self._bytes_read += len(whole)
        return list(_parse(whole))

    def progress(self) -> Progress | None:
        """Return where the trainer is."""
        return _read(self._run_dir / PROGRESS_NAME, Progress)

    def result(self) -> RunResult | None:
        """Return what the attempt did; None while it runs, and when it was lost."""
        return _read(self._run_dir / RESULT_NAME, RunResult)


def read_events(run_dir: Path, *, last_bytes: int | None = None) -> Iterator[RunEvent]:
    """Iterate over the events of all attempts, or over those in the last `last_bytes` of the file."""
    try:
        with (run_dir / EVENTS_NAME).open("rb") as events:
            if last_bytes is not None:
                events.seek(max(0, events.seek(0, os.SEEK_END) - last_bytes))
            text = events.read()
    except OSError:
        return
    yield from _parse(text)


def sealed_step(run_dir: Path) -> int:
    """Return the last step that a run reported as sealed, 0 when there is none."""
    step = 0
    for name, data in read_events(run_dir):
        if name == "run.started":  # it may begin below an earlier attempt, whose checkpoints were another run's
            step = step_in(data, "start_step")
        elif name == "checkpoint.sealed":
            step = step_in(data, "step")
    return step


def step_in(data: Mapping[str, Any], key: str) -> int:
    """Return an event's number of steps; 0 for anything else, which a trainer of another version may write."""
    value = data.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0


# -- the trainer's side


def read_spec(run_dir: Path) -> RunSpec:
    """Return the specification that the daemon wrote.

    Raises ValueError when it is of another version or damaged, OSError when it cannot be read.
    """
    text = (run_dir / SPEC_NAME).read_bytes()
    content = parse_json(text)
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != RUN_SPEC_VERSION:
        raise ValueError(f"{SPEC_NAME} has version {version}, this trainer knows {RUN_SPEC_VERSION}")
    return from_json(text, RunSpec)


def read_result(run_dir: Path) -> tuple[int, RunResult] | None:
    """Return when (nanoseconds) a result was written, and the result; None when there is none."""
    result = _read(run_dir / RESULT_NAME, RunResult)
    try:
        return None if result is None else ((run_dir / RESULT_NAME).stat().st_mtime_ns, result)
    except OSError:
        return None


class RunWriter:
    """Writes events, progress and result of one attempt.

    A disk that is full for a while ends no run: progress is skipped then, events wait in memory, and the result, which is
    the last word, has its room set aside from the start. `result_dir` is where a worker of several leaves its own result;
    the result of an earlier attempt is removed there.
    """

    def __init__(self, run_dir: Path, *, result_dir: Path | None = None) -> None:
        self._run_dir = run_dir
        self._result_path = (result_dir or run_dir) / RESULT_NAME
        self._result_path.unlink(missing_ok=True)
        self._reserve = self._result_path.with_name(RESERVE_NAME)
        with suppress(OSError):  # the result is then written as any other file
            self._reserve.write_bytes(b" " * RESERVED_BYTES)
        self._events: int | None = None  # descriptor
        self._unwritten: deque[bytes] = deque(maxlen=UNWRITTEN_EVENTS)
        self._progress = Progress(phase="starting")
        self._written = 0.0

    def event(self, name: str, **data: Any) -> None:
        """Append one event; the daemon carries it into its log under the same name."""
        line = json.dumps({"at": utc_now(), "event": name, **data}, default=str) + "\n"
        self._unwritten.append(line.encode("ascii"))
        self._write_events()

    def progress(self, **fields: Any) -> None:
        """Change some fields of the progress; a new phase is written at once, steps at most every PROGRESS_SECONDS."""
        before = self._progress
        self._progress = replace(before, at=utc_now(), **fields)
        now = time.monotonic()
        if self._progress.phase == before.phase and now - self._written < PROGRESS_SECONDS:
            return
        self._written = now
        self._write_events()
        # Not fsynced: after a crash of the machine it is of no use anyway.
        beside = self._run_dir / f".{PROGRESS_NAME}.{os.getpid()}"
        with suppress(OSError):
            beside.write_text(to_json(self._progress), encoding="ascii")
            beside.replace(self._run_dir / PROGRESS_NAME)

    def result(self, result: RunResult) -> None:
        """Write the result durably; it is the last word of the attempt. Raises OSError."""
        self._write_events()
        text = to_json(result, indent=1).encode("ascii")
        try:
            _fill(self._reserve, text)
        except OSError:
            write_atomic(self._result_path, text)
            return
        rename_durable(self._reserve, self._result_path, replace=True)

    def _write_events(self) -> None:
        """Append what was not written yet; what the disk refuses is tried again with the next."""
        with suppress(OSError):
            if self._events is None:
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
                self._events = os.open(self._run_dir / EVENTS_NAME, flags, 0o666)
            while self._unwritten:
                append_or_nothing(self._events, self._unwritten[0])
                self._unwritten.popleft()


def _fill(reserve: Path, text: bytes) -> None:
    """Write `text` into the room of a file that has it already, durably. Raises OSError."""
    fd = os.open(reserve, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        write_all(fd, text)
        os.ftruncate(fd, len(text))
        os.fsync(fd)
    finally:
        os.close(fd)


def _parse(lines: bytes) -> Iterator[RunEvent]:
    for line in lines.splitlines():
        try:
            event = parse_json(line)
            name = str(event.pop("event"))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # torn by a crash of the trainer, cut by a seek, or no event
        for key in RESERVED_KEYS:
            event.pop(key, None)
        yield name, event


def _read(path: Path, kind: type[T]) -> T | None:
    try:
        return from_json(path.read_bytes(), kind)
    except (OSError, ValueError):
        return None


def _size_in_lines(path: Path) -> int:
    """The size of a file up to its last whole line; 0 when it cannot be read."""
    try:
        with path.open("rb") as lines:
            return last_line(lines.fileno())[0]
    except OSError:
        return 0
