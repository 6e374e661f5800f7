"""The daemon: `tick` is its main loop. One thread; everything slow runs in a child process.

Other threads (watchdog's, the GPU probe's) only set the wakeup. Nothing in a tick blocks on a large file or on a trainer.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import guard
from daemon import config, control, gpu, root_identity, sd_notify, versions
from daemon.config import Settings
from daemon.containment import Containment
from daemon.errors import ConfigError, DropforgeError, RootHeld, StoreError, TryLater, Unexpected
from daemon.executors import make_executor
from daemon.executors.base import Executor
from daemon.holds import FOR_A_PERSON, Hold, HoldKind, hold_of, no_room
from daemon.in_hand import NOTE_NAME, InHand
from daemon.inbox.archive import Archive
from daemon.inbox.intake import Intake
from daemon.job import FINAL_STATES, Job, JobState, utc_now
from daemon.left_alone import LeftAlone
from daemon.notice_sender import NoticeSender
from daemon.notifications import Notifier
from daemon.observability import logs
from daemon.observability.endpoint import port_problem
from daemon.recovery import bring_forward, follow_move, open_store, repair_inbox, sweep_memories
from daemon.retry import StopReason
from daemon.run_window import RunWindow
from daemon.scheduler import Scheduler
from daemon.status_writer import ShowJob, StatusWriter, write_holding
from daemon.store import BrokenStore, NewerStore
from daemon.verification import BackgroundVerifier
from daemon.wakeup import Wakeup
from guard.atomic import make_folder_durable
from guard.layout import LOCK_NAME

if TYPE_CHECKING:  # its library is imported only where metrics are configured
    from daemon.observability.metrics import MetricsPublisher

POLL_SECONDS = 0.25  # between two looks at a running trainer's progress
PRUNE_SECONDS = 600.0  # between two batches of old jobs that are forgotten
RETRY_SECONDS = 1.0  # between two tries of what could not be recorded or opened
PROBE_KEY = "recorded_again"  # of the store's controls: what is written to learn whether it can be
REBUILD_SECONDS = 60.0  # between two stores that are rebuilt while the daemon runs
ONCE_PATIENCE_SECONDS = 15.0  # `run --once` waits so long for a machine that nobody is there to mend
STOP_GRACE_SECONDS = 30.0  # requested of systemd at each tick of a stop; our own stop_timeout is what ends the wait


def take_root(settings: Settings) -> guard.ModelLock:
    """Take the lock of a root, which its one daemon holds. Raises RootHeld, and DropforgeError where it cannot be taken."""
    try:
        root_identity.require_state(settings)
        make_folder_durable(settings.state_dir)
        lock = guard.ModelLock(settings.state_dir, owner="dropforge daemon")
        lock.acquire()
    except guard.ModelLocked as error:
        if not error.holder:  # no daemon: whoever may read the file may lock it, and it goes by itself
            raise TryLater(
                operation="serve",
                subject=settings.root,
                cause=error.cause,
                hint=f"`fuser -v {settings.state_dir / LOCK_NAME}` names it; the daemon can start when that has gone",
            ) from error
        raise RootHeld(
            operation="serve",
            subject=settings.root,
            cause=f"another daemon holds it: {error.cause}",
            hint="`dropforge status` shows it; stop it first, or choose another --root",
        ) from error
    except guard.GuardError as error:
        raise DropforgeError(operation="serve", subject=settings.root, cause=error.cause, hint=error.hint) from error
    except OSError as error:
        raise DropforgeError(operation="serve", subject=settings.root, cause=str(error)) from error
    return lock


class Service:
    """One daemon on one root. `run` returns the exit code; everything before it raises DropforgeError."""

    def __init__(
        self,
        settings: Settings,
        *,
        log: Any,
        executor: Executor | None = None,
        metrics: MetricsPublisher | None = None,
        show: ShowJob | None = None,
        lock: guard.ModelLock | None = None,
    ) -> None:
        """`lock`: the root's, where it is held already."""
        self.settings = settings
        self._lock = lock
        self.log = log
        self.wakeup = Wakeup()
        self.stopping = False
        self._stop_signals = 0
        self._reload_requested = False
        self._gpus = gpu.GpuProbe()
        self._gpu = gpu.GpuReservation(settings, self._gpus)
        self._window = RunWindow(self._gpus)
        self._executor = executor or make_executor(settings.executor, gpu=self._gpu.lock)
        self._metrics = metrics
        self._show = show
        self._ticks = 0
        self._next_prune = 0.0  # monotonic
        self._recovered = False
        self._contradiction = ""  # why it is not
        self._trouble: Hold | None = None  # why nothing can be recorded now
        self._troubled_since = 0.0  # monotonic
        self._rebuilt_at = float("-inf")  # likewise: when a damaged store was
        self._in_hand = InHand(settings.state_dir / NOTE_NAME)
        self._containment = Containment(self._in_hand, log)
        self._hopeless_since = float("inf")  # likewise: of `run --once`, since when nothing can go on

    def run(self, *, once: bool = False) -> int:
        """Serve until asked to stop; with `once`, until inbox and queue are empty.

        Returns 0; with `once` 1 if a job failed, 3 if only refused data was met. Raises RootHeld when another daemon
        owns the root.
        """
        lock = self._lock if self._lock is not None and self._lock.is_held else take_root(self.settings)
        try:
            return self._serve(once=once)
        except OSError as error:  # what a tick can live with is handled there; the next start finds its way
            raise DropforgeError(
                operation="serve", subject=self.settings.root, cause=str(error), hint="mend that and start it again"
            ) from error
        finally:
            lock.release()

    def tick(self) -> None:
        """Run one round, and sleep until the next is due."""
        self.wakeup.clear()
        self._ticks += 1
        self._require_same_store()
        self._run_round()
        self._publish_status()
        self._feed_watchdog()
        self.wakeup.wait(self._max_sleep_seconds())

    def _run_round(self) -> None:
        """Go a file's way, from the end that is nearest to done.

        What the machine refuses in one stage, a full disk or a locked store, does not keep the others from being
        tried: a running trainer is followed all the same. Nothing is launched then.
        """
        stages = (
            self._handle_signals,  # SIGHUP reload, SIGTERM stop
            self._recover,  # once, and again after what could not be recorded
            self._prune,
            self._poll_control,  # pause, cancel: written by the command line
            self._poll_inbox,  # inbox -> claimed -> queued
            self._poll_run,  # running -> succeeded | failed | queued
            self._publish_ends,  # log line and hooks for what ended
            self._verify,  # what is kept, read again now and then
        )
        troubles = [hold for hold in map(self._attempt, stages) if hold is not None]
        trouble = troubles[0] if troubles else self._attempt(self._dispatch)  # queued -> running
        if trouble is None and self._trouble is not None:  # a round that had nothing to record says nothing of the disk
            trouble = self._attempt(self._record_probe) or no_room(self.settings)
        if trouble is not None:
            self._hold(trouble)
        elif self._trouble is not None:
            self._trouble = None
            self.scheduler.unsuspend()

    def _record_probe(self) -> None:
        self.store.set_control(PROBE_KEY, utc_now())

    def _poll_control(self) -> None:
        if self.scheduler.poll_control():
            self.intake.adopt_claimed()  # a job that a person put back has its rows checked again

    def _poll_inbox(self) -> None:
        self.intake.tick(accept=not self.stopping)

    def _poll_run(self) -> None:
        self.scheduler.poll_run()

    def _publish_ends(self) -> None:
        self.notifier.notices.watch_hold(self._trouble or self.scheduler.hold)
        if self.notifier.publish():
            self.wakeup.set()

    def _verify(self) -> None:
        self.verifier.poll()

    def _dispatch(self) -> None:
        if not self._recovered:
            self.scheduler.hold_contradicted()
        elif not self.stopping:
            self.scheduler.dispatch()

    def _attempt(self, stage: Callable[[], None]) -> Hold | None:
        """Run one stage; returns what it has to wait for.

        A store that is damaged is rebuilt from the folders, as at a start.
        """
        try:
            stage()
        except BrokenStore as error:
            if time.monotonic() - self._rebuilt_at < REBUILD_SECONDS:  # the disk itself is at fault
                return hold_of(error)
            self._rebuilt_at = time.monotonic()
            self.log.error("store.broken", reason=error.cause)
            self._reopen(damage=error.cause)
        except Unexpected as error:
            return self._contain(error)
        except (DropforgeError, OSError) as error:
            return hold_of(error)
        except Exception as error:
            return self._contain(Unexpected("at work", job="", file=None, cause=error))
        return None

    def _contain(self, error: Unexpected) -> Hold | None:
        """Set what met an unexpected error aside. Returns the hold of one that belongs to no file and no job."""
        self._recovered = False  # what was cut short half-way is found as after a crash
        return self._containment.contain(error)

    def _hold(self, hold: Hold) -> None:
        """Hold everything for a reason of the machine's."""
        if self._trouble is None:
            self._troubled_since = time.monotonic()
        self._trouble = hold
        self._recovered = False  # what was cut short half-way is found as after a crash
        self.scheduler.suspend(hold)

    def _publish_status(self, *, force: bool = False) -> None:
        try:
            self.status.publish(force=force)
        except (StoreError, OSError) as error:  # the queue cannot be read: tell at least that
            write_holding(self.settings, (self._trouble or hold_of(error)).reason)
        except Exception as error:
            hold = self._contain(Unexpected("writing the status", job="", file=None, cause=error))
            write_holding(self.settings, hold.reason if hold else "")

    def _serve(self, *, once: bool) -> int:
        with suppress(gpu.GpuUnavailable):  # a device that is not there is an error now, not when a file comes
            gpu.choose(self._gpus.fresh(), self.settings.gpu.device)
        self._install_signal_handlers()
        write_holding(self.settings, "recovering", status="starting")
        if not self._open_patiently(once=once):
            return 0  # it was asked to stop before it could begin
        before = {job.id for job in self.store.jobs(FINAL_STATES)} if once else set()
        self._publish_status(force=True)
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

    def _open_patiently(self, *, once: bool, damage: str = "") -> bool:
        """Open, waiting for a disk that is full or a store that is locked. Returns whether it is open."""
        last = ""
        since = time.monotonic()
        while not self._stop_signals:
            try:
                self._open(damage)
            except (NewerStore, BrokenStore):
                raise
            except Exception as error:
                self._close_parts()
                if isinstance(error, DropforgeError) and not isinstance(error, StoreError):
                    raise  # a person has to say what is true
                if once and time.monotonic() - since > ONCE_PATIENCE_SECONDS:
                    raise
                hold = (
                    hold_of(error)
                    if isinstance(error, DropforgeError | OSError)
                    else self._containment.contain_start(error)
                )
                if hold.reason != last:
                    self.log.warning("queue.held", kind=hold.kind.value, reason=hold.reason)
                last = hold.reason
                write_holding(self.settings, hold.reason)
                sd_notify.notify("WATCHDOG=1", sd_notify.extend_timeout(STOP_GRACE_SECONDS))
                self.wakeup.clear()
                self.wakeup.wait(RETRY_SECONDS)
            else:
                if (trouble := self._attempt(self._recover)) is not None:
                    self._hold(trouble)
                return True
        return False

    def _open(self, damage: str) -> None:
        """Open the store, make the parts around it, begin to watch."""
        self._parts = ExitStack()
        self.store = open_store(self.settings, self.log, damage=damage)
        self._parts.callback(self.store.close)
        self._store_identity = _identity(self.settings.store_path)
        root_identity.establish(self.settings, newest_known=self._newest_known)
        self._containment.note_end(self._in_hand.open())
        self._left_alone = left_alone = LeftAlone(self.store)
        in_hand = self._in_hand
        self._archive = archive = Archive(self.settings, self.store, self.log, in_hand=in_hand, left_alone=left_alone)
        self.intake = Intake(self.settings, self.store, archive, wakeup=self.wakeup, in_hand=in_hand, log=self.log)
        for priority, name, inode in left_alone.files:
            self.intake.set_aside((priority, name), "left alone: the daemon died over it, again and again", inode=inode)
        notices = NoticeSender(self.settings, self.store, self.log)
        self.notifier = Notifier(
            self.store, hooks=self.settings.hooks, notices=notices, in_hand=in_hand, left_alone=left_alone, log=self.log
        )
        self._parts.callback(self.notifier.close)
        self.scheduler = Scheduler(
            self.settings,
            self.store,
            self._executor,
            archive=archive,
            hooks=self.notifier.hooks,
            gpu=self._gpu,
            window=self._window,
            in_hand=in_hand,
            log=self.log,
        )
        self._containment.attach(self.store, self.scheduler, self.intake, left_alone)
        self.verifier = BackgroundVerifier(self.settings, self.log)
        self.status = StatusWriter(
            self.settings,
            self.store,
            self.intake,
            self.scheduler,
            verifier=self.verifier,
            notices=notices,
            gpus=self._gpus,
            in_hand=in_hand,
            left_alone=left_alone,
            log=self.log,
            metrics=self._metrics,
            show=self._show,
        )
        self.status.stopping = self.stopping
        self._parts.callback(self.intake.close)
        self.intake.open()
        self._recovered = False

    def _close_parts(self) -> None:
        """Close what `_open` opened, as far as it came; what cannot be recorded now is found by the next start."""
        try:
            self._parts.close()
        except (StoreError, OSError) as error:
            self.log.error("daemon.not_closed", error=str(error))

    def _reopen(self, *, damage: str) -> None:
        """Begin anew around another store, as a start does; a running trainer goes on."""
        self._close_parts()
        if self._open_patiently(once=False, damage=damage):
            self._publish_status(force=True)

    def _recover(self) -> None:
        """Finish what was cut short, as soon as the parts of the root are known to belong together."""
        if self._recovered:
            return
        if reason := root_identity.contradiction(root_identity.read_parts(self.settings)):
            if reason != self._contradiction:
                self.log.error("root.contradicted", reason=reason)
            self._contradiction = reason
            return
        self._containment.settle_end()
        versions.mend_latest(self.settings, self.log)
        follow_move(self.settings, self.store, self.log)
        bring_forward(self.settings, self.store, self.log)
        warnings = repair_inbox(
            self.settings, self.store, self._archive, self.log, in_hand=self._in_hand, left_alone=self._left_alone
        )
        self.intake.resume_claimed(warnings)
        if self.scheduler.run is None:
            self.scheduler.recover()
        sweep_memories(self.settings, self.store, self.log)
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
        publish = partial(self.status.publish, status="stopped", force=True)
        for step in (
            self.verifier.close,
            self.intake.close,
            self._executor.close,
            self.notifier.close,
            publish,
            self.store.close,
            self._in_hand.close,
        ):
            try:
                step()
            except Exception as error:  # what cannot be recorded now is found by the next start
                self.log.error("daemon.not_closed", error=str(error))
        self.log.info("daemon.stopped")

    def _is_done(self, *, once: bool) -> bool:
        if self.stopping:
            run = self.scheduler.run  # one whose end cannot be recorded now is finished by the next start
            return run is None or (self._trouble is not None and run.ended is not None)
        if once:
            self._require_hope()
        if not once or self._ticks == 0 or self._stop_signals:
            return False
        hold = self.scheduler.hold
        if hold is not None and hold.kind in FOR_A_PERSON:
            raise DropforgeError(operation="serve", subject=self.settings.root, cause=hold.reason)
        view = self.intake.view()
        is_busy = self.scheduler.run or view.waiting or view.scanning or view.deferred
        return not is_busy and not self.store.jobs({JobState.CLAIMED, JobState.QUEUED}, limit=1)

    def _require_hope(self) -> None:
        """Raise DropforgeError for what `run --once` would wait for without end: nobody is there to mend it."""
        if self._trouble is not None:
            since, reason = self._troubled_since, self._trouble.reason
        elif not self._recovered:
            since, reason = float("-inf"), self._contradiction
        else:
            hold = self.scheduler.hold
            is_closed = hold is not None and hold.kind in (HoldKind.UNWRITABLE, HoldKind.NO_SPACE)
            reason = self.intake.unusable or (hold.reason if hold is not None and is_closed else "")
            self._hopeless_since = since = min(self._hopeless_since, time.monotonic()) if reason else float("inf")
        if reason and time.monotonic() - since > ONCE_PATIENCE_SECONDS:
            raise DropforgeError(
                operation="serve", subject=self.settings.root, cause=reason, hint="mend that and start it again"
            )

    def _prune(self) -> None:
        if time.monotonic() >= self._next_prune:
            self._next_prune = time.monotonic() + PRUNE_SECONDS
            control.prune(self.settings, self.store)

    def _max_sleep_seconds(self) -> float:
        """How long the loop may sleep."""
        due = [self.settings.status.status_interval]
        if self._trouble is not None:
            return RETRY_SECONDS
        if self.scheduler.run is not None:
            due.append(POLL_SECONDS)
        elif self.stopping:
            return 0.0
        watchdog = sd_notify.watchdog_seconds()
        heartbeat = watchdog / 3 if watchdog else None
        try:
            own = (self.intake.next_due_seconds(), self.scheduler.next_start_seconds())
        except StoreError:
            return RETRY_SECONDS  # the next round meets it again
        due += [seconds for seconds in (*own, heartbeat) if seconds is not None]
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
            self._in_hand.close()
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
            not_taken = (
                f"{config.CONFIG_NAME} was read again and not taken: {error.cause}; what was valid before still holds"
            )
            self.status.warnings = (not_taken,)
        else:
            ignored = config.changes_for_restart(self.settings, settings)
            self.settings = config.reloaded(self.settings, settings)
            self.intake.reload(self.settings)
            self.scheduler.settings = self.status.settings = self.verifier.settings = self.settings
            self.notifier.hooks.settings = self.settings.hooks
            self.notifier.notices.settings = self.settings
            names = ", ".join(ignored)
            told = [f"changed, but applied only by a restart: {names}"] if ignored else []
            if settings.metrics.port not in (None, self.settings.metrics.port):
                told += filter(None, [port_problem(settings.metrics.port or 0)])
            self.status.warnings = tuple(told)
            self.log.info("daemon.reloaded", **({"ignored": f"{names}: applied only by a restart"} if ignored else {}))
            for warning in told[1:]:
                self.log.error("metrics.not_served", port=settings.metrics.port, error=warning)
        sd_notify.notify("READY=1")


def _identity(path: Path) -> tuple[int, int]:
    """Return device and inode. Raises OSError."""
    found = path.stat()
    return found.st_dev, found.st_ino
