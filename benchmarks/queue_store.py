"""The job store beside other durable queues on the same disk, and beside itself with a long history.

    python -m benchmarks.queue_store [--jobs 300] [--history 1000000] [--folder DIR]

Every arm writes to SQLite. All wait for the disk at each commit (fsync) but `huey` as it comes, which may lose what it
accepted when the machine goes down. A huey task and a persist-queue item are one row each; ours is a job with its
events, checked against the transition table: two commits to accept it, two to claim and end it.
"""

from __future__ import annotations

import argparse
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks._table import Arm, measure, print_goal, print_table
from daemon.job import Dataset, Job, JobState, to_json
from daemon.recipe import Recipe
from daemon.store import JobStore

RECIPE = Recipe().model_dump(mode="json")


def accept(store: JobStore, number: int) -> None:
    """What a dropped file costs the store: a row, then its dataset and the move to queued."""
    job_id = f"20260101-{number:012}"
    dataset = Dataset(name="x.jsonl", path="/x", size_bytes=1, rows=1, digest=f"{number:064x}", format="text")
    store.add(Job(id=job_id, name="x.jsonl", state=JobState.CLAIMED))
    store.transition(job_id, JobState.CLAIMED, JobState.QUEUED, "checked", dataset=dataset, recipe=RECIPE)


def finish(store: JobStore) -> None:
    """Claim the next job and end it."""
    job = store.claim_next(time.time())
    assert job is not None
    store.transition(job.id, JobState.RUNNING, JobState.SUCCEEDED, "done", version="0001")


@dataclass
class Queue:
    """One queue under measurement: what accepts a job, and what claims the next and ends it."""

    name: str
    fresh: Callable[[], None]
    accept: Callable[[int], object]
    finish: Callable[[], object]


def ours(folder: Path) -> Queue:
    stores: list[JobStore] = []
    return Queue(
        name="job store",
        fresh=lambda: stores.append(JobStore(folder / f"ours-{time.monotonic_ns()}.sqlite3")),
        accept=lambda number: accept(stores[-1], number),
        finish=lambda: finish(stores[-1]),
    )


def huey(folder: Path, name: str, *, fsync: bool) -> Queue:
    from huey import SqliteHuey

    queues: list[tuple[Any, Any]] = []

    def fresh() -> None:
        queue = SqliteHuey(filename=str(folder / f"huey-{time.monotonic_ns()}.db"), fsync=fsync)

        @queue.task()
        def nothing(number: int) -> int:
            return number

        queues.append((queue, nothing))

    def finish_one() -> None:
        task = queues[-1][0].dequeue()
        assert task is not None
        queues[-1][0].execute(task)

    def accept_one(number: int) -> None:
        queues[-1][1](number)

    return Queue(name=name, fresh=fresh, accept=accept_one, finish=finish_one)


def persistqueue(folder: Path) -> Queue:
    from persistqueue import SQLiteAckQueue

    queues: list[Any] = []
    return Queue(
        name="persist-queue",
        fresh=lambda: queues.append(SQLiteAckQueue(str(folder / f"persist-{time.monotonic_ns()}"), auto_commit=True)),
        accept=lambda number: queues[-1].put({"number": number}),
        finish=lambda: queues[-1].ack(queues[-1].get(block=False)),
    )


def measure_queues(queues: Sequence[Queue], jobs: int, rounds: int) -> None:
    """Two tables: how fast jobs are accepted, and how fast they are claimed and ended."""

    def accept_all(queue: Queue) -> None:
        for number in range(jobs):
            queue.accept(number)

    def finish_all(queue: Queue) -> None:
        for _ in range(jobs):
            queue.finish()

    def filled(queue: Queue) -> None:
        queue.fresh()
        accept_all(queue)

    peers = [queue.name for queue in queues[1:]]
    for title, arms in (
        (
            f"accept and queue {jobs} jobs",
            [Arm(name=q.name, before=q.fresh, run=partial(accept_all, q)) for q in queues],
        ),
        (
            f"claim and end {jobs} jobs",
            [Arm(name=q.name, before=partial(filled, q), run=partial(finish_all, q)) for q in queues],
        ),
    ):
        seconds = measure(arms, rounds=rounds)
        print_table(title, seconds, relative_to=peers)
        for name, values in seconds.items():
            print(f"  {name:<14} {jobs / statistics.median(values):8.0f} jobs/s")
        print(f"  that is {2 * jobs / statistics.median(seconds[queues[0].name]):.0f} transitions/s of the job store")


