"""Values that pass between processes: jobs and their states, datasets, the specification and the result of a run.

No handles, no connections, no effects. `to_json` and `from_json` encode them for the store and for files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from enum import StrEnum
from typing import Any, TypeVar

import msgspec

from daemon.evaluation.values import Evaluation
from guard.json_text import parse_json

RUN_SPEC_VERSION = 1
LONGEST_BACKOFF_SECONDS = 3600.0


class JobState(StrEnum):
    """A job's state; its result is kept apart."""

    CLAIMED = "claimed"  # the file is ours; its rows are being checked
    QUEUED = "queued"  # checked; waits for its turn
    RUNNING = "running"  # a trainer has it
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    REJECTED = "rejected"  # the data cannot be trained


TRANSITIONS: Mapping[JobState, frozenset[JobState]] = {
    # FAILED, of a job that does not run: an error of this program's own, twice in a row
    JobState.CLAIMED: frozenset({JobState.QUEUED, JobState.REJECTED, JobState.CANCELLED, JobState.FAILED}),
    # SUCCEEDED: it waited for its second run, and a person made the first one's version current
    JobState.QUEUED: frozenset({JobState.RUNNING, JobState.CANCELLED, JobState.FAILED, JobState.SUCCEEDED}),
    JobState.RUNNING: frozenset(
        {JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.QUEUED}  # QUEUED: interrupted
    ),
    JobState.SUCCEEDED: frozenset(),
    # retry: the rows are checked again, under the settings of now
    JobState.FAILED: frozenset({JobState.CLAIMED}),
    JobState.CANCELLED: frozenset({JobState.CLAIMED}),
    JobState.REJECTED: frozenset({JobState.CLAIMED}),
}

FINAL_STATES = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.REJECTED})
DUPLICATE = "duplicate"  # how a cancelled job that is one is counted and shown
OPEN_STATES = frozenset(JobState) - FINAL_STATES


class Priority(StrEnum):
    """Order in the queue; within one priority, arrival decides."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"

    @property
    def rank(self) -> int:
        """0 runs first."""
        return (Priority.HIGH, Priority.NORMAL, Priority.LOW).index(self)


class FailureKind(StrEnum):
    """Why a run did not succeed; decides whether and when it is tried again."""

    BAD_DATA = "bad_data"  # no retry: the same rows fail again
    CONFIG = "config"  # no retry: the settings have to be changed
    OUT_OF_MEMORY = "out_of_memory"
    DIVERGED = "diverged"  # loss, gradient or weights became NaN or infinite
    STALLED = "stalled"
    LOST = "lost"  # killed, or the machine went down
    NO_SPACE = "no_space"
    IDENTITY = (
        "identity"  # the current version or its base is not what it was: the queue is held, no attempt is counted
    )
    BASE = "base"  # the base model cannot be used: likewise
    TRAINER = "trainer"  # its program cannot be executed: likewise
    INTERNAL = "internal"


class MemoryMeasure(StrEnum):
    """What a trainer does by itself when memory runs out in a pass."""

    ONE_ROW = "one_row"  # passes so small that the longest row was alone
    GRADIENT_CHECKPOINTING = "gradient_checkpointing"


class Outcome(StrEnum):
    """How one attempt ended, as the trainer itself reports it."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    INTERRUPTED = "interrupted"  # asked to stop; a checkpoint is sealed


