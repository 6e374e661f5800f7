"""The status file: one value, written whole, by which a reader knows a living daemon from a dead one.

Its form is `StatusSnapshot`; docs/status.schema.json is made from it. Everything in it is bounded: names and reasons in
length, lists in number.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypedDict, cast

import msgspec
from msgspec import Meta

from daemon.errors import is_no_space
from daemon.evaluation.matrix import Matrix, summarise
from daemon.gpu import Gpu
from daemon.job import FailureKind, Job, JobState, Progress, utc_now
from daemon.memory.store import HELD_OUT_NAME, ROWS_NAME, DatasetMemory
from daemon.processes import ProcessIdentity, boot_id, identify
from daemon.text import HOLD_CHARACTERS, escape, finite, printable
from daemon.versions import Version
from guard.json_text import parse_json
from guard.lock import is_locked

SCHEMA_VERSION = 1
STATES = ("starting", "idle", "training", "waiting", "paused", "stopping", "stopped")
RECENT_JOBS = 20
WAITING_FILES = 50  # of more, the count is shown
WARNINGS = 50
EVALUATED_DATASETS = 50
HELD_VERSIONS = 50
RUN_WARNINGS = 5  # of each finished job
TEXT_CHARACTERS = 300

# A heartbeat that is so much older than it should be means that the loop hangs: a tick never takes that long.
MISSED_HEARTBEATS = 10
REREAD_SECONDS = 0.05  # before a status that is not whole is read again
LEAST_SILENCE_SECONDS = 60.0


def _enum(values: tuple[str, ...]) -> Meta:
    return Meta(extra_json_schema={"enum": list(values)})


class WaitingFile(TypedDict):
    """A file in the inbox that is not taken yet."""

    file: Annotated[str, Meta(description="Its name, safe to print.")]
    reason: str
    since: str


class LeftAlone(TypedDict):
    """Something in the inbox that will not be taken as it is."""

    file: str
    reason: str


class CurrentModel(TypedDict):
    """The current version."""

    version: str
    dataset: str | None
    created_at: str | None


class DatasetLoss(TypedDict):
    """What the current version scored on a dataset."""

    dataset: Annotated[str, Meta(description="The file's name, safe to print.")]
    digest: Annotated[str, Meta(description="The beginning of the dataset's digest.")]
    loss: Annotated[float, Meta(description="Nats a trained token over its held-out rows.")]
    change: Annotated[float | None, Meta(description="Since it was learned; above 0: lost. null: not measured then.")]


class EvalScore(TypedDict):
    """How the current version did on an eval of the administrator's."""

    eval: Annotated[str, Meta(description="The file's name without .jsonl, safe to print.")]
    passed: Annotated[float, Meta(description="Share of the answered rows that pass.")]


class ModelEvaluation(TypedDict):
    """What the current version has kept of what its line has learned."""

    version: str
    verdict: Annotated[
        str, Meta(description="kept, unclear, regressed, unmeasured; empty: of before there was a gate.")
    ]
    learned: Annotated[int, Meta(description="Datasets that it has learned, itself or by way of its parents.")]
    measured: Annotated[int, Meta(description="Of them, those that it was scored on.")]
    average_loss: Annotated[float | None, Meta(description="Nats a trained token, mean over those.")]
    backward_transfer: Annotated[
        float | None, Meta(description="Mean over earlier datasets: loss when learned minus loss now; below 0: lost.")
    ]
    datasets: Annotated[
        list[DatasetLoss], Meta(description="Those that lost most, worst first.", max_length=EVALUATED_DATASETS)
    ]
    evals: Annotated[list[EvalScore], Meta(description="Worst first.", max_length=EVALUATED_DATASETS)]


