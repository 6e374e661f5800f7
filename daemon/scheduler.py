"""The scheduler: one job at a time, from the queue to a promoted version, across every way in which a run can end.

It keeps nothing that the store and the run directory do not hold: `recover` finds its way from there after any crash.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import guard
from daemon import gpu
from daemon.config import Settings
from daemon.errors import ConfigError, DropforgeError, is_no_space
from daemon.executors.base import Executor, Exit
from daemon.gpu.lock import GpuLock
from daemon.gpu.probe import GpuProbe, GpuSilent
from daemon.holds import PAUSED_KEY, Hold, HoldKind, no_space, paused, unwritable
from daemon.hooks import Hooks
from daemon.inbox.archive import Archive
from daemon.job import (
    RUN_SPEC_VERSION,
    FailureKind,
    Job,
    JobState,
    Progress,
    RunResult,
    RunSpec,
)
from daemon.promotion import promote
from daemon.recipe import Recipe
from daemon.retry import Conclusion, StopReason, conclude, halved
from daemon.run_dir import RunReader, run_dir_of, sealed_step
from daemon.store import JobStore, TransitionRefused
from daemon.text import escape


@dataclass
class Run:
    """The attempt in progress. Handles stay with the executor; this remembers what was asked and read so far."""

    job: Job
    run_dir: Path
    reader: RunReader
    asked: StopReason | None = None  # why the trainer was asked to leave
    asked_at: float = 0.0  # monotonic
    ended: bool = False  # it was asked, did not leave, and was ended
    progress: Progress | None = None
    launched_at: float = field(default_factory=time.monotonic)
    promote_at: float | None = None  # monotonic; when a promotion that failed is tried again
    promote_failures: int = 0
    waits: str = ""  # for what its promotion waits
    moved_at: float = field(default_factory=time.monotonic)  # when its progress changed last


class Scheduler:
    """Launches, watches and concludes runs. Every method returns promptly; nothing here waits for a trainer."""

    def __init__(
        self,
        settings: Settings,
        store: JobStore,
        executor: Executor,
        *,
        archive: Archive,
        hooks: Hooks,
        gpu_lock: GpuLock,
        gpus: GpuProbe,
        log: Any,
    ) -> None:
        self.settings = settings
        self._store = store
        self._executor = executor
        self._archive = archive
        self._hooks = hooks
        self._log = log
        self._gpu = gpu_lock
        self._gpus = gpus
        self._device: str | None = None  # UUID of the GPU for the next launch
        self._run: Run | None = None
        self._hold: Hold | None = None
        self._seen_version = -1

    @property
    def run(self) -> Run | None:
        """The attempt in progress."""
        return self._run

    @property
    def hold(self) -> Hold | None:
        """Why nothing is launched although a job may be ready."""
        return self._hold

    @property
    def next_start(self) -> float | None:
        """Seconds until a queued job's back-off ends, None when nothing waits for that."""
        due = self._store.next_due(time.time())
        return None if due is None else max(0.0, due - time.time())

    def recover(self) -> None:
        """Take up what an earlier daemon left running: adopt a living trainer (and ask it to leave), conclude a dead one."""
        for left in self._store.jobs({JobState.RUNNING}):
            directory = run_dir_of(self.settings.state_dir, left.id)
            # What it sealed while no daemon listened counts as progress all the same.
            job = self._store.update(left.id, max_step=max(left.max_step, sealed_step(directory)))
            run = Run(job=job, run_dir=directory, reader=RunReader(directory))
            run.asked = StopReason.CANCEL if job.cancel_request else None
            self._run = run
            if self._executor.adopt(run.run_dir):
                self._log.warning("trainer.adopted", job=job.id, attempt=job.attempt)
                run.asked, wanted = None, run.asked
                self.request_stop(wanted or StopReason.STOP)
                return  # reap concludes it; at most one job is ever running
            self._conclude(run, Exit())

    def listen(self) -> bool:
        """Hear what people asked for through the store; True when another process has written to it."""
        version = self._store.data_version()
        if version == self._seen_version:
            return False
        self._seen_version = version
        control = self._store.control(PAUSED_KEY)
        self._change_hold(paused(control) or (None if self._is_paused() else self._hold))
        run = self._run
        if run is None:
            return True
        run.job = self._store.get(run.job.id)
        if run.job.cancel_request and run.asked is not StopReason.CANCEL:
            self.request_stop(StopReason.CANCEL)
        elif control and control.get("mode") == "now" and run.asked is None:
            self.request_stop(StopReason.PAUSE)
        return True

    def reap(self) -> None:
        """Carry the trainer's news into the log, conclude it when it has ended, end it when it does not leave."""
        run = self._run
        if run is None:
            return
        if run.promote_at is not None:
            if time.monotonic() >= run.promote_at or run.asked is StopReason.CANCEL:
                self._conclude(run, Exit(code=0))
            return
        self._relay(run)
        ended = self._executor.poll(run.run_dir)
        if ended is not None:
            self._relay(run)
            self._conclude(run, ended)
            return
        now = time.monotonic()
        queue = self.settings.queue
        if run.asked is None:
            if queue.job_timeout and now - run.launched_at > queue.job_timeout:
                self.request_stop(StopReason.TIMEOUT)
            elif queue.stall_timeout and now - run.moved_at > queue.stall_timeout:
                self.request_stop(StopReason.STALL)
        elif not run.ended and now - run.asked_at > queue.stop_timeout:
            self._log.warning("trainer.ended", job=run.job.id, waited_seconds=round(now - run.asked_at, 1))
            self._executor.end(run.run_dir)
            run.ended = True

    def dispatch(self) -> None:
        """Launch the next job when none is running and nothing holds the queue."""
        if self._run is not None or self._is_paused():
            return
        ready = self._store.peek(time.time())
        if ready is None:
            self._gpu.give()
            self._change_hold(None)
            return
        if self._is_trained(ready):
            return
        recipe = Recipe.model_validate(ready.recipe) if ready.recipe else self.settings.recipe
        self._change_hold(unwritable(self.settings) or no_space(self.settings, recipe) or self._gpu_in_use(recipe))
        if self._hold is not None:
            return
        job = self._store.claim_next(time.time())
        if job is None:
            self._gpu.give()
            return
        directory = run_dir_of(self.settings.state_dir, job.id)
        run = Run(job=job, run_dir=directory, reader=RunReader(directory))
        self._run = run
        try:
            self._executor.launch(self._specify(job, directory))
        except OSError as error:
            self._log.error("trainer.not_launched", job=job.id, error=str(error))
            self._finish(run, _not_launched(job, error, self.settings), None)
            return
        self._log.info("job.started", job=job.id, dataset=escape(job.name), attempt=job.attempt)

    def _is_trained(self, job: Job) -> bool:
        """End a job whose content another one has trained since it was queued. Returns whether it ended."""
        try:
            return job.dataset is not None and self._archive.finish_duplicate(job, job.dataset)
        except TransitionRefused:  # a command moved it at this moment
            return True

    def _gpu_in_use(self, recipe: Recipe) -> Hold | None:
        """Choose the GPU and take its lock, or say what to wait for. A machine without one has nothing to wait for."""
        wanted = self.settings.gpu
        try:
            found = () if wanted.device == "none" else self._gpus.fresh()
            device = gpu.choose(found, wanted.device)
        except ConfigError as error:  # it was there when the daemon started
            return Hold(kind=HoldKind.GPU, reason=error.sentence)
        except GpuSilent:
            return Hold(kind=HoldKind.GPU, reason="the GPU's driver does not answer; waits until it does")
        self._device = device.uuid if device else None
        if device is not None:
            hold = gpu.memory_hold(device, recipe, min_free_bytes=wanted.min_free_bytes, own=frozenset({os.getpid()}))
            if hold is not None:
                return hold
            if self.settings.executor.gpu_lock is None and not self._gpu.descriptors:
                self._gpu.path = wanted.lock_dir / f"dropforge-{device.uuid}.lock"
        try:
            why = self._gpu.take(f"the daemon of {self.settings.root}")
        except OSError as error:
            why = f"the GPU lock cannot be opened: {error}"
        return Hold(kind=HoldKind.GPU, reason=why) if why else None

    def request_stop(self, why: StopReason) -> None:
        """Ask the running trainer to seal a checkpoint and leave. A later reason replaces the first, but nothing a
        cancellation."""
        run = self._run
        if run is None:
            return
        if run.promote_at is not None and why is StopReason.STOP:
            self._run = None  # nothing runs: the adapter is finished, and the next daemon promotes it
            return
        if run.asked is None:
            run.asked_at = time.monotonic()
            self._executor.ask(run.run_dir)
            self._log.info("trainer.asked_to_leave", job=run.job.id, reason=why.value)
        if run.asked is not StopReason.CANCEL:
            run.asked = why

    def end_now(self) -> None:
        """End the running trainer at once; what it sealed stays."""
        if self._run is not None:
            self._executor.end(self._run.run_dir)
            self._run.ended = True

    def _is_paused(self) -> bool:
        return self._hold is not None and self._hold.kind is HoldKind.PAUSED

    def _change_hold(self, hold: Hold | None) -> None:
        before, self._hold = self._hold, hold
        if hold is not None and (before is None or before.kind is not hold.kind):
            self._log.warning("queue.held", kind=hold.kind.value, reason=hold.reason)
            self._hooks.fire("on_hold", {"kind": hold.kind.value, "reason": hold.reason})
        elif hold is None and before is not None:
            self._log.info("queue.released", kind=before.kind.value)

    def _specify(self, job: Job, directory: Path) -> RunSpec:
        if job.dataset is None or job.recipe is None:
            raise DropforgeError(
                operation="launch", subject=job.id, cause="the job was queued without dataset or recipe"
            )
        key_file = self.settings.guard.key_file
        return RunSpec(
            schema_version=RUN_SPEC_VERSION,
            job_id=job.id,
            attempt=job.attempt,
            dataset=job.dataset,
            recipe=job.recipe,
            run_dir=str(directory),
            model_dir=str(self.settings.model_dir),
            key_file=str(self.settings.root / key_file) if key_file else None,
            state_dir=str(self.settings.state_dir),
            daemon_pid=os.getpid(),
            # Several processes need a GPU each.
            gpu=self._device if job.recipe.get("training", {}).get("num_processes", 1) == 1 else None,
        )

    def _relay(self, run: Run) -> None:
        """Carry what the trainer told since the last look into the log, and its sealed steps into the store."""
        told, progress = run.reader.events(), run.reader.progress()
        if told or (progress is not None and progress != run.progress):
            run.moved_at = time.monotonic()
        run.progress = progress or run.progress
        for name, facts in told:
            if name == "run.started":  # it may begin below an earlier attempt, whose checkpoints were another run's
                start = int(facts.get("start_step", 0))
                run.job = self._store.update(run.job.id, max_step=start, step_at_launch=start)
            elif name == "checkpoint.sealed":
                run.job = self._store.update(run.job.id, max_step=max(run.job.max_step, int(facts.get("step", 0))))
            self._log.info(name, **{**facts, "job": run.job.id})

    def _conclude(self, run: Run, ended: Exit) -> None:
        result = run.reader.result()
        conclusion = conclude(
            job=run.job,
            result=result,
            ended=ended,
            asked=run.asked,
            progressed=run.job.max_step > run.job.step_at_launch,
            queue=self.settings.queue,
            now=time.time(),
        )
        if run.promote_at is not None and run.asked is StopReason.CANCEL:
            conclusion = Conclusion(to=JobState.CANCELLED, reason=run.asked.value)
        if conclusion.to is JobState.SUCCEEDED and result is not None:
            try:
                version = promote(self.settings, run.job, result, self._log)
            except (DropforgeError, guard.GuardError, OSError) as error:
                self._log.error("version.not_promoted", job=run.job.id, error=str(error))
                # The adapter is finished: only its promotion is tried again, here or by the next daemon.
                run.promote_failures += not is_no_space(error)
                if run.promote_failures < self.settings.queue.max_attempts:
                    run.promote_at = time.monotonic() + self.settings.queue.retry_seconds
                    run.waits = f"the finished adapter cannot be promoted yet: {error}".splitlines()[0]
                    return
                conclusion = Conclusion(
                    to=JobState.FAILED,
                    reason=f"the finished adapter could not be promoted: {error}".splitlines()[0],
                    failure=FailureKind.INTERNAL,
                )
            else:
                self._log.info("version.promoted", job=run.job.id, version=version.name)
                self._finish(run, conclusion, result, version=version.name)
                return
        self._finish(run, conclusion, result)

    def _finish(
        self, run: Run, conclusion: Conclusion, result: RunResult | None, *, version: str | None = None
    ) -> None:
        """End the job, or put it back into the queue."""
        fields: dict[str, Any] = {
            "failure": conclusion.failure,
            "not_before": conclusion.not_before,
            "attempts_without_progress": conclusion.attempts_without_progress,
            "result": result,
        }
        if conclusion.halve_batch and run.job.recipe is not None:
            fields["recipe"] = halved(dict(run.job.recipe))
        if version:
            fields["version"] = version
        self._run = None
        self._gpu.give()
        if conclusion.to is not JobState.QUEUED:
            self._archive.finish(run.job, conclusion.to, conclusion.reason, **fields)
            return
        job = self._store.transition(run.job.id, JobState.RUNNING, JobState.QUEUED, conclusion.reason, **fields)
        if job.cancel_request:  # it was cancelled while the trainer was leaving
            with suppress(TransitionRefused):  # a command cancelled it at this moment
                self._archive.finish(job, JobState.CANCELLED, StopReason.CANCEL.value)


def _not_launched(job: Job, error: OSError, settings: Settings) -> Conclusion:
    """A full disk waits; anything else (no memory for a process, a missing program) is tried again a few times."""
    no_space_left = is_no_space(error)
    attempts_without_progress = job.attempts_without_progress if no_space_left else job.attempts_without_progress + 1
    over = attempts_without_progress >= settings.queue.max_attempts
    return Conclusion(
        to=JobState.FAILED if over else JobState.QUEUED,
        reason=f"the trainer could not be started: {error}",
        failure=FailureKind.NO_SPACE if no_space_left else FailureKind.INTERNAL,
        not_before=time.time() + settings.queue.retry_seconds,
        attempts_without_progress=attempts_without_progress,
    )
