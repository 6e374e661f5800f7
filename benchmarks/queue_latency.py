"""How long the daemon takes: from a dropped file to a started trainer, and from SIGKILL back to work.

    python -m benchmarks.queue_latency [--rounds 10]

The daemon and its store are real; the trainer is the tests' quick one, so that its own start is all that it adds. A drop
is a rename of a whole file, which is taken without settling time. Peers do their own kind of start: huey's consumer polls
for a task with its default delays.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from tests.support.root import Root, wait_until

STEPS = {"training": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "save_steps": 10}}
HUEY = """
import sys, time
from huey import SqliteHuey
queue = SqliteHuey(filename=sys.argv[1], fsync=True)
@queue.task()
def started(path):
    open(path, "w").write(repr(time.time()))
if len(sys.argv) > 2:
    started(sys.argv[2])
else:
    queue.create_consumer(workers=1).run()
"""


def started_at(root: Root, name: str) -> float:
    event = next(event for event in root.events("job.started") if event["dataset"] == name)
    return datetime.fromisoformat(event["timestamp"]).timestamp()


def drop_to_start(root: Root, rounds: int) -> list[float]:
    """Seconds from the rename to the trainer's launch, after a second of idleness each."""
    seconds = []
    for number in range(rounds):
        name = f"round-{number}.jsonl"
        time.sleep(1.0)
        began = time.time()
        root.drop(name, [{"text": f"row {number}"}])
        root.finished(name)
        seconds.append(started_at(root, name) - began)
    return seconds


def recovery(root: Root, rounds: int) -> list[float]:
    """Seconds from SIGKILL of daemon and trainer (restarted at once) until the job runs again."""
    seconds = []
    root.behave({"*": {"step_seconds": 0.02}})
    for number in range(rounds):
        name = f"killed-{number}.jsonl"
        root.drop(name, [{"text": f"row {number} {row}"} for row in range(2000)])
        job = root.running(name, step=10)
        began = time.monotonic()
        root.kill()
        root.start()
        wait_until(lambda name=name: (now := root.job(name)) and now.attempt == 2)  # type: ignore[misc]
        seconds.append(time.monotonic() - began)
        root.run("cancel", job.id)
        root.finished(name)
    return seconds


def huey_start(folder: Path, rounds: int) -> list[float]:
    """Seconds from enqueueing to a running task, after a second of idleness each."""
    script, database = folder / "peer.py", folder / "huey.db"
    script.write_text(HUEY)
    consumer = subprocess.Popen([sys.executable, script, database], stderr=subprocess.DEVNULL)
    seconds = []
    try:
        for number in range(rounds):
            time.sleep(1.0)
            mark = folder / f"mark-{number}"
            done = subprocess.run([sys.executable, script, database, mark], check=True)
            assert done.returncode == 0
            enqueued = time.time()
            wait_until(lambda mark=mark: mark.exists() and mark.read_text())  # type: ignore[misc]
            seconds.append(max(0.0, float(mark.read_text()) - enqueued))
    finally:
        consumer.kill()
        consumer.wait()
    return seconds


def line(name: str, measure: Callable[[], list[float]]) -> None:
    values = sorted(measure())
    print(f"  {name:<44} {statistics.median(values) * 1e3:8.0f} ms  {values[0] * 1e3:8.0f}  {values[-1] * 1e3:8.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Root(Path(name) / "root", STEPS, behaviour={})
        root.start()
        print(f"{options.rounds} rounds                                          median       min       max")
        try:
            line("drop (rename) to started trainer, after idle", lambda: drop_to_start(root, options.rounds))
            line("SIGKILL of the daemon to the job's next attempt", lambda: recovery(root, max(3, options.rounds // 3)))
        finally:
            root.close()
        try:
            import huey  # noqa: F401  only whether it is there
        except ImportError:
            print("  left out: huey is not installed")
        else:
            line("huey: enqueued to running task, after idle", lambda: huey_start(Path(name), options.rounds))


if __name__ == "__main__":
    main()