class MemoryState(TypedDict):
    """What is kept of trained datasets, to rehearse and to measure."""

    datasets: Annotated[int, Meta(description="Datasets of which rows are kept.")]
    kept_rows: Annotated[int, Meta(description="Trained rows that later runs may train again.")]
    held_out_rows: int
    used_bytes: Annotated[int, Meta(description="Of the kept rows.")]
    max_bytes: Annotated[int, Meta(description="What they may take: memory_bytes.")]
    problems: Annotated[int, Meta(description="Memories that cannot be read; `dropforge memory` tells which.")]


class LastVerification(TypedDict):
    """The last check, in the background, of all that is kept."""

    at: Annotated[str, Meta(description="When it ended, UTC ISO 8601.")]
    versions: int
    datasets: Annotated[int, Meta(description="Trained files that were compared.")]
    problems: Annotated[int, Meta(description="Each is a warning as well.")]


class RunningJob(TypedDict):
    """The job that a trainer has."""

    id: str
    dataset: Annotated[str, Meta(description="The file's name, safe to print.")]
    owner: Annotated[int | None, Meta(description="User id of whose file it is; null: not known.")]
    rows: int | None
    attempt: int
    started_at: Annotated[str | None, Meta(description="Of this attempt, UTC ISO 8601.")]
    phase: Annotated[
        str, Meta(description="starting, preparing, evaluating, training, saving, finishing; more may come.")
    ]
    step: int
    total_steps: Annotated[int, Meta(description="0 until the run is planned.")]
    start_step: Annotated[int, Meta(description="Where this attempt began.")]
    epoch: float
    loss: float | None
    learning_rate: float | None
    grad_norm: float | None
    tokens_per_second: float | None
    eta_seconds: float | None
    held_out_loss: float | None
    held_out_losses: Annotated[
        list[tuple[int, float]],
        Meta(description="(step, loss over the held-out rows) every eval_steps steps, at most 100.", max_length=100),
    ]
    best_step: Annotated[int | None, Meta(description="With the lowest of them; null: there is none yet.")]
    resumed_from: str | None
    last_checkpoint_step: int
    at: Annotated[str, Meta(description="When the trainer said so.")]
    losses: Annotated[
        list[tuple[int, float]], Meta(description="(step, mean loss) over the run so far, at most 200.", max_length=200)
    ]


class GpuDevice(TypedDict):
    """One GPU, in use by any process."""

    name: str
    used_bytes: int
    total_bytes: int
    utilization: Annotated[float | None, Meta(description="0 to 1; null where the driver does not know.")]


class FinishedJob(TypedDict):
    """A job that came to its end."""

    id: str
    dataset: str
    state: Annotated[str, _enum(tuple(JobState))]
    owner: Annotated[int | None, Meta(description="User id of whose file it is; null: not known.")]
    reason: str
    hint: Annotated[str, Meta(description="What to do about a job that was refused or failed; empty: not known.")]
    failure: Annotated[str | None, Meta(extra_json_schema={"enum": [*FailureKind, None]})]
    attempt: int
    version: str | None
    duplicate_of: Annotated[str | None, Meta(description="The job that trained the same content; this one was not.")]
    steps: int | None
    held_out_before: float | None
    held_out_after: float | None
    warnings: Annotated[list[str], Meta(description="Of its run, the first few; `dropforge show` has all.")]
    updated_at: str


