"""The scheduler: one job at a time, from the queue to a promoted version, across every way in which a run can end.

`poll_control`, `poll_run` and `dispatch` are called at each tick, in this order; each returns promptly. Nothing is kept that
the store and the run directory do not hold: `recover` finds its way from there after any crash.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

import guard
from daemon import root_identity, second_run, version_pruning, versions
from daemon.base_identity import find_base
from daemon.config import Settings
from daemon.errors import ConfigError, DropforgeError, NotFound, is_no_space
from daemon.evaluation.gate import held_reason, with_action
from daemon.executors.base import Executor, Exit
from daemon.gpu import GpuReservation
from daemon.holds import (
    FOR_A_PERSON,
    PAUSED_KEY,
    Evidence,
    Hold,
    HoldKind,
    contradicted,
    evidence,
    no_space,
    paused,
    program_evidence,
    refused_program,
    unusable_base,
    unusable_trainer,
    unwritable,
)
from daemon.in_hand import InHand
from daemon.inbox.archive import Archive
from daemon.job import (
    FINAL_STATES,
    RUN_SPEC_VERSION,
    FailureKind,
    FirstRun,
    Job,
    JobState,
    Outcome,
    Progress,
    RunResult,
    RunSpec,
)
from daemon.memory.forgetting import FORGOTTEN_KEY, forgotten
from daemon.notifications import Hooks
from daemon.recipe import Recipe
from daemon.retry import (
    BASE_FAILURES,
    HOLDING_FAILURES,
    UNCOUNTED_STOPS,
    RetryDecision,
    StopReason,
    decide,
    decide_not_launched,
)
from daemon.run_dir import RunEvent, RunReader, discard_earlier, run_dir_of, sealed_step, step_in
from daemon.run_window import RunWindow
from daemon.setting_names import explain
from daemon.store import JobStore, TransitionRefused
from daemon.text import escape

TRY_AGAIN_SECONDS = 300.0  # after the Hub did not give a base model, or a trainer could not be executed
REAP_SECONDS = 5.0  # a trainer that was killed is gone long before


@dataclass
class Run:
    """The attempt in progress. Handles stay with the executor; this remembers what was requested and read so far."""

    job: Job
    run_dir: Path
    reader: RunReader
    stop: StopReason | None = None  # why the trainer was asked to leave
    stop_requested_at: float = 0.0  # monotonic
    killed: bool = False  # it was asked, did not leave, and was killed
    ended: Exit | None = None  # how the trainer left; kept while what follows cannot be recorded
    unrelayed: deque[RunEvent] = field(default_factory=deque)  # events that were read, and not recorded yet
    progress: Progress | None = None
    launched_at: float = field(default_factory=time.monotonic)
    progressed_at: float = field(default_factory=time.monotonic)  # when anything was reported last
    promote_at: float | None = None  # monotonic; when a promotion that failed is tried again
    promote_failures: int = 0
    evidence: Evidence = ()  # by what it is decided whether the current version can be continued, or the trainer executed
    waiting_for: str = ""  # what its promotion waits for, as a sentence


class Scheduler:
    """Launches, polls and finishes runs."""

    def __init__(
        self,
        settings: Settings,
        store: JobStore,
        executor: Executor,
        *,
        archive: Archive,
        hooks: Hooks,
        gpu: GpuReservation,
        window: RunWindow,
        in_hand: InHand,
        log: Any,
    ) -> None:
        self.settings = settings
        self.run: Run | None = None  # the attempt in progress
        self.hold: Hold | None = None  # why nothing is launched although a job may be ready
        self.suspended = False  # nothing can be recorded now
        self._store = store
        self._executor = executor
        self._archive = archive
        self._hooks = hooks
        self._gpu = gpu
        self._window = window
        self._in_hand = in_hand
        self._log = log
        self._seen_version = -1
        self._judged: Evidence | None = None  # by what a trainer refused the base, or to continue the current version
        self._judged_at = 0.0  # monotonic

    def recover(self) -> None:
        """Take up what an earlier daemon left running: adopt a living trainer and ask it to leave, finish a dead one."""
        for left in self._store.jobs({JobState.RUNNING}):
            with self._in_hand.handling("taken up again", job=left.id):
                self._recover_run(left)
            if self.run is not None:
                return  # poll_run finishes it; at most one job is ever running

    def _recover_run(self, left: Job) -> None:
        directory = run_dir_of(self.settings.state_dir, left.id)
        # What it sealed while no daemon listened counts as progress all the same.
        job = self._store.update(left.id, max_step=max(left.max_step, sealed_step(directory)))
        run = Run(job=job, run_dir=directory, reader=RunReader(directory))
        cancelled = StopReason.CANCEL if job.cancel_request else None
        self.run = run
        if self._executor.owns(run.run_dir):  # the parts of the daemon were made anew around it
            return
        if self._executor.adopt(run.run_dir):
            self._log.warning("trainer.adopted", job=job.id, attempt=job.attempt)
            self.request_stop(cancelled or StopReason.DAEMON_LOST)
            return
        discard_earlier(run.run_dir, job.attempt)
        result = run.reader.result()
        interrupted = result is not None and result.outcome is Outcome.INTERRUPTED
        run.stop = cancelled or (StopReason.DAEMON_LOST if interrupted else None)
        run.ended = Exit()
        self._end_attempt(run, run.ended)

    def poll_control(self) -> bool:
        """Take what was requested through the store; True when another process has written to it."""
        version = self._store.data_version()
        if version == self._seen_version:
            return False
        self._seen_version = version
        control = self._store.control(PAUSED_KEY)
        self._change_hold(paused(control) or (None if self._is_paused() else self.hold))
        run = self.run
        if run is not None:
            run.job = self._store.get(run.job.id)
            forgotten = self._store.control(FORGOTTEN_KEY)
            if run.job.cancel_request and run.stop is not StopReason.CANCEL:
                self.request_stop(StopReason.CANCEL)
            elif control and control.get("mode") == "now" and run.stop is None:
                self.request_stop(StopReason.PAUSE)
            elif forgotten and forgotten["at"] >= (run.job.started_at or "") and run.stop is None:
                self.request_stop(StopReason.FORGOTTEN)
        return True

    def poll_run(self) -> None:
        """Relay what the trainer reported, end the attempt when it has left, kill it when it does not leave."""
        if self.run is not None:
            with self._in_hand.handling("followed", job=self.run.job.id):
                self._poll(self.run)

    def _poll(self, run: Run) -> None:
        if run.promote_at is not None:
            if time.monotonic() >= run.promote_at or run.stop is StopReason.CANCEL:
                self._end_attempt(run, run.ended or Exit(code=0))
            return
        self._relay(run)
        run.ended = run.ended or self._executor.poll(run.run_dir)
        if run.ended is not None:
            self._relay(run)
            self._end_attempt(run, run.ended)
        else:
            self._enforce_limits(run)

    def dispatch(self) -> None:
        """Launch the next job when none is running and nothing holds the queue."""
        if self.run is not None or self._is_paused():
            return
        ready = self._store.peek(time.time())
        if ready is None:
            self._gpu.release()
            self._change_hold(None)
            return
        contradiction = contradicted(self.settings)
        with self._in_hand.handling("prepared", job=ready.id):
            if contradiction is None and (self._finish_promoted(ready) or self._finish_duplicate(ready)):
                return
            hold = contradiction or self._hold_for(ready)
            fault = self._own_fault(ready, hold) if hold is not None else ""
            self._change_hold(None if fault else hold)
        if self.hold is not None:
            return
        job = self._store.claim_next(time.time())
        if job is None:
            self._gpu.release()
            return
        with self._in_hand.handling("launched", job=job.id):
            if fault:
                # A command may have given another the first place at this moment: its turn is the next tick's.
                self._give_back(job, fault if job.id == ready.id else "")
            else:
                self._launch(job)

    def request_stop(self, why: StopReason) -> None:
        """Ask the running trainer to seal a checkpoint and leave.

        A later reason replaces the first, but nothing replaces a cancellation.
        """
        run = self.run
        if run is None:
            return
        if run.promote_at is not None and why is StopReason.STOP:
            self.run = None  # nothing runs: the adapter is finished, and the next daemon promotes it
            return
        if run.stop is None:
            run.stop_requested_at = time.monotonic()
            self._executor.request_stop(run.run_dir)
            self._log.info("trainer.asked_to_leave", job=run.job.id, reason=why.value)
        if run.stop is not StopReason.CANCEL:
            run.stop = why

    def quarantine(self, job_id: str, reason: str) -> None:
        """Fail a job that this program itself cannot handle, with its trainer, wherever it is on its way.

        Raises what ending it raises.
        """
        try:
            job = self._store.get(job_id)
        except NotFound:
            return
        self.end_trainer(job)
        if job.state not in FINAL_STATES:
            self._archive.finish(job, JobState.FAILED, reason, failure=FailureKind.INTERNAL)
            self._log.error("job.quarantined", job=job_id, reason=reason)

    def end_trainer(self, job: Job) -> None:
        """Kill the trainer of a job at once, also one that an earlier daemon started, and wait for its end."""
        directory = run_dir_of(self.settings.state_dir, job.id)
        is_ours = self.run is not None and self.run.job.id == job.id
        if not is_ours and not (job.state is JobState.RUNNING and self._executor.adopt(directory)):
            return
        self._executor.kill(directory)
        deadline = time.monotonic() + REAP_SECONDS
        while self._executor.poll(directory) is None and time.monotonic() < deadline:
            time.sleep(0.01)
        if is_ours:
            self.run = None
            self._gpu.release()

    def kill(self) -> None:
        """Kill the running trainer at once; what it sealed stays."""
        if self.run is not None:
            self._executor.kill(self.run.run_dir)
            self.run.killed = True

    def next_start_seconds(self) -> float | None:
        """Return the seconds until a queued job's back-off ends, None when nothing waits for that."""
        due = self._store.next_due(time.time())
        return None if due is None else max(0.0, due - time.time())

    def hold_contradicted(self) -> None:
        """Hold the queue while the parts of the root do not belong together, whether or not a job is ready."""
        if not self._is_paused():
            self._change_hold(contradicted(self.settings))

    # -- launching

    def _finish_duplicate(self, job: Job) -> bool:
        """End a job whose content another one has trained since it was queued. Returns whether it ended."""
        try:
            data = _recipe_of(job).data
            return job.dataset is not None and self._archive.finish_duplicate(job, job.dataset, data)
        except ConfigError:  # its job fails at the launch
            return False
        except TransitionRefused:  # a command moved it at this moment
            return True

    def _finish_promoted(self, job: Job) -> bool:
        """End a job that waits for its second run when a person made the first one's version current. Returns whether."""
        if job.first_run is None or not second_run.was_promoted(self.settings, job):
            return False
        version, result = job.first_run.version, job.first_run.result
        with suppress(TransitionRefused):  # a command moved it at this moment
            reason = f"{result.steps_run} of {result.steps_planned} steps; a person made version {version} current"
            self._archive.finish(job, JobState.SUCCEEDED, reason, result=result, version=version)
        return True

    def _hold_for(self, job: Job) -> Hold | None:
        """What has to be waited for before this job is launched; reserves the GPU."""
        try:
            recipe = self._recipe_of(job)
        except ConfigError:  # nothing to wait for: its job fails at the launch
            return None
        return (
            self._still_refused(job, recipe)
            or unusable_trainer(self.settings)
            or unusable_base(self.settings, recipe)
            or unwritable(self.settings, job.id)
            or no_space(self.settings, recipe)
            or self._window.hold(self.settings)
            or self._gpu.reserve(self.settings, recipe)
        )

    def _still_refused(self, job: Job, recipe: Recipe) -> Hold | None:
        """The hold of a job whose last trainer could not be executed, or refused its base or parent.

        It ends when what that was judged by is another.
        """
        if job.failure not in HOLDING_FAILURES:
            return None
        is_trainer = job.failure is FailureKind.TRAINER
        if self._judged != (program_evidence(self.settings) if is_trainer else evidence(self.settings, recipe)):
            return None
        if job.failure is FailureKind.IDENTITY:
            return Hold(kind=HoldKind.IDENTITY, reason=job.reason)
        if not is_trainer and find_base(recipe.model) is not None:
            return Hold(kind=HoldKind.BASE, reason=job.reason)
        if time.monotonic() - self._judged_at >= TRY_AGAIN_SECONDS:  # the Hub may be reached by now
            return None
        return Hold(
            kind=HoldKind.TRAINER if is_trainer else HoldKind.BASE,
            reason=f"{job.reason}; it is tried again every {TRY_AGAIN_SECONDS / 60:.0f} minutes",
        )

    def _recipe_of(self, job: Job) -> Recipe:
        """The recipe of a job's next attempt. Raises ConfigError.

        It was frozen when the job was queued; one that was refused for its base or parent, or whose base cannot be used, takes
        [model] and start_from from the settings of now, since they are the ways out that its hold names.
        """
        frozen, now = _recipe_of(job), self.settings.recipe
        if job.failure not in BASE_FAILURES and unusable_base(self.settings, frozen) is None:
            return frozen
        start_from = job.overrides.get("training", {}).get("start_from", now.training.start_from)
        training = frozen.training.model_copy(update={"start_from": start_from})
        return frozen.model_copy(update={"model": now.model, "training": training})

    def _own_fault(self, job: Job, hold: Hold) -> str:
        """Say that a job's own settings, and not the root's, are why it does not fit; empty when they are not.

        What one job asks for never holds the others.
        """
        if hold.kind is not HoldKind.NO_SPACE or not job.overrides or no_space(self.settings, self.settings.recipe):
            return ""
        return f"its sidecar asks for more than there is room for: {hold.reason.removesuffix('; waits for free space')}"

    def _give_back(self, job: Job, fault: str) -> None:
        """End a job that was not launched for its own fault, or without one put it back into the queue."""
        run_dir = run_dir_of(self.settings.state_dir, job.id)
        decision = RetryDecision(to=JobState.FAILED, reason=fault, failure=FailureKind.CONFIG)
        if not fault:
            decision = RetryDecision(to=JobState.QUEUED, reason="waits for its turn")
        self._finish(Run(job=job, run_dir=run_dir, reader=RunReader(run_dir)), decision, None)

    def _launch(self, job: Job) -> None:
        directory = run_dir_of(self.settings.state_dir, job.id)
        self.run = run = Run(job=job, run_dir=directory, reader=RunReader(directory))
        try:
            recipe = self._recipe_of(job)
            if recipe != _recipe_of(job):
                run.job = job = self._store.update(job.id, recipe=recipe.model_dump(mode="json"))
                self._log.info(
                    "job.renewed",
                    job=job.id,
                    base_model=recipe.model.model_name_or_path,
                    start_from=recipe.training.start_from,
                )
            run.evidence = evidence(self.settings, recipe)
            self._executor.launch(self._spec_of(job, recipe, directory))
        except ConfigError as error:
            self._log.error("trainer.not_launched", job=job.id, error=str(error))
            reason = f"{error.sentence}; {error.hint}"
            self._finish(run, RetryDecision(to=JobState.FAILED, reason=reason, failure=FailureKind.CONFIG), None)
            return
        except OSError as error:
            self._log.error("trainer.not_launched", job=job.id, error=str(error))
            run.evidence = program_evidence(self.settings)
            decision = decide_not_launched(
                job=job,
                cause=str(error),
                refused=refused_program(self.settings, error),
                no_space=is_no_space(error),
                queue=self.settings.queue,
                now=time.time(),
            )
            self._finish(run, decision, None)
            return
        self._log.info("job.started", job=job.id, dataset=escape(job.name), attempt=job.attempt)

    def _spec_of(self, job: Job, recipe: Recipe, directory: Path) -> RunSpec:
        if job.dataset is None or job.recipe is None:
            raise ConfigError(
                operation="launch", subject=job.id, cause="it was queued without a dataset", hint=_retry_hint(job)
            )
        key_file = self.settings.guard.key_file
        several = recipe.training.num_processes > 1  # they need a GPU each
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
            root=str(self.settings.root),
            daemon_pid=os.getpid(),
            gpu=self._gpu.device.uuid if self._gpu.device is not None and not several else None,
            limits=self.settings.limits.model_dump(mode="json"),
            evals_dir=str(self.settings.evals_dir),
            evaluation=self.settings.evaluation.model_dump(mode="json"),
            gate=self.settings.gate.model_dump(mode="json"),
            root_recipe=self.settings.recipe.model_dump(mode="json", include={"data", "replay"}),
            overrides=job.overrides,
            force=job.force,
        )

    # -- while it runs

    def _relay(self, run: Run) -> None:
        """Carry what the trainer reported since the last look into the log, and its sealed steps into the store."""
        events, progress = run.reader.events(), run.reader.progress()
        if events or (progress is not None and progress != run.progress):
            run.progressed_at = time.monotonic()
        run.progress = progress or run.progress
        run.unrelayed.extend(events)
        while run.unrelayed:
            name, data = run.unrelayed[0]
            if name == "run.started":  # it may begin below an earlier attempt, whose checkpoints were another run's
                start = step_in(data, "start_step")
                run.job = self._store.update(run.job.id, max_step=start, step_at_launch=start)
            elif name == "checkpoint.sealed":
                run.job = self._store.update(run.job.id, max_step=max(run.job.max_step, step_in(data, "step")))
            run.unrelayed.popleft()
            self._log.info(name, **{**data, "job": run.job.id})

    def _enforce_limits(self, run: Run) -> None:
        """Ask a trainer that takes too long to leave, and kill one that was asked and has not left."""
        now, queue = time.monotonic(), self.settings.queue
        if run.stop is None and self.suspended:
            return  # what it could not report is no sign of a stall
        if run.stop is None:
            if queue.job_timeout and now - run.launched_at > queue.job_timeout:
                self.request_stop(StopReason.TIMEOUT)
            elif queue.stall_timeout and now - run.progressed_at > queue.stall_timeout:
                self.request_stop(StopReason.STALL)
            elif (why := self._window.stop(self.settings)) is not None:
                self.request_stop(why)
        elif not run.killed and now - run.stop_requested_at > queue.stop_timeout:
            waited = round(now - run.stop_requested_at, 1)
            self._log.warning("trainer.ended", job=run.job.id, waited_seconds=waited)
            self.kill()

    # -- when it has ended

    def _end_attempt(self, run: Run, ended: Exit) -> None:
        """Decide what follows and do it: promote, queue again, or finish."""
        result = run.reader.result()
        if run.promote_at is not None and run.stop is StopReason.CANCEL:
            self._finish(run, RetryDecision(to=JobState.CANCELLED, reason=run.stop.value), result)
            return
        decision = self._decide(run, ended, result)
        if decision.to is JobState.SUCCEEDED and result is not None:
            decision = self._unless_forgotten(run, decision, result)
        if decision.to is JobState.SUCCEEDED and result is not None:
            self._promote(run, decision, result, ended)
        else:
            self._finish(run, decision, result)

    def _decide(self, run: Run, ended: Exit, result: RunResult | None) -> RetryDecision:
        return decide(
            job=run.job,
            result=result,
            ended=ended,
            stop=run.stop,
            phase=run.progress.phase if run.progress else "",
            progressed=run.job.max_step > run.job.step_at_launch,
            queue=self.settings.queue,
            now=time.time(),
        )

    def _unless_forgotten(self, run: Run, decision: RetryDecision, result: RunResult) -> RetryDecision:
        """Have a finished run start over when rows that it rehearsed were forgotten meanwhile.

        Not one whose adapter is a version already: a crash came before its job was told.
        """
        names = forgotten(self.settings.state_dir, result.replayed)
        if not names or not Path(result.candidate or "").is_dir():
            return decision
        reason = f"{', '.join(map(escape, names))} was forgotten while the run rehearsed it; it starts over without it"
        return RetryDecision(
            to=JobState.QUEUED, reason=reason, attempts_without_progress=run.job.attempts_without_progress
        )

    def _promote(self, run: Run, decision: RetryDecision, result: RunResult, ended: Exit) -> None:
        """Make the finished adapter the current version; when that fails, only this is tried again.

        The training goes on from its last checkpoint where the adapter itself is lost.
        """
        result, first = with_action(result, self.settings.gate), run.job.first_run
        recipe = second_run.recipe_of_second(run.job, result, self.settings.gate)
        if recipe is not None:
            result = second_run.held_for_now(result)
        try:
            if first is not None and second_run.first_stays(self.settings, first, result):
                second_run.give_up(self.settings, result, first.version)
                self._take_first(run, first, "a second run with twice the share of earlier rows was no better")
                return
            version = versions.promote_result(self.settings, run.job, result, self._log)
            if first is not None:
                second_run.drop(self.settings, first.version)
        except (DropforgeError, guard.GuardError, OSError) as error:
            self._log.error("version.not_promoted", job=run.job.id, error=str(error))
            is_held = is_no_space(error) or bool(contradicted(self.settings))
            if isinstance(error, versions.CandidateLost) and not is_held:
                message = f"the finished adapter is lost: {error.sentence}"
                lost = replace(
                    result, outcome=Outcome.FAILED, failure=FailureKind.LOST, message=message, candidate=None
                )
                self._finish(run, self._decide(run, ended, lost), lost)
                return
            run.promote_failures += not is_held
            if run.promote_failures < self.settings.queue.max_attempts:
                run.promote_at = time.monotonic() + self.settings.queue.retry_seconds
                run.waiting_for = f"the finished adapter cannot be promoted yet: {error}".splitlines()[0]
                return
            reason = f"the finished adapter could not be promoted: {error}".splitlines()[0]
            self._finish(run, RetryDecision(to=JobState.FAILED, reason=reason, failure=FailureKind.INTERNAL), result)
            return
        if recipe is not None and version.record.get("held"):
            self._run_again(run, result, recipe, version.name)
            return
        version_pruning.apply_policy(self.settings, self._log)
        with suppress(OSError):  # the job's row tells it as well
            root_identity.remember_version(self.settings, version.name)
        if version.record.get("held"):  # also where a crash came in between, and the settings are others now
            self._log.warning("version.held", job=run.job.id, version=version.name, reasons=version.record["held"])
            decision = replace(decision, reason=held_reason(result))
        else:
            self._log.info("version.promoted", job=run.job.id, version=version.name)
        if first is not None:
            decision = replace(decision, reason=second_run.told(result, first.version, decision.reason))
        self._finish(run, decision, result, version=version.name)

    def _run_again(self, run: Run, result: RunResult, recipe: Mapping[str, Any], version: str) -> None:
        """Put a job back into the queue whose version is held, for one more run with twice the share of earlier rows."""
        reasons = result.evaluation.reasons if result.evaluation else ()
        share = recipe["replay"]["share"]
        self._log.warning("job.second_run", job=run.job.id, version=version, share=share, reasons=reasons)
        decision = RetryDecision(
            to=JobState.QUEUED, reason=second_run.reason_of_second(result, recipe, version), recipe=recipe
        )
        self._finish(run, decision, result, first_run=FirstRun(version=version, result=result))

    def _take_first(self, run: Run, first: FirstRun, why: str) -> None:
        """End a job with what its first run made: the second one was no better, or failed."""
        result = first.result
        try:
            result = second_run.take(self.settings, result, first.version)
        except (DropforgeError, guard.GuardError, OSError) as error:  # it stays held: a person decides
            self._log.error("version.not_promoted", job=run.job.id, error=str(error))
        reason = second_run.reason_of_first(result, why)
        self._archive.finish(run.job, JobState.SUCCEEDED, reason, result=result, version=first.version, failure=None)
        self._leave(run)

    def _finish(
        self,
        run: Run,
        decision: RetryDecision,
        result: RunResult | None,
        *,
        version: str | None = None,
        first_run: FirstRun | None = None,
    ) -> None:
        """End the job, or put it back into the queue; with `first_run` for the second of its runs."""
        first = run.job.first_run
        if decision.to is JobState.FAILED and first is not None and second_run.is_there(self.settings, first.version):
            why = f"the second run, with twice the share of earlier rows, failed: {decision.reason}"
            self._take_first(run, first, why)
            return
        fields: dict[str, Any] = {
            "failure": decision.failure,
            "not_before": decision.not_before,
            "attempts_without_progress": decision.attempts_without_progress,
            "result": result,
        }
        if decision.recipe is not None:
            fields["recipe"] = decision.recipe
        if first_run is not None:
            fields["first_run"] = first_run
        elif decision.to is JobState.QUEUED and _is_uncounted(run, decision):
            fields["attempt"] = run.job.attempt - 1
        if version:
            fields["version"] = version
        if decision.to is not JobState.QUEUED:
            self._archive.finish(run.job, decision.to, decision.reason, **fields)
            self._leave(run)
            return
        if decision.failure in HOLDING_FAILURES:
            self._judged, self._judged_at = run.evidence, time.monotonic()
        job = self._store.transition(run.job.id, JobState.RUNNING, JobState.QUEUED, decision.reason, **fields)
        self._leave(run)
        if job.cancel_request:  # it was cancelled while the trainer was leaving
            with suppress(TransitionRefused):  # a command cancelled it at this moment
                self._archive.finish(job, JobState.CANCELLED, StopReason.CANCEL.value)

    def _leave(self, run: Run) -> None:
        """Make room for the next run, once the end of this one is recorded."""
        if self.run is run:
            self.run = None
        self._gpu.release()

    # -- holds

    def suspend(self, hold: Hold) -> None:
        """Hold the queue because nothing can be recorded now; a running trainer goes on, and no limit of time counts."""
        if not self._is_paused():
            self._change_hold(hold)
        self.suspended = True

    def unsuspend(self) -> None:
        """Go on after `suspend`: what a trainer could not report meanwhile is no sign of a stall."""
        if not self.suspended:
            return
        self.suspended = False
        if self.run is not None:
            self.run.progressed_at = time.monotonic()
        if not self._is_paused():
            self._change_hold(None)

    def _is_paused(self) -> bool:
        return self.hold is not None and self.hold.kind is HoldKind.PAUSED

    def _change_hold(self, hold: Hold | None) -> None:
        before, self.hold = self.hold, hold
        is_new = before is None or hold is None or before.kind is not hold.kind
        if hold is not None and (is_new or (hold.kind in FOR_A_PERSON and before != hold)):
            self._log.warning("queue.held", kind=hold.kind.value, reason=hold.reason)
            self._hooks.fire("on_hold", {"kind": hold.kind.value, "reason": hold.reason})
        elif hold is None and before is not None:
            self._log.info("queue.released", kind=before.kind.value)


def _recipe_of(job: Job) -> Recipe:
    """The recipe that was frozen when the job was queued. Raises ConfigError when this version cannot read it."""
    try:
        return Recipe.model_validate(job.recipe)
    except ValidationError as error:
        cause = explain(error, Recipe)
        raise ConfigError(operation="use the recipe of", subject=job.id, cause=cause, hint=_retry_hint(job)) from error


def _is_uncounted(run: Run, decision: RetryDecision) -> bool:
    """Whether this was no attempt of the job's: it was interrupted on purpose, or what is wrong concerns every job."""
    asked = decision.failure is None and run.stop in UNCOUNTED_STOPS
    return asked or decision.failure in HOLDING_FAILURES


def _retry_hint(job: Job) -> str:
    return f"`dropforge retry {job.id}` makes it anew from the settings of now"
