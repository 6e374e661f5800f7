"""From the drop of a small file to its notice, its claim and its place in the queue; beside other watchers.

python -m benchmarks.inbox_latency [--drops 500]
"""

from __future__ import annotations

import argparse
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks._table import print_goal
from benchmarks.inbox_watchers import WATCHERS

ROW = '{"messages": [{"role": "user", "content": "question %d"}, {"role": "assistant", "content": "answer"}]}\n'
NOTICE_GOAL_MS, QUEUED_GOAL_MS = 5.0, 50.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drops", type=int, default=500)
    options = parser.parse_args()
    print(f"Drop to notice, milliseconds ({options.drops} drops of about 10 kB each, 20 to 60 ms apart)")
    print(f"  {'':<34}{'seen':>10}{'p50':>10}{'p99':>10}{'max':>10}")
    for how in ("rename", "close"):
        for kind in WATCHERS:
            found = one(kind, how, options.drops)
            for what, values in found.items():
                label = f"{how}: {kind}" + (f", {what}" if kind == "dropforge" else "")
                shown = "".join(f"{value:>10.2f}" for value in spread(values))
                print(f"  {label:<34}{f'{len(values)}/{options.drops}':>10}{shown}")
            if kind == "dropforge":
                if how == "rename":
                    print_goal("notice by rename, p50 ms", value=spread(found["noticed"])[0], at_most=NOTICE_GOAL_MS)
                print_goal(f"queued by {how}, p99 ms", value=spread(found["queued"])[1], at_most=QUEUED_GOAL_MS)


def one(kind: str, how: str, drops: int) -> dict[str, list[float]]:
    """Milliseconds from each drop, by what was seen."""
    with tempfile.TemporaryDirectory() as folder:
        root, out = Path(folder), Path(folder, "seen")
        (root / "inbox").mkdir()
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.inbox_watchers", kind, root, out], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(1.0)
        sent = {}
        generator = random.Random(1)
        for number in range(drops):
            time.sleep(generator.uniform(0.02, 0.06))
            data = "".join(ROW % (number * 100 + row) for row in range(100))
            target = root / "inbox" / f"f{number}.jsonl"
            if how == "rename":
                staged = root / "staged"
                staged.write_text(data)
                at = time.monotonic_ns()
                staged.rename(target)
            else:
                with target.open("w") as writer:
                    writer.write(data)
                    writer.flush()
                    at = time.monotonic_ns()
            sent[target.name] = at
        time.sleep(3.0)
        process.send_signal(signal.SIGTERM)
        process.wait()
        result: dict[str, list[float]] = {}
        for line in out.read_text().splitlines():
            if not line.startswith("#"):
                what, name, at_text = line.split()
                if name in sent:
                    # By close, a watcher may see the file as soon as it is created.
                    result.setdefault(what, []).append((int(at_text) - sent[name]) / 1e6)
        return result


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, 99th percentile, maximum."""
    ordered = sorted(values)
    return statistics.median(ordered), ordered[max(0, int(len(ordered) * 0.99) - 1)], ordered[-1]


if __name__ == "__main__":
    main()