@dataclass(frozen=True, kw_only=True)
class StatusSnapshot:
    """What `status.json` says; the keys are public."""

    status: Annotated[str, _enum(STATES)]
    reason: Annotated[str, Meta(description="One sentence; empty when there is nothing to say.")]
    schema_version: Annotated[int, Meta(extra_json_schema={"const": SCHEMA_VERSION})] = SCHEMA_VERSION
    pid: int = 0
    start_ticks: Annotated[int, Meta(description="With pid and boot_id: which process wrote this.")] = 0
    boot_id: str = ""
    timestamp: Annotated[str, Meta(description="The heartbeat, UTC ISO 8601.")] = ""
    monotonic_seconds: Annotated[
        float, Meta(description="The heartbeat on CLOCK_MONOTONIC, which no clock change moves.")
    ] = 0.0
    status_interval: Annotated[float, Meta(description="Seconds between heartbeats.")] = 0.0
    log_path: Annotated[str, Meta(description="Where the complete log is.")] = ""
    watch_mode: Annotated[str, Meta(description="inotify, or polling with the reason.")] = ""
    events_lost: Annotated[
        int,
        Meta(
            description="Times that the kernel dropped inbox events since the start; scans found what they were about."
        ),
    ] = 0
    queue: Annotated[
        Mapping[str, int], Meta(description="Jobs by state, `duplicate` apart from `cancelled`, and deferred files.")
    ] = field(default_factory=dict)
    job: RunningJob | None = None
    waiting: Annotated[tuple[WaitingFile, ...], Meta(max_length=WAITING_FILES)] = ()
    left_alone: Annotated[tuple[LeftAlone, ...], Meta(max_length=WAITING_FILES)] = ()
    recent: Annotated[tuple[FinishedJob, ...], Meta(max_length=RECENT_JOBS)] = ()
    model: CurrentModel | None = None
    gpu: Annotated[tuple[GpuDevice, ...], Meta(description="As NVML reports; empty without it.")] = ()
    verification: LastVerification | None = None
    evaluation: ModelEvaluation | None = None
    memory: Annotated[MemoryState | None, Meta(description="null: it cannot be listed.")] = None
    held: Annotated[
        tuple[str, ...], Meta(description="Versions that the gate holds, newest last.", max_length=HELD_VERSIONS)
    ] = ()
    warnings: Annotated[tuple[str, ...], Meta(max_length=WARNINGS)] = ()


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of the status file."""
    (definition,), components = msgspec.json.schema_components([StatusSnapshot], ref_template="#/$defs/{name}")
    whole = components.pop(str(definition["$ref"]).rpartition("/")[2])
    # The defaults are those of the code, not of a reader: a file always has every key.
    for schema in [whole, *components.values()]:
        schema["required"] = sorted(schema["properties"])
        for value in schema["properties"].values():
            value.pop("default", None)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Dropforge status.json",
        "description": "Replaced at each change and each heartbeat. Readers should allow keys that are not named here.",
        **{key: value for key, value in whole.items() if key not in ("title", "description")},
        "$defs": components,
    }


def write_status(path: Path, snapshot: StatusSnapshot) -> None:
    """Replace the status file by one rename. Not fsynced: after a crash of the machine it is of no use. Raises OSError.

    On a full disk the essence of it is written over the old one, in the room that this has already.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(render(snapshot), encoding="ascii")
        beside.replace(path)
    except OSError as error:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        if not is_no_space(error):
            raise
        _overwrite(path, snapshot)


def _overwrite(path: Path, snapshot: StatusSnapshot) -> None:
    """Write what fits of a status over the old file, filled up to its length. Raises OSError."""
    bare = replace(snapshot, waiting=(), left_alone=(), recent=(), warnings=(), job=None, gpu=())
    with_job = replace(bare, job=snapshot.job and {**snapshot.job, "losses": []}, warnings=snapshot.warnings[:1])
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        size = os.fstat(fd).st_size
        texts = (json.dumps(json.loads(render(brief))) for brief in (with_job, bare))  # without indentation
        text = next((text for text in texts if len(text) <= size), None)
        if text is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        os.pwrite(fd, text.ljust(size).encode("ascii"), 0)
    finally:
        os.close(fd)


def render(snapshot: StatusSnapshot) -> str:
    """Return the file's text, stamped with process and time: ASCII, without NaN, of bounded size."""
    writer = identify(os.getpid())
    stamped = replace(
        snapshot,
        reason=printable(snapshot.reason, most=HOLD_CHARACTERS),
        warnings=tuple(printable(warning, most=TEXT_CHARACTERS) for warning in snapshot.warnings[:WARNINGS]),
        pid=os.getpid(),
        start_ticks=writer.start_ticks if writer else 0,
        boot_id=boot_id(),
        timestamp=utc_now(),
        monotonic_seconds=round(time.monotonic(), 3),
    )
    return json.dumps(finite(asdict(stamped)), indent=1, ensure_ascii=True, allow_nan=False)