def utc_now() -> str:
    """Return the time as ISO 8601 in UTC with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def seconds_between(begin: str | None, end: str | None) -> float | None:
    """Return the seconds from one UTC time to another; None when one of them is not known."""
    try:
        return (datetime.fromisoformat(end or "") - datetime.fromisoformat(begin or "")).total_seconds()
    except ValueError:
        return None


def new_job_id() -> str:
    """Make an id that sorts by time and is safe as a folder name: `20261123-041500-9f3a`."""
    # os.urandom: `secrets` would bring OpenSSL, four megabytes, into every process that imports this.
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{os.urandom(2).hex()}"


def claimed_on(job_id: str) -> date | None:
    """Read the day (UTC) of the claim from an id; None from another form."""
    try:
        return date.fromisoformat(job_id.partition("-")[0])
    except ValueError:
        return None


@dataclass(frozen=True, kw_only=True)
class RowWarning:
    """Something about good rows that their owner may not have meant."""

    code: str
    message: str
    rows: int
    lines: tuple[int, ...] = ()  # the first of them


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A claimed file that was read once from end to end."""

    name: str  # the file's name as it was dropped
    path: str  # where it lies now
    size_bytes: int
    rows: int  # rows that will be trained or held out
    digest: str  # BLAKE3 of the bytes, hex
    format: str  # messages | prompt_completion | text | ...
    skipped_rows: int = 0  # bad rows left out under on_bad_rows = "skip"
    content_bytes: int = 0  # decompressed; 0: not known
    unused_keys: Mapping[str, int] = field(default_factory=dict)  # keys that nothing is made of -> rows that have them
    warnings: tuple[RowWarning, ...] = ()
    notes: tuple[str, ...] = ()  # how the rows are read, where that is a choice


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training run over one dataset, as the store keeps it."""

    id: str
    name: str  # the file's name as it was dropped; may hold any byte but '/' and NUL (surrogateescape)
    state: JobState
    priority: Priority = Priority.NORMAL
    position: int = 0  # within its priority; smaller runs earlier
    turn: int = 0  # within its position: the first jobs of every owner come before anybody's second
    cancel_request: str = ""  # "" | cancel | return (its file goes back to the inbox)
    path: str = ""  # where the file lies now
    source: str = ""  # where it was dropped
    source_inode: int = 0  # survives the claim's rename, so that a submitter recognises its own file
    size_bytes: int = 0
    owner: int | None = None  # user id of the file; None: not known, as of jobs of older versions
    notes: tuple[str, ...] = ()  # what its owner should know of how it was taken
    force: bool = False  # train even if the same content was trained before
    dataset: Dataset | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)  # the sidecar's [training], [lora], [data]
    recipe: Mapping[str, Any] | None = None  # frozen when the job is queued
    attempt: int = 0  # launches so far
    max_step: int = 0  # highest sealed step over all attempts
    step_at_launch: int = 0  # max_step when the latest attempt began
    attempts_without_progress: int = 0  # attempts in a row that sealed no new step
    not_before: float = 0.0  # seconds since the epoch; back-off after a failure
    reason: str = ""  # why it is in this state, as a sentence
    hint: str = ""  # what to do about it, when its file was refused; a failed run's is in its result
    continues: str | None = None  # the job that took a file of this name shortly before: its writer went on
    duplicate_of: str | None = None  # the job that trained the same content; this one was not trained
    failure: FailureKind | None = None
    version: str | None = None  # the version that it was promoted as
    created_at: str = ""
    updated_at: str = ""
    started_at: str | None = None  # of the latest attempt
    finished_at: str | None = None
    result: RunResult | None = None
    first_run: FirstRun | None = None  # whose version is held while this one rehearses twice the share

    @property
    def is_duplicate(self) -> bool:
        """Whether it was not trained because its content had been; nobody cancelled it."""
        return self.state is JobState.CANCELLED and self.duplicate_of is not None

    @property
    def advice(self) -> str:
        """What to do about a job that was refused or failed; empty when that is not known."""
        if self.state is JobState.FAILED and self.result is not None:
            return self.result.hint
        return self.hint


@dataclass(frozen=True, kw_only=True)
class FirstRun:
    """A run whose version is held while its job runs once more, as `[gate] retry_share` says."""

    version: str
    result: RunResult


@dataclass(frozen=True, kw_only=True)
class JobTransition:
    """One change of a job's state; `old` is None for a new job."""

    at: str
    job_id: str
    old: str | None
    new: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """A trainer's input: `run.json` in its run directory, written before it starts."""

    schema_version: int
    job_id: str
    attempt: int
    dataset: Dataset
    recipe: Mapping[str, Any]  # see daemon.recipe.Recipe
    run_dir: str
    model_dir: str
    key_file: str | None = None  # of the guard's seal
    state_dir: str = ""
    daemon_pid: int = 0
    root: str = ""  # of Dropforge: a base model in it is named by a path that moves along
    gpu: str | None = None  # UUID of the only device that the trainer shall see
    limits: Mapping[str, Any] = field(default_factory=dict)  # see daemon.limits.LimitSettings
    evals_dir: str = ""  # of the administrator's evals; empty: none are answered
    evaluation: Mapping[str, Any] = field(default_factory=dict)  # see daemon.evaluation.settings.EvaluationSettings
    gate: Mapping[str, Any] = field(default_factory=dict)  # see daemon.evaluation.settings.GateSettings
    root_recipe: Mapping[str, Any] = field(default_factory=dict)  # [data] and [replay] without the sidecar's
    overrides: Mapping[str, Any] = field(default_factory=dict)  # the sidecar's
    force: bool = False  # train the rows also where most of them are held out of earlier datasets


@dataclass(frozen=True, kw_only=True)
class ReplayedDataset:
    """An earlier dataset of which a run trains rows again."""

    name: str
    digest: str  # of the dataset
    rows: int
    tokens: int  # trained ones, one epoch


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The run's arithmetic, decided before the first step. Samples and tokens are of all rows that are trained."""

    rows: int  # rows of the dataset that are trained
    replayed_rows: int  # rows of earlier datasets that are trained again
    replayed_tokens: int  # of the trained tokens, theirs
    samples: int  # what they became for the model; more than rows where a chat template needs several of a conversation
    held_out_rows: int
    withheld_rows: int  # held out of an earlier dataset, so not trained here either
    dropped_rows: int  # rows without one trained token after truncation
    tokens: int  # one epoch
    trained_tokens: int  # of them, those with a label
    global_batch_size: int  # samples a step
    steps_per_epoch: int
    epochs: float
    total_steps: int
    warmup_steps: int


