"""The scheduler: one job at a time, from the queue to a promoted version, across every way in which a run can end.

It keeps nothing that the store and the run directory do not hold: `recover` finds its way from there after any crash.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import guard
from daemon import versions
from daemon.config import Settings
from daemon.errors import DropforgeError
from daemon.executors.base import Executor, Exit
from daemon.gpulock import GpuLock
from daemon.job import (
    RUN_SPEC_VERSION,
    FailureKind,
    Job,
    JobState,
    Progress,
    RunResult,
    RunSpec,
    from_json,
    run_dir,
)
from daemon.retry import Conclusion, conclude
from daemon.store import JobStore
from daemon.text import escape


@dataclass
class Run:
    """The attempt in progress. Handles stay with the executor; this remembers what was asked and read so far."""

    job: Job
    run_dir: Path
    events_read: int = 0  # bytes of events.jsonl that are in our log already
    asked_at: float | None = None  # monotonic; when the trainer was asked to leave
    ended: bool = False  # it was asked, did not leave, and was ended
    progress: Progress | None = None


class Scheduler:
    """Launches, watches and concludes runs. Every method returns promptly; nothing here waits for a trainer."""

    def __init__(
        self, settings: Settings, store: JobStore, executor: Executor, *, settle: Any, log: Any, gpu: GpuLock
    ) -> None:
        self._settings = settings
        self._store = store
        self._executor = executor
        self._settle = settle  # (job) -> None: moves the file of a job in a final state
        self._log = log
        self._gpu = gpu
        self.held = ""  # why nothing is launched although a job may be ready
        self._run: Run | None = None

    @property
    def run(self) -> Run | None:
        """The attempt in progress."""
        return self._run

    @property
    def next_start(self) -> float | None:
        """Seconds until a queued job's back-off ends, None when nothing waits for that."""
        waiting = [job.not_before for job in self._store.queue() if job.not_before > time.time()]
        return min(waiting) - time.time() if waiting else None

    def recover(self) -> None:
        """Take up what an earlier daemon left running: adopt a living trainer (and ask it to leave), conclude a dead one."""
        for job in self._store.jobs({JobState.RUNNING}):
            run = Run(job=job, run_dir=run_dir(self._settings.state_dir, job.id))
            run.events_read = _size(run.run_dir / "events.jsonl")
            self._run = run
            if self._executor.adopt(run.run_dir):
                self._log.warning("trainer.adopted", job=job.id, attempt=job.attempt)
                self.ask_to_leave()
                return  # reap concludes it; at most one job is ever running
            self._conclude(run, Exit())

    def reap(self) -> None:
        """Carry the trainer's news into the log, conclude it when it has ended, end it when it does not leave."""
        run = self._run
        if run is None:
            return
        self._relay(run)
        ended = self._executor.poll(run.run_dir)
        if ended is not None:
            self._relay(run)
            self._conclude(run, ended)
        elif run.asked_at is not None and not run.ended:
            waited = time.monotonic() - run.asked_at
            if waited > self._settings.queue.stop_timeout:
                self._log.warning("trainer.ended", job=run.job.id, waited_seconds=round(waited, 1))
                self._executor.end(run.run_dir)
                run.ended = True

    def dispatch(self) -> None:
        """Launch the next job when none is running."""
        if self._run is not None:
            return
        held = self._take_gpu() if self._store.queue(limit=1) else ""
        if held != self.held:
            self.held = held
            self._log.info("queue.held" if held else "queue.released", reason=held or "the GPU is free")
        if held:
            return
        job = self._store.claim_next(time.time())
        if job is None:
            self._gpu.give()
            return
        directory = run_dir(self._settings.state_dir, job.id)
        run = Run(job=job, run_dir=directory, events_read=_size(directory / "events.jsonl"))
        self._run = run
        try:
            self._executor.launch(self._specify(job, directory))
        except OSError as error:
            self._log.error("trainer.not_launched", job=job.id, error=str(error))
            self._finish(run, _not_launched(job, error), None)
            return
        self._log.info("job.started", job=job.id, dataset=escape(job.name), attempt=job.attempt)

    def _take_gpu(self) -> str:
        """Why the machine's GPU is not ours for now; empty when it is."""
        try:
            return self._gpu.take(f"the daemon of {self._settings.root}")
        except OSError as error:
            return f"the GPU lock cannot be opened: {error}"

    def ask_to_leave(self) -> None:
        """Ask the running trainer to seal a checkpoint and leave; a second call ends it at once."""
        run = self._run
        if run is None:
            return
        if run.asked_at is None:
            run.asked_at = time.monotonic()
            self._executor.ask(run.run_dir)
        else:
            self._executor.end(run.run_dir)
            run.ended = True

    def _specify(self, job: Job, directory: Path) -> RunSpec:
        if job.dataset is None or job.recipe is None:
            raise DropforgeError(
                operation="launch", subject=job.id, cause="the job was queued without dataset or recipe"
            )
        key_file = self._settings.guard.key_file
        return RunSpec(
            schema_version=RUN_SPEC_VERSION,
            job_id=job.id,
            attempt=job.attempt,
            dataset=job.dataset,
            recipe=job.recipe,
            run_dir=str(directory),
            model_dir=str(self._settings.model_dir),
            key_file=str(self._settings.root / key_file) if key_file else None,
            state_dir=str(self._settings.state_dir),
            daemon_pid=os.getpid(),
        )

    def _relay(self, run: Run) -> None:
        """Whole lines only: the trainer may be in the middle of one."""
        run.progress = _read(run.run_dir / "progress.json", Progress) or run.progress
        try:
            with (run.run_dir / "events.jsonl").open("rb") as events:
                events.seek(run.events_read)
                text = events.read()
        except FileNotFoundError:
            return
        whole = text[: text.rfind(b"\n") + 1]
        run.events_read += len(whole)
        for line in whole.splitlines():
            try:
                event = json.loads(line)
                name = str(event.pop("event"))
            except (ValueError, KeyError, AttributeError):
                continue  # torn by a crash of the trainer; its result says what happened
            event.pop("at", None)
            if name == "run.started":  # it may begin below an earlier attempt, whose checkpoints were another run's
                start = int(event.get("start_step", 0))
                run.job = self._store.update(run.job.id, max_step=start, step_at_launch=start)
            elif name == "checkpoint.sealed":
                run.job = self._store.update(run.job.id, max_step=max(run.job.max_step, int(event.get("step", 0))))
            self._log.info(name, job=run.job.id, **{key: value for key, value in event.items() if key != "job"})

    def _conclude(self, run: Run, ended: Exit) -> None:
        result = _read(run.run_dir / "result.json", RunResult)
        conclusion = conclude(
            job=run.job,
            result=result,
            ended=ended,
            asked=run.asked_at is not None,
            progressed=run.job.max_step > run.job.step_at_launch,
            queue=self._settings.queue,
            now=time.time(),
        )
        if conclusion.to is JobState.SUCCEEDED and result is not None:
            try:
                version = self._promote(run.job, result)
            except (DropforgeError, guard.GuardError, OSError) as error:
                self._log.error("version.not_promoted", job=run.job.id, error=str(error))
                conclusion = _not_promoted(run.job, error, self._settings)
            else:
                self._log.info("version.promoted", job=run.job.id, version=version.name)
                self._finish(run, conclusion, result, version=version.name)
                return
        self._finish(run, conclusion, result)

    def _promote(self, job: Job, result: RunResult) -> versions.Version:
        """Candidate to current version, idempotent: a crash in between is repaired by the next call."""
        model_dir = self._settings.model_dir
        record: Mapping[str, Any] = {
            "dataset": job.dataset.name if job.dataset else job.name,
            "dataset_digest": job.dataset.digest if job.dataset else None,
            "rows": result.rows,
            "steps": result.steps_run,
            "held_out_before": result.held_out_before,
            "held_out_after": result.held_out_after,
            "train_loss": result.train_loss,
            "adapter_digest": result.adapter_digest,
        }
        with guard.ModelLock(model_dir, owner="promotion"):
            version = versions.promote(model_dir, Path(result.candidate or ""), job_id=job.id, record=record)
            guard.mark_finished(model_dir, version.name)
        return version

    def _finish(
        self, run: Run, conclusion: Conclusion, result: RunResult | None, *, version: str | None = None
    ) -> None:
        """Move the job, tell it in one line that has everything, then move its file."""
        fields: dict[str, Any] = {
            "failure": conclusion.failure,
            "not_before": conclusion.not_before,
            "fruitless": conclusion.fruitless,
            "result": result,
        }
        if version:
            fields["version"] = version
        job = self._store.transition(run.job.id, JobState.RUNNING, conclusion.to, conclusion.reason, **fields)
        self._run = None
        self._gpu.give()
        name = {JobState.QUEUED: "job.requeued", JobState.SUCCEEDED: "job.succeeded"}.get(
            conclusion.to, f"job.{conclusion.to}"
        )
        tell = self._log.info if conclusion.to in (JobState.SUCCEEDED, JobState.QUEUED) else self._log.error
        tell(name, **canonical(job, result))
        if conclusion.to is not JobState.QUEUED:
            self._settle(job)


