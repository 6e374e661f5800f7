"""The daemon: `tick` is its main loop. One thread; everything slow runs in a child process.

Other threads (watchdog's, the GPU probe's) only set the wakeup. Nothing in a tick blocks on a large file or on a trainer.
"""

from __future__ import annotations

import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import guard
from daemon import config, control, gpu, root_identity, sd_notify, versions
from daemon.config import Settings
from daemon.errors import ConfigError, DropforgeError, RootHeld
from daemon.executors import make_executor
from daemon.executors.base import Executor
from daemon.holds import HoldKind
from daemon.inbox.archive import Archive
from daemon.inbox.intake import Intake
from daemon.job import FINAL_STATES, Job, JobState
from daemon.notifications import Notifier
from daemon.observability import logs
from daemon.recovery import bring_forward, follow_move, open_store, repair_inbox
from daemon.retry import StopReason
from daemon.scheduler import Scheduler
from daemon.status_writer import StatusWriter, write_starting
from daemon.wakeup import Wakeup

if TYPE_CHECKING:  # its library is imported only where metrics are configured
    from daemon.observability.metrics import MetricsPublisher

POLL_SECONDS = 0.25  # between two looks at a running trainer's progress
PRUNE_SECONDS = 600.0  # between two batches of old jobs that are forgotten
STOP_GRACE_SECONDS = 30.0  # requested of systemd at each tick of a stop; our own stop_timeout is what ends the wait


