"""Notifications: what the log and the hooks are given when a job, or an attempt at one, has ended.

A job is ended by the scheduler, by the check of its rows, or by a person whose command has no log of its own. All of them
move it through the store; what is published is read from there, so that every end is published, whoever brought it about,
also one that came while no daemon ran. A crash between publishing and remembering publishes it again, never less than once.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from daemon.config import HookSettings
from daemon.errors import NotFound
from daemon.in_hand import InHand
from daemon.job import FINAL_STATES, OPEN_STATES, Job, JobState, JobTransition, seconds_between, to_json
from daemon.left_alone import LeftAlone
from daemon.notice_sender import NoticeSender
from daemon.observability.status import finished_job
from daemon.store import JobStore
from daemon.text import escape

PUBLISHED_KEY = "told"  # the number of the last transition that was published
REASON_CHARACTERS = 2000
MOST_TRANSITIONS = 500  # that are looked at in a tick: a queue of thousands may be cancelled at once
# Event and level of a transition, by the state that it leads to.
_EVENTS: Mapping[JobState, tuple[str, str]] = {
    JobState.SUCCEEDED: ("job.succeeded", "info"),
    JobState.FAILED: ("job.failed", "error"),
    JobState.CANCELLED: ("job.cancelled", "info"),
    JobState.REJECTED: ("job.rejected", "warning"),
}
_REQUEUED = ("job.requeued", "info")
MAX_RUNNING = 4  # hooks at once
MAX_PENDING = 100  # that wait
COALESCED = ("on_hold", "on_queue_empty")  # of which the newest says everything
CLOSING_PAUSE_SECONDS = 0.02
RESULT_FIELDS_IN_JOB = ("outcome", "failure", "message", "candidate")  # or gone by now


class Notifier:
    """Publishes the transitions that end a job or an attempt, and runs the hooks. One thread calls everything."""

    def __init__(
        self,
        store: JobStore,
        *,
        hooks: HookSettings,
        notices: NoticeSender,
        in_hand: InHand,
        left_alone: LeftAlone,
        log: Any,
    ) -> None:
        self.hooks = Hooks(hooks, log)
        self.notices = notices
        self._store = store
        self._in_hand = in_hand
        self._left_alone = left_alone
        self._log = log
        published = store.control(PUBLISHED_KEY)
        if published is None:  # a new store, or one of an older version, whose history was published as it happened
            published = store.last_transition()
            store.set_control(PUBLISHED_KEY, published)
        self._published = int(published)

    def publish(self) -> bool:
        """Log what ended since the last call, in the order in which it did, start its hooks, collect those that ended.

        Returns whether there is more than was published now.
        """
        is_more = self._publish_transitions()
        self.hooks.collect()
        self.notices.poll()
        return is_more

    def close(self) -> None:
        """Publish what a tick may, and end the hooks; the next start goes on from there."""
        self._publish_transitions()
        self.hooks.close()
        self.notices.close()

    def _publish_transitions(self) -> bool:
        any_published, last = False, None
        transitions = self._store.transitions_after(self._published, most=MOST_TRANSITIONS)
        for number, transition in transitions:
            is_final = transition.new in FINAL_STATES
            if not is_final and (transition.old, transition.new) != (JobState.RUNNING, JobState.QUEUED):
                self._published = number
                continue
            try:
                job = self._store.get(transition.job_id)
            except NotFound:  # forgotten since, by `keep_jobs_days`
                self._published = number
                continue
            self._published = number
            any_published = True
            if self._left_alone.has(job.id, job.updated_at):
                continue
            with self._in_hand.handling("published", job=job.id):
                name, level = _EVENTS[JobState(transition.new)] if is_final else _REQUEUED
                getattr(self._log, level)(name, **canonical(job, transition))
                if is_final:
                    self.notices.tell(transition.new, f"{transition.new}: {job.name}: {transition.reason}")
                    last = finished_job(job)
                    self.hooks.fire("on_job_finished", {"job": last})
                    if (lost := lost_by(job)) is not None:
                        self.hooks.fire("on_gate", {"job": last, "evaluation": lost})
                        self.notices.tell("held", f"version {job.version} of {job.name} lost what was learned before")
        if last is not None and not any(self._store.counts()[state] for state in OPEN_STATES):
            self.hooks.fire("on_queue_empty", {"job": last})
        if any_published:
            self._store.set_control(PUBLISHED_KEY, self._published)
        return len(transitions) == MOST_TRANSITIONS


def lost_by(job: Job) -> dict[str, Any] | None:
    """What the hook is given of a version that did not pass the gate; None of any other job."""
    evaluation = job.result.evaluation if job.result is not None else None
    if job.state is not JobState.SUCCEEDED or evaluation is None or evaluation.passes:
        return None
    return {
        "version": job.version,
        "action": evaluation.action,
        "verdict": evaluation.verdict,
        "reasons": [escape(reason, most=REASON_CHARACTERS) for reason in evaluation.reasons],
    }


def canonical(job: Job, transition: JobTransition) -> dict[str, Any]:
    """Everything about the end of a job or of one attempt, for one line of the log; what is not known is left out."""
    dataset, result = job.dataset, job.result
    line: dict[str, Any] = {
        "job": job.id,
        "dataset": escape(job.name),
        "was": transition.old,
        "reason": escape(transition.reason, most=REASON_CHARACTERS),
        "failure": job.failure,
        "attempt": job.attempt,
        "version": job.version,
        "duplicate_of": job.duplicate_of,
        "priority": job.priority,
        "owner": job.owner,
        "force": job.force or None,
        "overrides": dict(job.overrides) or None,
        "base_model": job.recipe["model"]["model_name_or_path"] if job.recipe else None,
        "size_bytes": job.size_bytes,
    }
    if dataset is not None:
        line |= {
            "digest": dataset.digest,
            "format": dataset.format,
            "dataset_rows": dataset.rows,
            "skipped_rows": dataset.skipped_rows,
        }
    if result is not None:
        line |= {name: value for name, value in asdict(result).items() if name not in RESULT_FIELDS_IN_JOB}
    line["hint"] = escape(job.advice, most=REASON_CHARACTERS)
    line |= {
        "max_step": job.max_step if job.attempt else None,
        "created_at": job.created_at,
        "started_at": job.started_at,
        "total_seconds": None if (total := seconds_between(job.created_at, transition.at)) is None else round(total, 3),
    }
    return {name: value for name, value in line.items() if value is not None and value != ""}


@dataclass
class _Running:
    name: str
    process: subprocess.Popen[bytes]
    deadline: float  # monotonic


@dataclass(frozen=True, kw_only=True)
class _Pending:
    """A hook that waits for its turn."""

    name: str
    facts: Mapping[str, Any]
    fired_at: float  # monotonic


class Hooks:
    """Commands of the administrator's own, run when something happened, with the facts as JSON on stdin.

    They come from dropforge.toml alone; nothing in a dropped file or its sidecar reaches their command line. A hook never
    delays a job: a few run beside, with a time limit, the others wait in order, and a failure is a line in the log. Of
    `on_hold` and `on_queue_empty` only the newest waits; of `on_job_finished` as many as MAX_PENDING, then the oldest is
    left out, which the log and the next one's facts tell. One thread calls everything.
    """

    def __init__(self, settings: HookSettings, log: Any) -> None:
        self.settings = settings
        self._log = log
        self._running: list[_Running] = []
        self._pending: deque[_Pending] = deque()
        self._left_out = 0  # since the last start

    def fire(self, name: str, facts: Mapping[str, Any]) -> None:
        """Start the hook called `name`, if one is configured, once the earlier ones have left a place."""
        if not getattr(self.settings, name):
            return
        if name in COALESCED:
            self._pending = deque(hook for hook in self._pending if hook.name != name)
        if len(self._pending) >= MAX_PENDING:
            oldest = self._pending.popleft()
            self._left_out += 1
            self._log.warning("hook.left_out", hook=oldest.name, waiting=len(self._pending))
        self._pending.append(_Pending(name=name, facts=facts, fired_at=time.monotonic()))
        self._start_next()

    def collect(self) -> None:
        """Reap hooks that ended, kill those over their time, and start those that waited for them."""
        for hook in list(self._running):
            code = hook.process.poll()
            if code is None and time.monotonic() < hook.deadline:
                continue
            self._running.remove(hook)
            if code is None:
                _kill(hook.process)
                self._log.error("hook.failed", hook=hook.name, error=f"ended after {self.settings.timeout:g} s")
            elif code:
                self._log.error("hook.failed", hook=hook.name, error=f"exit code {code}")
        self._start_next()

    def _start_next(self) -> None:
        while self._pending and len(self._running) < MAX_RUNNING:
            self._start(self._pending.popleft())

    def _start(self, hook: _Pending) -> None:
        command: Sequence[str] = getattr(self.settings, hook.name)
        if not command:  # taken out of the settings while it waited
            return
        told = {
            "hook": hook.name,
            **hook.facts,
            "age_seconds": round(time.monotonic() - hook.fired_at, 3),
            "left_out": self._left_out,
        }
        stdin = os.memfd_create("dropforge-hook")
        try:
            os.write(stdin, to_json(told).encode("ascii"))
            os.lseek(stdin, 0, os.SEEK_SET)
            process = subprocess.Popen(
                list(command),
                stdin=stdin,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            self._log.error("hook.failed", hook=hook.name, error=str(error))
            return
        finally:
            os.close(stdin)
        self._left_out = 0
        self._running.append(
            _Running(name=hook.name, process=process, deadline=time.monotonic() + self.settings.timeout)
        )

    def close(self, patience: float = 2.0) -> None:
        """Wait at most `patience` seconds for running hooks, then kill them; those that wait are told in the log."""
        deadline = time.monotonic() + patience
        while self._pending and time.monotonic() < deadline:
            self.collect()
            time.sleep(CLOSING_PAUSE_SECONDS)
        if self._pending:
            self._log.warning("hook.left_out", hook=self._pending[0].name, waiting=len(self._pending))
            self._pending.clear()
        for hook in self._running:
            try:
                hook.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                _kill(hook.process)
        self._running.clear()


def _kill(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # it ended meanwhile
    process.wait()