class Liveness(StrEnum):
    """The state of the daemon that wrote a status file, whatever the file claims."""

    ALIVE = "alive"
    HUNG = "hung"  # the process is there, its heartbeat is not
    DEAD = "dead"
    UNKNOWN = "unknown"  # neither its process nor the root's lock can be seen from here
    STOPPED = "stopped"  # it shut down in order


def read_status(path: Path) -> dict[str, Any] | None:
    """Return the status file's content with `alive`, `liveness` and `age_seconds` of its heartbeat; None without a file.

    The lock beside it, which the daemon holds, tells whether one lives where its process cannot be seen: in another
    container, on another machine.

    An empty one is none: a power cut leaves that, and it is written anew at the next start. Raises ValueError when the file
    is not a status file.
    """
    try:
        text = _read_whole(path)
    except FileNotFoundError:
        return None
    if not text.strip(b"\0"):
        return None
    content = parse_json(text)
    try:
        return {**content, **liveness_of(content, is_locked=partial(is_locked, path.parent))}
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"not a status file ({type(error).__name__}: {error})") from error


def _read_whole(path: Path) -> bytes:
    """Read the file, again when it was met while it was overwritten. Raises OSError."""
    text = path.read_bytes()
    for _ in range(2):
        try:
            parse_json(text)
        except ValueError:
            time.sleep(REREAD_SECONDS)
            text = path.read_bytes()
    return text


def liveness_of(content: Mapping[str, Any], *, is_locked: Callable[[], bool | None]) -> dict[str, Any]:
    """Return `alive`, `liveness` and `age_seconds`: from the process (pid, start time, boot), then from its heartbeat.

    `is_locked` is asked where that process is not to be seen: whether a daemon holds the root's lock, None when that cannot be
    told, and then `alive` is None as well. Raises KeyError, TypeError, ValueError or OverflowError when a key that it needs is missing
    or odd.
    """
    writer = ProcessIdentity(
        pid=int(content["pid"]), start_ticks=int(content["start_ticks"]), boot_id=str(content["boot_id"])
    )
    if writer.boot_id == boot_id() and "monotonic_seconds" in content:
        age = time.monotonic() - float(content["monotonic_seconds"])
    else:
        age = (datetime.now(UTC) - datetime.fromisoformat(str(content["timestamp"]))).total_seconds()
    patience = max(LEAST_SILENCE_SECONDS, MISSED_HEARTBEATS * float(content.get("status_interval", 0.0)))
    is_stopped = content["status"] == "stopped"
    is_there = True if not is_stopped and writer.alive else is_locked()
    if is_there and not is_stopped:
        liveness = Liveness.HUNG if age > patience else Liveness.ALIVE
    elif is_there:
        liveness = Liveness.ALIVE  # the next one, which has not written yet
    elif is_stopped:
        liveness = Liveness.STOPPED
    else:
        liveness = Liveness.DEAD if is_there is False else Liveness.UNKNOWN
    return {
        "alive": None if liveness is Liveness.UNKNOWN else liveness in (Liveness.ALIVE, Liveness.HUNG),
        "liveness": liveness.value,
        "age_seconds": round(max(0.0, age), 1),
    }


def may_be_alive(snapshot: Mapping[str, Any]) -> bool:
    """Whether the daemon of a status that was read lives, or where that cannot be seen, did a moment ago."""
    if snapshot["alive"] is None:
        return bool(snapshot["age_seconds"] <= LEAST_SILENCE_SECONDS)
    return bool(snapshot["alive"])