def canonical(job: Job, result: RunResult | None) -> dict[str, Any]:
    """Everything about a job's end, for one line of the log."""
    line: dict[str, Any] = {
        "job": job.id,
        "dataset": escape(job.name),
        "digest": job.dataset.digest if job.dataset else None,
        "attempt": job.attempt,
        "reason": job.reason,
        "failure": job.failure,
        "version": job.version,
    }
    if result is not None:
        kept = (
            "verdict", "cleared", "resumed_from", "start_step", "steps_run", "steps_planned", "rows", "held_out_rows",
            "dropped_rows", "train_loss", "held_out_before", "held_out_after", "tokens_per_second", "wall_seconds",
            "warnings",
        )  # fmt: skip
        line |= {name: getattr(result, name) for name in kept}
    return {name: value for name, value in line.items() if value is not None}


def _not_launched(job: Job, error: OSError) -> Conclusion:
    return Conclusion(
        to=JobState.FAILED,
        reason=f"the trainer could not be started: {error}",
        failure=FailureKind.INTERNAL,
        fruitless=job.fruitless,
    )


def _not_promoted(job: Job, error: Exception, settings: Settings) -> Conclusion:
    """The checkpoints of the run are intact: the next attempt loads the last one and only saves again."""
    no_space = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    fruitless = job.fruitless + 1
    over = fruitless >= settings.queue.max_attempts
    return Conclusion(
        to=JobState.FAILED if over else JobState.QUEUED,
        reason=f"the finished adapter could not be promoted: {error}".splitlines()[0],
        failure=FailureKind.NO_SPACE if no_space else FailureKind.INTERNAL,
        not_before=time.time() + settings.queue.retry_seconds,
        fruitless=fruitless,
    )


def _read(path: Path, kind: Any) -> Any:
    """A value that the trainer wrote, None when it is missing or torn."""
    try:
        return from_json(path.read_bytes(), kind)
    except (OSError, ValueError):
        return None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
