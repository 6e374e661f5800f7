"""The job store beside other durable queues on the same disk, and beside itself with a long history.

    python -m benchmarks.queue_store [--jobs 300] [--history 1000000] [--folder DIR]

Every arm writes to SQLite. `job store` and `huey (fsync)` wait for the disk at each commit; `huey` as it comes and
`persist-queue` do not, and may lose what they accepted when the machine goes down. A huey task and a persist-queue item
are one row each; ours is a job with its event, checked against the transition table.
"""

from __future__ import annotations

import argparse
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks._table import Arm, measure, print_goal, print_table
from daemon.config import Recipe
from daemon.job import Dataset, Job, JobState, to_json
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


def ours(folder: Path, jobs: int) -> Callable[[], None]:
    def run() -> None:
        path = folder / f"ours-{time.monotonic_ns()}.sqlite3"
        store = JobStore(path)
        for number in range(jobs):
            accept(store, number)
        for _ in range(jobs):
            finish(store)
        store.close()

    return run


def huey(folder: Path, jobs: int, *, fsync: bool) -> Callable[[], None]:
    from huey import SqliteHuey

    def run() -> None:
        queue = SqliteHuey(filename=str(folder / f"huey-{time.monotonic_ns()}.db"), fsync=fsync)

        @queue.task()
        def nothing(number: int) -> int:
            return number

        for number in range(jobs):
            nothing(number)
        for _ in range(jobs):
            task = queue.dequeue()
            assert task is not None
            queue.execute(task)

    return run


def persistqueue(folder: Path, jobs: int) -> Callable[[], None]:
    from persistqueue import SQLiteAckQueue

    def run() -> None:
        queue = SQLiteAckQueue(str(folder / f"persist-{time.monotonic_ns()}"), auto_commit=True)
        for number in range(jobs):
            queue.put({"number": number})
        for _ in range(jobs):
            queue.ack(queue.get(block=False))

    return run


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
        arms = [Arm(name="job store", run=ours(folder, options.jobs))]
        try:
            arms += [
                Arm(name="huey (fsync)", run=huey(folder, options.jobs, fsync=True)),
                Arm(name="huey", run=huey(folder, options.jobs, fsync=False)),
                Arm(name="persist-queue", run=persistqueue(folder, options.jobs)),
            ]
        except ImportError as error:
            print(f"left out: {error.name} is not installed (pip install huey persist-queue)")
        seconds = measure(arms, rounds=options.rounds)
        print_table(
            f"accept and finish {options.jobs} jobs", seconds, relative_to=["huey (fsync)"] if len(arms) > 1 else []
        )
        for arm, values in seconds.items():
            print(f"  {arm:<14} {options.jobs / statistics.median(values):8.0f} jobs/s through the whole queue")

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