@dataclass(frozen=True, kw_only=True)
class HeldOutPoint:
    """The mean loss of a trained token over the held-out rows, after one step of a run."""

    step: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The progress of a running trainer: `progress.json`, replaced after each step."""

    phase: str  # starting | preparing | evaluating | training | saving | finishing
    step: int = 0
    total_steps: int = 0
    start_step: int = 0  # where this attempt began
    epoch: float = 0.0
    loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens_per_second: float | None = None
    eta_seconds: float | None = None
    held_out_loss: float | None = None
    held_out_losses: tuple[HeldOutPoint, ...] = ()  # after eval_steps steps each, over all attempts; at most 100
    best_step: int | None = None  # with the lowest of them so far
    resumed_from: str | None = None
    last_checkpoint_step: int = 0
    at: str = ""


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """The result of one attempt: `result.json`, written last."""

    outcome: Outcome
    failure: FailureKind | None = None
    message: str = ""
    hint: str = ""
    tried: tuple[MemoryMeasure, ...] = ()  # against a lack of memory, before it failed of it
    steps_planned: int = 0
    steps_run: int = 0  # the run's step counter at its end, over all attempts
    start_step: int = 0
    resumed_from: str | None = None
    verdict: str = ""
    reasons: tuple[str, ...] = ()
    cleared: int = 0
    train_loss: float | None = None
    held_out_before: float | None = None
    held_out_after: float | None = None
    held_out_losses: tuple[HeldOutPoint, ...] = ()  # during the run, over all attempts; at most 100
    best_step: int | None = None  # with the lowest of them; None: there was no evaluation during the run
    kept_step: int | None = None  # whose weights the run ended with; None: nothing was trained to its end
    stopped_early: bool = False  # as early_stopping_patience says
    tokens_per_second: float | None = None
    steady_tokens_per_second: float | None = None  # without the first step, which warms up; None: there was no other
    tokens_trained: int = 0
    rows: int = 0
    samples: int = 0  # as in Plan
    dropped_rows: int = 0
    refused_rows: int = 0  # left out under on_bad_rows = "skip" because they cannot be rendered as they should
    held_out_rows: int = 0
    replayed: tuple[ReplayedDataset, ...] = ()  # rows of earlier datasets that were trained again
    withheld_rows: int = 0  # held out of an earlier dataset, so not trained here either
    unmeasured: str = ""  # why no row is held out; empty: some are, or nobody asked for it
    truncated_rows: int = 0
    trained_share: float | None = None  # of the trained rows' tokens, those with a loss
    spikes: tuple[int, ...] = ()  # steps whose loss stood far above those before them
    wall_seconds: float = 0.0
    candidate: str | None = None  # the finished adapter, complete, under the model directory's .staging
    adapter_digest: str | None = None
    lora_norm: float | None = None  # Frobenius norm over all lora_B
    evaluation: Evaluation | None = None  # of what earlier versions had learned; None: a trainer of before that
    base: Mapping[str, Any] | None = None  # what it was trained on: see daemon.base_identity.BaseIdentity
    parent: str | None = None  # the version that it continued, None: the base model
    parent_digest: str | None = None  # of that version's adapter
    warnings: tuple[str, ...] = ()


T = TypeVar("T")
# Fields of a job whose JSON key is another: stores and scripts have these keys.
_JSON_KEYS = {"cancel_request": "wanted", "attempts_without_progress": "fruitless"}
_FIELDS = {key: name for name, key in _JSON_KEYS.items()}


def to_json(value: object, *, indent: int | None = None) -> str:
    """Encode as ASCII JSON.

    File names of any bytes (surrogateescape) survive, which msgspec's own encoder would refuse.
    """
    plain = msgspec.to_builtins(value)
    if isinstance(value, Job):
        plain = {_JSON_KEYS.get(name, name): item for name, item in plain.items()}
    return json.dumps(plain, ensure_ascii=True, allow_nan=False, indent=indent)


def from_json(text: str | bytes, kind: type[T]) -> T:
    """Decode what `to_json` made. Raises ValueError when the text is not such a value."""
    plain = parse_json(text)
    if kind is Job and isinstance(plain, dict):
        plain = {_FIELDS.get(key, key): item for key, item in plain.items()}
    try:
        return msgspec.convert(plain, kind)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from error