def running_job(job: Job, progress: Progress | None, losses: list[tuple[int, float]] | tuple[()] = ()) -> RunningJob:
    """The `job` object: the store's view of the running job, the trainer's own progress, and its losses so far."""
    shown_progress = progress or Progress(phase="starting")
    shown: dict[str, Any] = {
        "id": job.id,
        "dataset": escape(job.name),
        "owner": job.owner,
        "rows": job.dataset.rows if job.dataset else None,
        "attempt": job.attempt,
        "started_at": job.started_at,
        **asdict(shown_progress),
        "held_out_losses": [(point.step, float(f"{point.loss:.6g}")) for point in shown_progress.held_out_losses],
        "losses": list(losses),
    }
    return cast(RunningJob, shown)


def current_model(version: Version) -> CurrentModel:
    """The `model` object."""
    return {
        "version": version.name,
        "dataset": version.record.get("dataset"),
        "created_at": version.record.get("created_at"),
    }


def memory_state(memories: Sequence[DatasetMemory], problems: Sequence[str], *, max_bytes: int) -> MemoryState:
    """The `memory` object."""
    kept = [memory.meta for memory in memories if memory.is_kept]
    return {
        "datasets": len(kept),
        "kept_rows": sum(meta.mark(ROWS_NAME).rows for meta in kept),
        "held_out_rows": sum(meta.mark(HELD_OUT_NAME).rows for meta in kept),
        "used_bytes": sum(meta.mark(ROWS_NAME).size_bytes for meta in kept),
        "max_bytes": max_bytes,
        "problems": len(problems),
    }


def model_evaluation(matrix: Matrix, version: str) -> ModelEvaluation | None:
    """The `evaluation` object; None where nothing is known of the version."""
    summary = summarise(matrix, version)
    if summary is None:
        return None
    names = dict(matrix.datasets)
    ordered = sorted(summary.losses, key=lambda one: -(one.change if one.change is not None else float("-inf")))
    datasets: list[DatasetLoss] = [
        {
            "dataset": escape(names.get(one.digest, "?"), most=60),
            "digest": one.digest[:12],
            "loss": one.loss,
            "change": one.change,
        }
        for one in ordered[:EVALUATED_DATASETS]
    ]
    return {
        "version": summary.version,
        "verdict": summary.verdict,
        "learned": summary.learned,
        "measured": summary.measured,
        "average_loss": summary.average_loss,
        "backward_transfer": summary.backward_transfer,
        "datasets": datasets,
        "evals": [
            {"eval": escape(name, most=60), "passed": passed}
            for name, passed in sorted(summary.evals.items(), key=lambda one: (one[1], one[0]))[:EVALUATED_DATASETS]
        ],
    }


def gpu_device(gpu: Gpu) -> GpuDevice:
    """One entry of `gpu`."""
    return {
        "name": escape(gpu.name, most=60),
        "used_bytes": gpu.total_bytes - gpu.free_bytes,
        "total_bytes": gpu.total_bytes,
        "utilization": gpu.utilization,
    }


def finished_job(job: Job) -> FinishedJob:
    """One entry of `recent`."""
    result = job.result
    warnings = (*job.notes, *(result.warnings if result else ()))
    return {
        "id": job.id,
        "dataset": escape(job.name),
        "state": job.state.value,
        "owner": job.owner,
        "reason": escape(job.reason, most=TEXT_CHARACTERS),
        "hint": escape(job.advice, most=TEXT_CHARACTERS),
        "failure": job.failure.value if job.failure else None,
        "attempt": job.attempt,
        "version": job.version,
        "duplicate_of": job.duplicate_of,
        "steps": result.steps_run if result else None,
        "held_out_before": result.held_out_before if result else None,
        "held_out_after": result.held_out_after if result else None,
        "warnings": [escape(warning, most=TEXT_CHARACTERS) for warning in warnings[:RUN_WARNINGS]],
        "updated_at": job.updated_at,
    }
