"""The daemon. READ FIRST: `tick` is the order of events - intake, reap, dispatch, publish, wait.

One thread does everything; others (watchdog's) only ring the bell. Nothing in a tick blocks on a large file or on a
trainer: those live in processes of their own.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import guard
from daemon import config, control, gpu, versions
from daemon.config import Settings
from daemon.errors import ConfigError, DropforgeError, RootHeld
from daemon.executors import make_executor
from daemon.executors.base import Executor
from daemon.gpu.lock import GpuLock
from daemon.gpu.probe import GpuProbe, GpuSilent
from daemon.holds import HoldKind
from daemon.hooks import Hooks
from daemon.inbox.archive import Archive
from daemon.inbox.intake import Intake
from daemon.job import FINAL_STATES, Job, JobState
from daemon.losses import LossHistory
from daemon.notifications import Endings
from daemon.observability import logs
from daemon.observability.status import (
    RECENT_JOBS,
    WAITING_FILES,
    CurrentModel,
    StatusSnapshot,
    finished_job,
    gpu_device,
    running_job,
    write_status,
)
from daemon.recovery import open_store, repair_inbox
from daemon.retry import StopReason
from daemon.scheduler import Scheduler
from daemon.sd_notify import extend_timeout, notify, reloading, status_line, watchdog_seconds
from daemon.wakeup import Wakeup

if TYPE_CHECKING:  # its library is imported only where metrics are wanted
    from daemon.observability.metrics import MetricsPublisher

BUSY_SECONDS = 0.25  # between two looks at a running trainer's progress
PRUNE_SECONDS = 600.0  # between two batches of old jobs that are forgotten
STOP_GRACE_SECONDS = 30.0  # asked of systemd at each tick of a stop; our own stop_timeout is what ends the wait
REFRESH_SECONDS = 60.0  # the current version is read again at least so often, whoever changed it


class Service:
    """One daemon on one root. `run` returns the exit code; everything before it raises DropforgeError."""

    def __init__(
        self, settings: Settings, *, log: Any, executor: Executor | None = None, metrics: MetricsPublisher | None = None
    ) -> None:
        self.settings = settings
        self.log = log
        self.wakeup = Wakeup()
        self.stopping = False
        self._stop_requests = 0
        self._reload_requested = False
        lock = settings.executor.gpu_lock
        self._gpu = GpuLock(settings.root / lock if lock else None)
        self._executor = executor or make_executor(settings.executor, gpu=self._gpu)
        self._published = 0.0
        self._last: tuple[Any, ...] = ()
        self._model: CurrentModel | None = None
        self._model_read = 0.0
        self._model_link = ""
        self._status_failed = False
        self._losses = LossHistory()
        self._gpus = GpuProbe()
        self._metrics = metrics
        self._ticks = 0
        self._next_prune = 0.0
        self._ended: list[Job] = []  # jobs in a final state when serving ended

    def run(self, *, once: bool = False) -> int:
        """Serve until asked to stop; with `once`, until inbox and queue are empty.

        Returns 0; with `once` 1 if a job failed, 3 if only refused data was met. Raises RootHeld when another daemon
        owns the root.
        """
        try:
            self.settings.state_dir.mkdir(parents=True, exist_ok=True)
            self.settings.model_dir.mkdir(parents=True, exist_ok=True)
            lock = guard.ModelLock(self.settings.state_dir, owner="dropforge daemon")
            lock.acquire()
        except OSError as error:
            raise DropforgeError(operation="serve", subject=self.settings.root, cause=str(error)) from error
        except guard.ModelLocked as error:
            raise RootHeld(
                operation="serve",
                subject=self.settings.root,
                cause=f"another daemon holds it ({error.holder})",
                hint="`dropforge status` shows it; stop it first, or choose another --root",
            ) from error
        try:
            return self._serve(once=once)
        except OSError as error:  # what a tick can live with is handled there; the next start finds its way
            raise DropforgeError(
                operation="serve", subject=self.settings.root, cause=str(error), hint="mend that and start it again"
            ) from error
        finally:
            lock.release()

    def _serve(self, *, once: bool) -> int:
        with suppress(GpuSilent):  # a device that is not there is an error now, not when a file comes
            gpu.choose(self._gpus.fresh(), self.settings.gpu.device)
        self._listen()
        self._publish(status="starting", reason="recovering", force=True)
        self.store = open_store(self.settings, self.log)
        archive = Archive(self.settings, self.store, self.log)
        self.intake = Intake(self.settings, self.store, archive, wakeup=self.wakeup, log=self.log)
        self.hooks = Hooks(self.settings.hooks, self.log)
        self.scheduler = Scheduler(
            self.settings,
            self.store,
            self._executor,
            archive=archive,
            hooks=self.hooks,
            gpu_lock=self._gpu,
            gpus=self._gpus,
            log=self.log,
        )
        self.endings = Endings(self.store, hooks=self.hooks, log=self.log)
        self.intake.open(repair_inbox(self.settings, self.store, archive, self.log))
        self.scheduler.recover()
        before = {job.id for job in self.store.jobs(FINAL_STATES)} if once else set()
        self._publish(force=True)
        self.log.info("daemon.started", root=str(self.settings.root), watch_mode=self.intake.view().watch_mode)
        notify(
            "READY=1", status_line(f"watching {self.settings.inbox_dir}")
        )  # last: who waited for it may look at both
        try:
            while not self._finished(once=once):
                self.tick()
        finally:
            self.intake.close()
            self._executor.close()
            self.endings.tell()
            self.hooks.close()
            self._publish(status="stopped", reason="", force=True)
            self.log.info("daemon.stopped")
            self.store.close()
        if not once:
            return 0
        after = {job.state for job in self._ended if job.id not in before}
        return 1 if JobState.FAILED in after else 3 if JobState.REJECTED in after else 0

    def tick(self) -> None:
        """One round. The order is the story of one file, seen from the end that is nearest to done."""
        self.wakeup.clear()
        self._ticks += 1
        if self._reload_requested:
            self._reload()
        if time.monotonic() >= self._next_prune:
            self._next_prune = time.monotonic() + PRUNE_SECONDS
            control.prune(self.settings, self.store)
        if self.scheduler.listen():
            self.intake.adopt_claimed()  # a job that a person put back has its rows checked again
        self.intake.tick(accept=not self.stopping)
        self.scheduler.reap()
        self.endings.tell()
        if not self.stopping:
            self.scheduler.dispatch()
        self.hooks.collect()
        self._publish()
        notify("WATCHDOG=1", *self._stop_patience())
        self.wakeup.wait(self._patience())

    def _finished(self, *, once: bool) -> bool:
        if self._stop_requests and not self.stopping:
            self.stopping = True
            self.log.info("daemon.stopping", running=self.scheduler.run.job.id if self.scheduler.run else None)
            notify("STOPPING=1", status_line("sealing a checkpoint" if self.scheduler.run else "stopping"))
            self.scheduler.request_stop(StopReason.STOP)
        elif self._stop_requests > 1:
            self.scheduler.end_now()  # a second signal: at once, still consistent
        done = self.stopping and self.scheduler.run is None
        if once and not done:
            view = self.intake.view()
            busy = self.scheduler.run or view.waiting or view.scanning or view.deferred
            waiting = self.store.jobs({JobState.CLAIMED, JobState.QUEUED}, limit=1)
            done = self._ticks > 0 and not busy and not waiting
        if done:
            self._ended = self.store.jobs(FINAL_STATES)
        return done

    def _patience(self) -> float:
        """Seconds until something may be due although no bell rings."""
        due = [self.settings.status.status_interval]
        if self.scheduler.run is not None or self.stopping:
            due.append(BUSY_SECONDS)
        watchdog = watchdog_seconds()
        heartbeat = watchdog / 3 if watchdog else None
        for seconds in (self.intake.next_due_seconds(), self.scheduler.next_start, heartbeat):
            if seconds is not None:
                due.append(seconds)
        return max(0.0, min(due))

    def _stop_patience(self) -> tuple[str, ...]:
        """While a trainer seals its last checkpoint, systemd waits as long as we do, whatever the unit says."""
        return (extend_timeout(STOP_GRACE_SECONDS),) if self.stopping and self.scheduler.run is not None else ()

    def _publish(self, *, status: str | None = None, reason: str = "", force: bool = False) -> None:
        """Write status.json at each change and at each heartbeat."""
        if status == "starting":  # there is no store yet to tell of
            snapshot = StatusSnapshot(
                status=status,
                reason=reason,
                status_interval=self.settings.status.status_interval,
                log_path=str(self.settings.log_path),
            )
        else:
            snapshot = self._snapshot() if status is None else replace(self._snapshot(), status=status, reason=reason)
        now = time.monotonic()
        job = snapshot.job
        shown = (snapshot.status, snapshot.reason, dict(snapshot.queue), job and (job["id"], job["phase"]))
        due = now - self._published >= self.settings.status.status_interval
        if not (force or due or shown != self._last):
            return
        if self._metrics is not None and status != "starting":
            waited = _waited_seconds(self.scheduler.run.job) if self.scheduler.run else None
            self._metrics.publish(snapshot, overflows=self.intake.view().overflows, waited_seconds=waited)
        try:
            write_status(self.settings.status_path, snapshot)
        except OSError as error:
            if not self._status_failed:  # once: a full disk must not fill the log as well
                self.log.error("status.not_written", error=str(error))
            self._status_failed = True
            return
        if self._status_failed:
            self.log.info("status.written_again")
        self._status_failed = False
        self._published, self._last = now, shown
        notify(status_line(snapshot.status, snapshot.reason))

    def _snapshot(self) -> StatusSnapshot:
        view = self.intake.view()
        run = self.scheduler.run
        counts = self.store.counts()
        hold = self.scheduler.hold
        if self.stopping:
            status, reason = "stopping", "a checkpoint is being sealed" if run else ""
        elif run is not None:
            status, reason = ("waiting", run.waits) if run.waits else ("training", run.job.id)
        elif hold is not None:
            status, reason = "paused" if hold.kind is HoldKind.PAUSED else "waiting", hold.reason
        elif view.waiting or view.scanning:
            first = view.waiting[0].reason if view.waiting else "rows are being checked"
            status, reason = "waiting", first
        elif counts[JobState.QUEUED]:
            status, reason = "waiting", self.store.queue(limit=1)[0].reason
        else:
            status, reason = "idle", ""
        return StatusSnapshot(
            status=status,
            reason=reason,
            status_interval=self.settings.status.status_interval,
            log_path=str(self.settings.log_path),
            watch_mode=view.watch_mode,
            events_lost=view.overflows,
            queue={**counts, "deferred": view.deferred},
            job=running_job(run.job, run.progress, self._losses.observe(run.run_dir, run.job.attempt, run.progress))
            if run
            else None,
            waiting=tuple(
                {"file": item.name, "reason": item.reason, "since": item.since} for item in view.waiting[:WAITING_FILES]
            ),
            left_alone=tuple({"file": item.name, "reason": item.reason} for item in view.left_alone[:WAITING_FILES]),
            recent=tuple(finished_job(job) for job in self.store.recent(RECENT_JOBS)),
            model=self._current_model(),
            gpu=tuple(map(gpu_device, self._gpus.known())),
            warnings=tuple(view.warnings),
        )

    def _current_model(self) -> CurrentModel | None:
        now = time.monotonic()
        link = _link(self.settings.model_dir / versions.LATEST)
        if not self._model_read or link != self._model_link or now - self._model_read > REFRESH_SECONDS:
            self._model_read, self._model_link = now, link
            try:
                version = versions.current_version(self.settings.model_dir)
            except DropforgeError as error:
                self.log.error("version.unreadable", error=str(error))
                version = None
            self._model = (
                {
                    "version": version.name,
                    "dataset": version.record.get("dataset"),
                    "created_at": version.record.get("created_at"),
                }
                if version
                else None
            )
        return self._model

    def _reload(self) -> None:
        """SIGHUP: valid settings apply to jobs that are not queued yet; an invalid file is reported and changes nothing."""
        self._reload_requested = False
        notify(*reloading())
        logs.reopen()  # for whoever moved the file away
        try:
            settings = config.load(self.settings.root)
        except ConfigError as error:
            self.log.error("daemon.not_reloaded", error=str(error))
        else:
            moved = settings.paths != self.settings.paths
            self.settings = settings.model_copy(update={"paths": self.settings.paths})
            self.intake.reload(self.settings)
            self.scheduler.settings = self.settings
            self.hooks.settings = self.settings.hooks
            self.log.info("daemon.reloaded", **({"ignored": "[paths] takes a restart"} if moved else {}))
        notify("READY=1")

    def _listen(self) -> None:
        signal.signal(signal.SIGHUP, self._on_reload)
        signal.signal(signal.SIGTERM, self._on_stop)
        signal.signal(signal.SIGINT, self._on_stop)
        signal.signal(signal.SIGCHLD, self._on_child)

    def _on_stop(self, number: int, frame: object) -> None:
        self._stop_requests += 1
        self.wakeup.set()

    def _on_reload(self, number: int, frame: object) -> None:
        self._reload_requested = True
        self.wakeup.set()

    def _on_child(self, number: int, frame: object) -> None:
        self.wakeup.set()


def _waited_seconds(job: Job) -> float | None:
    """From the claim of a job's file to the start of its latest attempt."""
    if job.started_at is None or not job.created_at:
        return None
    return (datetime.fromisoformat(job.started_at) - datetime.fromisoformat(job.created_at)).total_seconds()


def _link(path: Path) -> str:
    """Where a link leads, empty when it is none: whoever rolls back changes it."""
    try:
        return os.readlink(path)
    except OSError:
        return ""
