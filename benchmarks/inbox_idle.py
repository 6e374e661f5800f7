"""What watching costs when nothing happens: an empty inbox, and one with 10,000 files that wait for the queue.

python -m benchmarks.inbox_idle [--seconds 60] [--files 10000]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks._table import print_goal

CPU_GOAL_PERCENT, MEMORY_GOAL_MB = 0.1, 64.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--files", type=int, default=10_000)
    options = parser.parse_args()
    print(f"Idle for {options.seconds:g} s")
    print(f"  {'':<40}{'CPU ms':>10}{'% of a core':>13}{'resident MB':>13}{'shared once':>13}")
    for kind, files in (("dropforge", 0), ("dropforge", options.files), ("watchdog", 0), ("poller", options.files)):
        with tempfile.TemporaryDirectory() as name:
            root = Path(name)
            (root / "inbox").mkdir()
            for number in range(files):
                (root / "inbox" / f"f{number}.jsonl").write_text(f'{{"text": "{number}"}}\n')
            # One place in the queue, so that all other files stay where they are.
            arguments = [sys.executable, "-m", "benchmarks.inbox_watchers", kind, root, root / "seen", "1"]
            with subprocess.Popen(arguments, stdout=subprocess.PIPE) as process:
                assert process.stdout is not None
                process.stdout.readline()
                time.sleep(15.0)  # files settle, listings are confirmed
                before = cpu_nanoseconds(process.pid)
                time.sleep(options.seconds)
                used = (cpu_nanoseconds(process.pid) - before) / 1e9
                own, all_mb = memory_mb(process.pid, "Rss"), family(process.pid, "Rss")
                unique = family(process.pid, "Pss")
                process.kill()
        label = f"{kind}, {files:,} files" + (f" (alone {own:.0f} MB)" if kind == "dropforge" else "")
        percent = 100 * used / options.seconds
        print(f"  {label:<40}{used * 1e3:>10.1f}{percent:>13.3f}{all_mb:>13.1f}{unique:>13.1f}", flush=True)
        if kind == "dropforge":
            print_goal("percent of a core", value=percent, at_most=CPU_GOAL_PERCENT)
            print_goal("MB of the daemon and its child, shared pages once", value=unique, at_most=MEMORY_GOAL_MB)


def members(pid: int) -> list[int]:
    """The process and its children."""
    text = "".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children"))
    return [pid, *(int(child) for child in text.split())]


def cpu_nanoseconds(pid: int) -> int:
    """Of all threads of the process and its children, as the scheduler counts."""
    paths = [path for member in members(pid) for path in Path(f"/proc/{member}/task").glob("*/schedstat")]
    return sum(int(path.read_text().split()[0]) for path in paths)


def family(pid: int, field: str) -> float:
    """Sum over the process and its children, in MB."""
    return sum(memory_mb(member, field) for member in members(pid))


def memory_mb(pid: int, field: str) -> float:
    """`Rss` or `Pss` of one process, in MB."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) / 1024


if __name__ == "__main__":
    main()
