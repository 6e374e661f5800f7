"""Control of the queue: pause, resume, cancel, retry, move.

Everything goes through the store, so it works while a daemon runs (which notices within a tick) and while none does.
Each function returns one sentence that says what happened.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime

from daemon.config import Settings
from daemon.errors import DropforgeError, NotFound
from daemon.holds import PAUSED_KEY
from daemon.inbox.archive import Archive, describe_problem, reopen_files
from daemon.job import FINAL_STATES, Job, JobState, Priority, utc_now
from daemon.memory.forgetting import FORGOTTEN_KEY, shared_rows
from daemon.memory.forgetting import forget as forget_memory
from daemon.memory.store import HELD_OUT_NAME, ROWS_NAME, DatasetMemory, Discarded
from daemon.retry import StopReason
from daemon.store import JobStore, TransitionRefused
from daemon.text import escape
from daemon.versions import learned_by


def pause(store: JobStore, *, after_job: bool, reason: str = "") -> str:
    """Hold the queue until `resume`.

    A running job seals a checkpoint first, or with `after_job` comes to its end.
    """
    store.set_control(PAUSED_KEY, {"mode": "after_job" if after_job else "now", "at": utc_now(), "reason": reason})
    running = store.jobs({JobState.RUNNING}, limit=1)
    if not running:
        return "the queue is paused"
    return (
        f"the queue is paused; job {running[0].id} {'goes on to its end' if after_job else 'seals a checkpoint first'}"
    )


def resume(store: JobStore) -> str:
    """Release a paused queue."""
    if store.control(PAUSED_KEY) is None:
        return "the queue was not paused"
    store.set_control(PAUSED_KEY, None)
    return "the queue goes on"


def cancel(settings: Settings, store: JobStore, job: Job, *, hand_back: bool) -> str:
    """Cancel a job that is not finished.

    Its file goes to failed/, or with `hand_back` back to the inbox. Raises DropforgeError when the job is finished
    already.
    """
    archive = Archive(settings, store)
    for _ in range(3):  # the daemon may change its state in between
        job = store.get(job.id)
        if job.state in FINAL_STATES:
            raise DropforgeError(operation="cancel job", subject=job.id, cause=f"it {_is(job.state)} already")
        request = "return" if hand_back else "cancel"
        try:
            if job.state is JobState.RUNNING:
                store.update(job.id, expected=JobState.RUNNING, cancel_request=request)
                return f"job {job.id} is asked to leave; its checkpoints stay until the next run"
            archive.finish(job, JobState.CANCELLED, StopReason.CANCEL.value, cancel_request=request)
        except TransitionRefused:
            continue
        if problem := archive.problem(job.id):
            return f"job {job.id} is cancelled; its file is moved later, by the daemon: {problem}"
        return f"job {job.id} is cancelled" + (", its file is back in the inbox" if hand_back else "")
    raise DropforgeError(operation="cancel job", subject=job.id, cause="it is moving", hint="try again")


def _is(state: JobState) -> str:
    """Return the state of a job as the verb of a sentence."""
    return f"has {state}" if state in (JobState.SUCCEEDED, JobState.FAILED) else f"is {state}"


def retry(settings: Settings, store: JobStore, job: Job) -> str:
    """Put a failed, rejected or cancelled job back into the queue.

    It is validated again, under the settings of now. Raises DropforgeError when it is not finished, has succeeded or
    its file cannot be moved, NotFound when that is gone.
    """
    if job.state is JobState.SUCCEEDED or job.state not in FINAL_STATES:
        raise DropforgeError(
            operation="retry job",
            subject=job.id,
            cause=f"it {_is(job.state)}",
            hint="`dropforge submit --force` trains the same content again"
            if job.state is JobState.SUCCEEDED
            else f"`dropforge show {job.id}` says where it is on its way",
        )
    # The file first: a crash between the two leaves a finished job with its file in processing/, which is repaired.
    try:
        reopen_files(settings, job)
    except OSError as error:
        cause = f"its file cannot be moved: {describe_problem(error)}"
        raise DropforgeError(operation="retry job", subject=job.id, cause=cause) from error
    store.transition(
        job.id,
        job.state,
        JobState.CLAIMED,
        "tried again by a person",
        force=job.force or job.duplicate_of is not None,
        duplicate_of=None,
        failure=None,
        attempts_without_progress=0,
        max_step=0,  # the guard decides whose checkpoints lie there now
        not_before=0.0,
        finished_at=None,
        result=None,
        first_run=None,
        hint="",
        cancel_request="",
    )
    return f"job {job.id} is checked again and then queued"


def forget(settings: Settings, store: JobStore | None, memory: DatasetMemory) -> list[str]:
    """Delete what is kept of a dataset; returns sentences that say what happened, and what the weights still know.

    A running job that may rehearse it is asked to leave, and starts over without it. Raises OSError.
    """
    meta = memory.meta
    rows, apart = (meta.mark(name).rows for name in (ROWS_NAME, HELD_OUT_NAME))
    shared = shared_rows(settings.state_dir, memory)
    drawn = forget_memory(settings.state_dir, memory, Discarded.FORGOTTEN)
    said = [
        f"{escape(meta.name)} ({meta.digest[:12]}) is forgotten: {rows:,} kept and {apart:,} held-out rows are deleted"
    ]
    running = store.jobs({JobState.RUNNING}, limit=1) if store is not None else []
    if store is not None and running:
        store.set_control(FORGOTTEN_KEY, {"at": utc_now(), "digest": meta.digest})
    for job_id in drawn:
        job = _open_job(store, job_id)
        if job is not None:
            said.append(f"job {job.id} rehearsed rows of it, and starts over without them")
    said += [
        f"{count:,} of the same rows are kept of {escape(other.name)} ({other.digest[:12]}), which is not forgotten by that"
        for other, count in shared
    ]
    learned = learned_by(settings.model_dir, meta.digest)
    if not learned:
        return [*said, "no version has learned it"]
    before = f"; `dropforge rollback {int(learned[0]) - 1}` goes back to before it" if int(learned[0]) > 1 else ""
    several = f"versions {learned[0]} to {learned[-1]} have" if len(learned) > 1 else f"version {learned[0]} has"
    return [*said, f"weights do not change by that: {several} learned it{before}"]


def _open_job(store: JobStore | None, job_id: str) -> Job | None:
    try:
        job = store.get(job_id) if store is not None else None
    except NotFound:
        return None
    return None if job is None or job.state in FINAL_STATES else job


def move(store: JobStore, job: Job, *, first: bool, priority: Priority | None) -> str:
    """Change a queued job's priority or place. Raises TransitionRefused when it is not queued."""
    store.reorder(job.id, first=first, priority=priority)
    queue = store.queue()
    ids = [queued.id for queued in queue]
    if job.id not in ids:  # the daemon has launched it since, or another command has cancelled it
        return f"job {job.id} is {store.get(job.id).state}: it left the queue at this moment"
    place = ids.index(job.id) + 1
    begun = queue[0].id if queue[0].max_step and place > 1 else None
    return f"job {job.id} is number {place} in the queue" + (
        f"; job {begun} has begun and goes on first" if begun else ""
    )


def prune(settings: Settings, store: JobStore) -> int:
    """Delete the jobs that ended more than `keep_jobs_days` ago from the store; returns how many."""
    days = settings.queue.keep_jobs_days
    if not days:
        return 0
    before = datetime.fromtimestamp(time.time() - days * 86_400, UTC).isoformat(timespec="milliseconds")
    return store.prune(before.replace("+00:00", "Z"))