class Service:
    """One daemon on one root. `run` returns the exit code; everything before it raises DropforgeError."""

    def __init__(
        self, settings: Settings, *, log: Any, executor: Executor | None = None, metrics: MetricsPublisher | None = None
    ) -> None:
        self.settings = settings
        self.log = log
        self.wakeup = Wakeup()
        self.stopping = False
        self._stop_signals = 0
        self._reload_requested = False
        self._gpus = gpu.GpuProbe()
        self._gpu = gpu.GpuReservation(settings, self._gpus)
        self._executor = executor or make_executor(settings.executor, gpu=self._gpu.lock)
        self._metrics = metrics
        self._ticks = 0
        self._next_prune = 0.0  # monotonic
        self._recovered = False
        self._contradiction = ""  # why it is not

    def run(self, *, once: bool = False) -> int:
        """Serve until asked to stop; with `once`, until inbox and queue are empty.

        Returns 0; with `once` 1 if a job failed, 3 if only refused data was met. Raises RootHeld when another daemon
        owns the root.
        """
        try:
            root_identity.require_state(self.settings)
            self.settings.state_dir.mkdir(parents=True, exist_ok=True)
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

    def tick(self) -> None:
        """Run one round: a file's way, from the end that is nearest to done."""
        self.wakeup.clear()
        self._ticks += 1
        self._require_same_store()
        self._recover()  # once, where the start could not
        self._handle_signals()  # SIGHUP reload, SIGTERM stop
        self._prune()
        if self.scheduler.poll_control():  # pause, cancel: written by the command line
            self.intake.adopt_claimed()  # a job that a person put back has its rows checked again
        self.intake.tick(accept=not self.stopping)  # inbox -> claimed -> queued
        self.scheduler.poll_run()  # running -> succeeded | failed | queued
        self.notifier.publish()  # log line and hooks for what ended
        if not self._recovered:
            self.scheduler.hold_contradicted()
        elif not self.stopping:
            self.scheduler.dispatch()  # queued -> running
        self.status.publish()
        self._feed_watchdog()
        self.wakeup.wait(self._max_sleep_seconds())

    def _serve(self, *, once: bool) -> int:
        with suppress(gpu.GpuUnavailable):  # a device that is not there is an error now, not when a file comes
            gpu.choose(self._gpus.fresh(), self.settings.gpu.device)
        self._install_signal_handlers()
        write_starting(self.settings, self.log)
        self._open()
        before = {job.id for job in self.store.jobs(FINAL_STATES)} if once else set()
        self.status.publish(force=True)
        self.log.info("daemon.started", root=str(self.settings.root), watch_mode=self.intake.view().watch_mode)
        # Last: who waited for it may look at both.
        sd_notify.notify("READY=1", sd_notify.status_line(f"watching {self.settings.inbox_dir}"))
        finished: list[Job] = []
        try:
            while not self._is_done(once=once):
                self.tick()
            finished = self.store.jobs(FINAL_STATES) if once else []
        finally:
            self._close()
        states = {job.state for job in finished if job.id not in before}
        return 1 if JobState.FAILED in states else 3 if JobState.REJECTED in states else 0

    def _open(self) -> None:
        """Open the store, repair what a crash left, begin to watch."""
        self.store = open_store(self.settings, self.log)
        self._store_identity = _identity(self.settings.store_path)
        root_identity.establish(self.settings, newest_known=self._newest_known)
        self._archive = archive = Archive(self.settings, self.store, self.log)
        self.intake = Intake(self.settings, self.store, archive, wakeup=self.wakeup, log=self.log)
        self.notifier = Notifier(self.store, hooks=self.settings.hooks, log=self.log)
        self.scheduler = Scheduler(
            self.settings,
            self.store,
            self._executor,
            archive=archive,
            hooks=self.notifier.hooks,
            gpu=self._gpu,
            log=self.log,
        )
        self.status = StatusWriter(
            self.settings,
            self.store,
            self.intake,
            self.scheduler,
            gpus=self._gpus,
            log=self.log,
            metrics=self._metrics,
        )
        self.intake.open()
        self._recover()

    def _recover(self) -> None:
        """Finish what an earlier daemon left; once, as soon as the parts of the root are known to belong together."""
        if self._recovered:
            return
        if reason := root_identity.contradiction(root_identity.read_parts(self.settings)):
            if reason != self._contradiction:
                self.log.error("root.contradicted", reason=reason)
            self._contradiction = reason
            return
        versions.mend_latest(self.settings, self.log)
        follow_move(self.settings, self.store, self.log)
        bring_forward(self.settings, self.store, self.log)
        self.intake.resume_claimed(repair_inbox(self.settings, self.store, self._archive, self.log))
        self.scheduler.recover()
        self._recovered = True

    def _newest_known(self) -> int:
        """Return the newest version that a job of the queue became; 0 when there is none."""
        return max((int(job.version) for job in self.store.jobs({JobState.SUCCEEDED}) if job.version), default=0)

    def _require_same_store(self) -> None:
        """Raise DropforgeError when the queue's file is not the one that was opened: another daemon may start on a new one."""
        try:
            is_same = _identity(self.settings.store_path) == self._store_identity
        except FileNotFoundError:
            is_same = False
        except OSError:
            return  # nothing can be told of it now
        if not is_same:
            raise DropforgeError(
                operation="serve",
                subject=self.settings.root,
                cause=f"{self.settings.store_path} was deleted or replaced while the daemon ran",
                hint="bring it back, or start again: what can be told from the other folders is put back",
            )

    def _close(self) -> None:
        self.intake.close()
        self._executor.close()
        self.notifier.close()
        self.status.publish(status="stopped", force=True)
        self.log.info("daemon.stopped")
        self.store.close()

    def _is_done(self, *, once: bool) -> bool:
        if self.stopping:
            return self.scheduler.run is None
        if once and not self._recovered:  # nobody is there to mend it
            raise DropforgeError(operation="serve", subject=self.settings.root, cause=self._contradiction)
        if not once or self._ticks == 0 or self._stop_signals:
            return False
        hold = self.scheduler.hold
        if hold is not None and hold.kind is HoldKind.IDENTITY:
            raise DropforgeError(operation="serve", subject=self.settings.root, cause=hold.reason)
        view = self.intake.view()
        is_busy = self.scheduler.run or view.waiting or view.scanning or view.deferred
        return not is_busy and not self.store.jobs({JobState.CLAIMED, JobState.QUEUED}, limit=1)

    def _prune(self) -> None:
        if time.monotonic() >= self._next_prune:
            self._next_prune = time.monotonic() + PRUNE_SECONDS
            control.prune(self.settings, self.store)

    def _max_sleep_seconds(self) -> float:
        """How long the loop may sleep."""
        due = [self.settings.status.status_interval]
        if self.scheduler.run is not None:
            due.append(POLL_SECONDS)
        elif self.stopping:
            return 0.0
        watchdog = sd_notify.watchdog_seconds()
        heartbeat = watchdog / 3 if watchdog else None
        for seconds in (self.intake.next_due_seconds(), self.scheduler.next_start_seconds(), heartbeat):
            if seconds is not None:
                due.append(seconds)
        return max(0.0, min(due))

    def _feed_watchdog(self) -> None:
        """While a trainer seals its last checkpoint, systemd waits as long as we do, whatever the unit says."""
        sealing = self.stopping and self.scheduler.run is not None
        sd_notify.notify("WATCHDOG=1", *((sd_notify.extend_timeout(STOP_GRACE_SECONDS),) if sealing else ()))

    # -- signals

    def _install_signal_handlers(self) -> None:
        signal.signal(signal.SIGHUP, self._on_reload)
        signal.signal(signal.SIGTERM, self._on_stop)
        signal.signal(signal.SIGINT, self._on_stop)
        signal.signal(signal.SIGCHLD, self._on_child)

    def _on_stop(self, number: int, frame: object) -> None:
        self._stop_signals += 1
        self.wakeup.set()

    def _on_reload(self, number: int, frame: object) -> None:
        self._reload_requested = True
        self.wakeup.set()

    def _on_child(self, number: int, frame: object) -> None:
        self.wakeup.set()

    def _handle_signals(self) -> None:
        if self._reload_requested:
            self._reload()
        if self._stop_signals and not self.stopping:
            run = self.scheduler.run
            self.stopping = self.status.stopping = True
            self.log.info("daemon.stopping", running=run.job.id if run else None)
            sd_notify.notify("STOPPING=1", sd_notify.status_line("sealing a checkpoint" if run else "stopping"))
            self.scheduler.request_stop(StopReason.STOP)
        elif self._stop_signals > 1:
            self.scheduler.kill()  # a second signal: at once, still consistent

    def _reload(self) -> None:
        """SIGHUP: apply valid settings to jobs that are not queued yet; an invalid file is reported and changes nothing.

        Settings that take a restart are named in the log and, until it comes, in the status.
        """
        self._reload_requested = False
        sd_notify.notify(*sd_notify.reloading())
        logs.reopen()  # after logrotate
        try:
            settings = config.load(self.settings.root)
        except ConfigError as error:
            self.log.error("daemon.not_reloaded", error=str(error))
        else:
            ignored = config.changes_for_restart(self.settings, settings)
            self.settings = config.reloaded(self.settings, settings)
            self.intake.reload(self.settings)
            self.scheduler.settings = self.status.settings = self.settings
            self.notifier.hooks.settings = self.settings.hooks
            names = ", ".join(ignored)
            self.status.warnings = (f"changed, but applied only by a restart: {names}",) if ignored else ()
            self.log.info("daemon.reloaded", **({"ignored": f"{names}: applied only by a restart"} if ignored else {}))
        sd_notify.notify("READY=1")


def _identity(path: Path) -> tuple[int, int]:
    """Return device and inode. Raises OSError."""
    found = path.stat()
    return found.st_dev, found.st_ino
