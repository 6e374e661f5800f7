"""The status writer: builds the snapshot of what the daemon does, and writes it to status.json and the metrics."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daemon import sd_notify, versions
from daemon.config import Settings
from daemon.curves import read_curves
from daemon.errors import DropforgeError
from daemon.evaluation.matrix import read_matrix
from daemon.gpu import GpuProbe
from daemon.holds import HoldKind
from daemon.in_hand import InHand
from daemon.inbox.intake import Intake
from daemon.job import Job, JobState, Progress
from daemon.left_alone import LeftAlone
from daemon.lineage import LINEAGE, read_lineage
from daemon.memory.store import list_memories, memory_dir_of
from daemon.notice_sender import NoticeSender
from daemon.observability import logs
from daemon.observability.status import (
    HELD_VERSIONS,
    RECENT_JOBS,
    WAITING_FILES,
    CurrentModel,
    FinishedJob,
    LastVerification,
    MemoryState,
    ModelEvaluation,
    RunningJob,
    StatusSnapshot,
    current_model,
    finished_job,
    gpu_device,
    memory_state,
    model_evaluation,
    running_job,
    write_status,
)
from daemon.scheduler import Scheduler
from daemon.store import JobStore
from daemon.verification import BackgroundVerifier, Verification
from daemon.versions import Version

if TYPE_CHECKING:  # its library is imported only where metrics are configured
    from daemon.observability.metrics import MetricsPublisher

REFRESH_SECONDS = 60.0  # the current version is read again at least so often
LOSS_POINTS = 200
LOSS_READ_BYTES = 8 * 2**20  # of the trainer's events, from their end; older points are drawn from what is left


ShowJob = Callable[[RunningJob | None], None]  # what a terminal shows of the running job, at each tick


class StatusWriter:
    """Writes the status at each change and at each heartbeat. One thread calls everything."""

    def __init__(
        self,
        settings: Settings,
        store: JobStore,
        intake: Intake,
        scheduler: Scheduler,
        *,
        verifier: BackgroundVerifier,
        notices: NoticeSender,
        gpus: GpuProbe,
        in_hand: InHand,
        left_alone: LeftAlone,
        log: Any,
        metrics: MetricsPublisher | None = None,
        show: ShowJob | None = None,
    ) -> None:
        self.settings = settings
        self.stopping = False
        self.warnings: Sequence[str] = ()  # of the service itself
        self._store = store
        self._intake = intake
        self._scheduler = scheduler
        self._verifier = verifier
        self._notices = notices
        self._gpus = gpus
        self._in_hand = in_hand
        self._left_alone = left_alone
        self._log = log
        self._metrics = metrics
        self._show = show
        self._losses = LossHistory()
        self._model = _CurrentModelReader(log)
        self._recent: tuple[FinishedJob, ...] = ()
        self._recent_of: tuple[int, int] | None = None  # the store's revision
        self._published_at = 0.0  # monotonic
        self._published: tuple[Any, ...] = ()
        self._failed = False

    def publish(self, *, status: str | None = None, force: bool = False) -> None:
        """Write the status when it changed or is due, or with `force`. `status` replaces what the daemon seems to do."""
        snapshot = self._snapshot()
        if status is not None:
            snapshot = replace(snapshot, status=status, reason="")
        if self._show is not None:
            self._show(snapshot.job)
        now, job = time.monotonic(), snapshot.job
        shown = (snapshot.status, snapshot.reason, dict(snapshot.queue), job and (job["id"], job["phase"]))
        is_due = now - self._published_at >= self.settings.status.status_interval
        if not (force or is_due or shown != self._published):
            return
        if self._metrics is not None:
            run = self._scheduler.run
            waited = _waited_seconds(run.job) if run else None
            self._metrics.publish(snapshot, overflows=self._intake.view().overflows, waited_seconds=waited)
        if self._write(snapshot):
            self._published_at, self._published = now, shown
            sd_notify.notify(sd_notify.status_line(snapshot.status, snapshot.reason))

    def _write(self, snapshot: StatusSnapshot) -> bool:
        """Replace the file. A failure is logged once: a full disk must not fill the log as well."""
        try:
            write_status(self.settings.status_path, snapshot)
        except OSError as error:
            if not self._failed:
                self._log.error("status.not_written", error=str(error))
            self._failed = True
            return False
        if self._failed:
            self._log.info("status.written_again")
        self._failed = False
        return True

    def _snapshot(self) -> StatusSnapshot:
        view, run, counts = self._intake.view(), self._scheduler.run, self._store.counts()
        status, reason = self._state()
        losses = self._losses.observe(run.run_dir, run.job.attempt, run.progress) if run else []
        known = self._model.read(self.settings)
        return StatusSnapshot(
            status=status,
            reason=reason,
            status_interval=self.settings.status.status_interval,
            log_path=str(self.settings.log_path),
            watch_mode=view.watch_mode,
            events_lost=view.overflows,
            queue={**counts, "deferred": view.deferred},
            job=running_job(run.job, run.progress, losses) if run else None,
            waiting=tuple(
                {"file": item.name, "reason": item.reason, "since": item.since} for item in view.waiting[:WAITING_FILES]
            ),
            left_alone=tuple({"file": item.name, "reason": item.reason} for item in view.left_alone[:WAITING_FILES]),
            recent=self._recent_jobs(),
            model=known.model,
            gpu=tuple(map(gpu_device, self._gpus.known())),
            verification=_last_verification(self._verifier.last),
            evaluation=known.evaluation,
            held=known.held,
            memory=known.memory,
            warnings=(
                *self.warnings,
                *filter(None, (self._in_hand.problem, logs.problem())),
                *self._verifier.warnings,
                *self._notices.warnings,
                *view.warnings,
            ),
        )

    def _recent_jobs(self) -> tuple[FinishedJob, ...]:
        """The `recent` list; read again when the store has changed."""
        revision = self._store.revision()
        if revision != self._recent_of:
            jobs = self._store.recent(RECENT_JOBS)
            self._recent = tuple(self._shown(job) for job in jobs if not self._left_alone.has(job.id, job.updated_at))
            self._recent_of = revision
        return self._recent

    def _shown(self, job: Job) -> FinishedJob:
        with self._in_hand.noted("shown", job=job.id):
            return finished_job(job)

    def _state(self) -> tuple[str, str]:
        """What the daemon does, and why, as status.json says it."""
        view, run, hold = self._intake.view(), self._scheduler.run, self._scheduler.hold
        if self.stopping:
            return "stopping", "a checkpoint is being sealed" if run else ""
        if run is not None and not run.waiting_for:  # what is told of a run that cannot be recorded is why
            return "training", hold.reason if hold is not None and self._scheduler.suspended else run.job.id
        if run is not None:
            return "waiting", run.waiting_for
        if hold is not None:
            return "paused" if hold.kind is HoldKind.PAUSED else "waiting", hold.reason
        if view.waiting:
            return "waiting", view.waiting[0].reason
        if view.scanning:
            return "waiting", "rows are being checked"
        if view.held:
            return "waiting", view.held
        if self._store.counts()[JobState.QUEUED]:
            return "waiting", self._store.queue(limit=1)[0].reason
        return "idle", ""


def write_holding(settings: Settings, reason: str, *, status: str = "waiting") -> None:
    """Write the status of a daemon whose queue cannot be read, or is not open yet; where that can be written."""
    snapshot = StatusSnapshot(
        status=status,
        reason=reason,
        status_interval=settings.status.status_interval,
        log_path=str(settings.log_path),
    )
    with suppress(OSError):
        write_status(settings.status_path, snapshot)
    sd_notify.notify(sd_notify.status_line(snapshot.status, snapshot.reason))


@dataclass(frozen=True, kw_only=True)
class _KnownModel:
    """What the status says of the model directory."""

    model: CurrentModel | None = None
    evaluation: ModelEvaluation | None = None
    held: tuple[str, ...] = ()
    memory: MemoryState | None = None


class _CurrentModelReader:
    """Reads the current version again when `latest` leads elsewhere, and every REFRESH_SECONDS; the lineage when it grew."""

    def __init__(self, log: Any) -> None:
        self._log = log
        self._known = _KnownModel()
        self._read_at = float("-inf")  # monotonic
        self._seen: tuple[Any, ...] = ()
        self._lineage_of: tuple[Any, ...] | None = None  # as the lineage was when it was read

    def read(self, settings: Settings) -> _KnownModel:
        """Return what is known. A version that cannot be read is logged."""
        model_dir = settings.model_dir
        now, link, size = time.monotonic(), _link_target(model_dir / versions.LATEST), _size(model_dir / LINEAGE)
        if (link, size) == self._seen and now - self._read_at <= REFRESH_SECONDS:
            return self._known
        self._read_at, self._seen = now, (link, size)
        try:
            version = versions.current_version(model_dir)
        except (DropforgeError, OSError) as error:
            self._log.error("version.unreadable", error=str(error))
            version = None
        self._known = replace(self._known, model=None if version is None else current_model(version))
        self._known = replace(self._known, memory=_read_memory(settings))
        if self._lineage_of != self._seen:
            self._lineage_of = self._seen
            self._read_lineage(model_dir, version)
        return self._known

    def _read_lineage(self, model_dir: Path, version: Version | None) -> None:
        """Note which versions are held, and what the current one has kept; the lineage has what it takes beside its record."""
        evaluation: ModelEvaluation | None = None
        held: tuple[str, ...] = ()
        with suppress(OSError):  # the dispatch says what is wrong with it
            lineage = read_lineage(model_dir)
            held = tuple(lineage.held()[-HELD_VERSIONS:])
            if version is not None:
                noted = {**lineage.recorded(), version.name: {**version.record, "version": version.name}}
                evaluation = model_evaluation(read_matrix(list(noted.values())), version.name)
        self._known = replace(self._known, evaluation=evaluation, held=held)


def _read_memory(settings: Settings) -> MemoryState | None:
    """What is kept of trained datasets; None where it cannot be listed, which the next run says."""
    try:
        memories, problems = list_memories(memory_dir_of(settings.state_dir))
    except OSError:
        return None
    return memory_state(memories, problems, max_bytes=settings.replay.memory_bytes)


class LossHistory:
    """The losses of the running job, few enough to travel in the status, however long the run is.

    At most LOSS_POINTS points, evenly over the run's steps; each is the mean loss of the steps that it stands for.
    """

    def __init__(self) -> None:
        self._run: tuple[Path, int, int] | None = None  # run directory, attempt, steps
        self._sums: dict[int, tuple[float, int, int]] = {}  # by part of the run: sum, count, last step
        self._last_step = 0

    def observe(self, run_dir: Path, attempt: int, progress: Progress | None) -> list[tuple[int, float]]:
        """Note where a run is; returns (step, loss) so far, ascending by step.

        A run that is met in its middle, after a restart or by a later attempt, is caught up from the trainer's events.
        """
        if progress is None or progress.total_steps < 1:
            return []
        run = (run_dir, attempt, progress.total_steps)
        if run != self._run:
            self._run, self._sums, self._last_step = run, {}, 0
            self._catch_up(run_dir)
        if progress.loss is not None and progress.step > self._last_step:
            self._add(progress.step, progress.loss)
        return [(step, float(f"{total / count:.6g}")) for _, (total, count, step) in sorted(self._sums.items())]

    def _add(self, step: int, loss: float) -> None:
        if not math.isfinite(loss) or self._run is None or step < 1:
            return
        part = min((step - 1) * LOSS_POINTS // self._run[2], LOSS_POINTS - 1)
        total, count, last = self._sums.get(part, (0.0, 0, 0))
        self._sums[part] = (total + loss, count + 1, max(step, last))
        self._last_step = max(self._last_step, step)

    def _catch_up(self, run_dir: Path) -> None:
        """Take the steps that the trainer logged so far."""
        for step, loss in read_curves(run_dir, last_bytes=LOSS_READ_BYTES).loss:
            self._add(step, loss)


def _last_verification(last: Verification | None) -> LastVerification | None:
    if last is None:
        return None
    return {"at": last.at, "versions": last.versions, "datasets": last.datasets, "problems": len(last.problems)}


def _waited_seconds(job: Job) -> float | None:
    """From the claim of a job's file to the start of its latest attempt."""
    if job.started_at is None or not job.created_at:
        return None
    return (datetime.fromisoformat(job.started_at) - datetime.fromisoformat(job.created_at)).total_seconds()


def _size(path: Path) -> int:
    """A file's size, 0 where it is missing."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _link_target(path: Path) -> str:
    """Where a link leads, empty when it is none."""
    try:
        return os.readlink(path)
    except OSError:
        return ""
