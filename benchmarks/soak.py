"""A week of jobs in fast motion, and a root that is old: does the daemon stay as small and as quick as on its first day?

    python -m benchmarks.soak [--jobs 400] [--finished 10000] [--versions 1000]

The daemon and its store are real, the trainer is the tests' quick one. Good, bad and repeated files come in turn. Memory,
descriptors and threads are the daemon's own, from /proc. Then the same root gets a long history, and what an idle daemon
spends on a tick, the size of its status and the time from drop to start are taken again.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from contextlib import closing
from pathlib import Path

from daemon import versions
from daemon.job import Dataset, Job, JobState
from daemon.notifications import PUBLISHED_KEY
from daemon.store import JobStore
from guard import ModelLock
from tests.support.fake_trainer import write_adapter
from tests.support.root import Root, wait_until

TABLES = {
    "training": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "save_steps": 10},
    "inbox": {"settle_seconds": 0.05, "rescan_seconds": 1.0},
}
TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")


def size_of(pid: int) -> tuple[float, int, int]:
    """MiB resident, descriptors and threads of a process."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]) / 1024, len(os.listdir(f"/proc/{pid}/fd")), int(status["Threads"])


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_A_SECOND


def drop_round(root: Root, number: int) -> None:
    """One of ten files is bad, one has content that was trained before."""
    if number % 10 == 3:
        root.drop(f"{number}.jsonl", b'{"text": "a"}\nno row\n')
    else:
        root.drop(f"{number}.jsonl", [{"text": f"row {number - number % 10 if number % 10 == 7 else number}"}] * 2)


def run_jobs(root: Root, jobs: int) -> None:
    print(f"{'jobs':>6}  {'MiB':>6}  {'fds':>4}  {'threads':>7}  {'seconds':>7}")
    began = time.monotonic()
    for number in range(jobs):
        drop_round(root, number)
        root.finished(f"{number}.jsonl", timeout=300)
        if number + 1 == jobs or (number + 1) % max(1, jobs // 8) == 0 or number == 9:
            memory, descriptors, threads = size_of(root.start_pid)
            print(f"{number + 1:>6}  {memory:>6.1f}  {descriptors:>4}  {threads:>7}  {time.monotonic() - began:>7.0f}")


def grow_old(root: Root, finished: int, made: int) -> None:
    """Write a long history as the daemon would have: rows of the store, and versions one after the other."""
    with closing(JobStore(root.settings.store_path)) as store:
        for number in range(finished):
            name = f"old-{number}.jsonl"
            data = Dataset(name=name, path=name, size_bytes=1, rows=1, digest=f"{number:064x}", format="text")
            store.add(
                Job(
                    id=f"20200101-000000-{number:05x}",
                    name=name,
                    state=JobState.SUCCEEDED,
                    dataset=data,
                    version="0001",
                )
            )
        store.set_control(PUBLISHED_KEY, store.last_transition())  # as it happened
    candidate = root.settings.model_dir / ".staging" / "candidate-soak"
    present = len(versions.list_versions(root.settings.model_dir))
    with ModelLock(root.settings.model_dir, owner="soak"):
        for number in range(present, made):
            candidate.mkdir(parents=True)
            write_adapter(candidate, f"weights {number}")
            began = time.monotonic()
            versions.promote(root.settings.model_dir, candidate, job_id=f"20200101-000000-{number:05x}", record={})
            if number + 1 in (present + 1, made):
                print(f"promoting version {number + 1}: {(time.monotonic() - began) * 1000:.0f} ms")


def measure(root: Root, what: str, seconds: float) -> None:
    """What an idle daemon spends, and how soon it starts."""
    pid = root.start_pid
    before, since = cpu_seconds(pid), time.monotonic()
    time.sleep(seconds)
    share = (cpu_seconds(pid) - before) / (time.monotonic() - since)
    beats = 1 / root.settings.status.status_interval
    began = time.monotonic()
    name = f"last {what}.jsonl"
    root.drop(name, [{"text": what}])
    wait_until(lambda: any(event["dataset"] == name for event in root.events("job.started")))
    start = time.monotonic() - began
    root.finished(name)
    memory, descriptors, threads = size_of(pid)
    size = root.settings.status_path.stat().st_size / 1024
    print(
        f"{what}: {share / beats * 1000:.1f} ms CPU a tick, {start * 1000:.0f} ms from drop to start,"
        f" status {size:.0f} KiB, {memory:.0f} MiB, {descriptors} descriptors, {threads} threads"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=400)
    parser.add_argument("--finished", type=int, default=10_000)
    parser.add_argument("--versions", type=int, default=1_000)
    parser.add_argument("--idle", type=float, default=20.0, help="seconds that an idle daemon is watched for")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Root(Path(folder) / "root", tables=TABLES, behaviour={})
        try:
            root.start()
            run_jobs(root, options.jobs)
            measure(root, "young", options.idle)
            root.stop()
            grow_old(root, options.finished, options.versions)
            began = time.monotonic()
            root.start()
            print(
                f"start on {options.finished:,} finished jobs, {options.versions:,} versions: {time.monotonic() - began:.1f} s"
            )
            measure(root, "old", options.idle)
            root.stop()
        finally:
            root.close()


if __name__ == "__main__":
    main()