def fill(path: Path, history: int) -> None:
    """A store with a history: the same rows that the store itself would have left, written in one go."""
    JobStore(path).close()
    job = Job(
        id="", name="x.jsonl", state=JobState.SUCCEEDED, version="0001", recipe=RECIPE,
        dataset=Dataset(name="x.jsonl", path="/x", size_bytes=1, rows=1, digest="", format="text"),
        created_at="2026-01-01T00:00:00.000Z", updated_at="2026-01-01T00:00:00.000Z",
    )  # fmt: skip
    body = to_json(job)
    with sqlite3.connect(path) as db:
        db.executemany(
            "INSERT INTO jobs (id, state, priority, not_before, digest, source_inode, body)"
            " VALUES (?, 'succeeded', 1, 0, ?, ?, ?)",
            (
                (f"2026-{n:012}", f"{n:064x}", n, body.replace('"id": ""', f'"id": "2026-{n:012}"'))
                for n in range(history)
            ),
        )
        db.executemany(
            "INSERT INTO events (job_id, at, old, new, reason) VALUES (?, '2026-01-01', 'running', 'succeeded', '\"\"')",
            ((f"2026-{n:012}",) for n in range(history)),
        )
        db.execute("INSERT OR REPLACE INTO counts VALUES ('succeeded', ?)", (history,))
    db.close()


def percentile(call: Callable[[], object], times: int = 300) -> tuple[float, float]:
    """Median and 99th percentile of one call, in seconds."""
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds), sorted(seconds)[int(times * 0.99) - 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=300)
    parser.add_argument("--history", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: a temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        queues = [ours(folder)]
        try:
            queues += [
                huey(folder, "huey (fsync)", fsync=True),
                huey(folder, "huey", fsync=False),
                persistqueue(folder),
            ]
        except ImportError as error:
            print(f"left out: {error.name} is not installed (pip install huey persist-queue)")
        measure_queues(queues, options.jobs, options.rounds)

        print(f"\nwith a history (median / 99th percentile of {300} calls)")
        medians = {}
        for history in (0, options.history):
            path = folder / f"history-{history}.sqlite3"
            began = time.perf_counter()
            fill(path, history)
            store = JobStore(path)
            print(
                f"  {history:,} finished jobs, {path.stat().st_size / 1e6:,.0f} MB, written in {time.perf_counter() - began:.0f} s"
            )
            for number in range(400):
                accept(store, number)
            calls: dict[str, Callable[[], object]] = {
                "claim_next": lambda store=store: store.claim_next(time.time()),  # type: ignore[misc]
                "counts (status)": store.counts,
                "recent 20 (status)": lambda store=store: store.recent(20),  # type: ignore[misc]
                "50 newest (jobs)": lambda store=store: store.jobs(limit=50, newest=True),  # type: ignore[misc]
                "duplicate look-up": lambda store=store: store.with_digest("f" * 64, {JobState.SUCCEEDED}),  # type: ignore[misc]
                "transition": lambda store=store: finish_running(store),  # type: ignore[misc]
            }
            for what, call in calls.items():
                median, worst = percentile(call)
                medians[what, history] = median
                print(f"    {what:<20} {median * 1e3:8.3f} ms  {worst * 1e3:8.3f} ms")
            store.close()
        for what in ("claim_next", "counts (status)"):
            ratio = medians[what, options.history] / medians[what, 0]
            print_goal(f"{what}: median with the history against without", value=ratio, at_most=1.5)


def finish_running(store: JobStore) -> None:
    """One move: the oldest running job ends."""
    job = store.jobs({JobState.RUNNING}, limit=1)[0]
    store.transition(job.id, JobState.RUNNING, JobState.SUCCEEDED, "done")


if __name__ == "__main__":
    main()
