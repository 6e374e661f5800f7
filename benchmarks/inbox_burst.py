"""A burst of renames into the inbox: how many files are seen, taken, lost or doubled, and how fast.

python -m benchmarks.inbox_burst [--files 100000] [--dir FOLDER]
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--dir", type=Path, default=None, help="where the files are put (default: a temporary folder)")
    options = parser.parse_args()
    print(f"A burst of {options.files:,} renames into the inbox")
    print(f"  {'':<36}{'burst s':>9}{'done s':>9}{'files/s':>9}{'seen':>9}{'lost':>7}{'doubled':>9}{'peak MB':>9}")
    arms = [("watchdog", 0), ("watchfiles", 0), ("dropforge", 1000), ("dropforge", 10 * options.files)]
    for kind, max_queued in arms:
        with tempfile.TemporaryDirectory(dir=options.dir) as name:
            print(one(Path(name), kind, options.files, max_queued), flush=True)


def one(root: Path, kind: str, files: int, max_queued: int) -> str:
    """One watcher's line."""
    staged, inbox, out = root / "staged", root / "inbox", root / "seen"
    staged.mkdir()
    inbox.mkdir()
    for number in range(files):
        (staged / f"f{number}.jsonl").write_bytes(b'{"text": "%d"}\n' % number)
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.inbox_watchers", kind, root, out, str(max_queued)], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(1.0)
    began = time.monotonic()
    for number in range(files):
        (staged / f"f{number}.jsonl").rename(inbox / f"f{number}.jsonl")
    burst = time.monotonic() - began
    done = wait_until_quiet(process.pid) - began
    peak = next(line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if "VmHWM" in line)
    process.send_signal(signal.SIGTERM)
    process.wait()
    lines = [line.split() for line in out.read_text().splitlines()]
    facts = {line[1]: int(line[2]) for line in lines if line[0] == "#"}
    if kind == "dropforge":
        left = len([path for path in inbox.iterdir() if path.suffix == ".jsonl"])
        taken = sorted(path.name for path in (inbox / "processing").glob("*/*.jsonl"))
        seen = len(set(taken)) + facts["deferred"]
        doubled = len(taken) - len(set(taken)) + max(0, facts["jobs"] - len(taken))
        lost = files - len(set(taken)) - left + (left - facts["deferred"])
        label = f"dropforge, {len(taken):,} queued, {facts['deferred']:,} deferred"
    else:
        seen = len({line[1] for line in lines if line[0] == "noticed"})
        doubled, lost, label = 0, files - seen, kind
    shutil.rmtree(inbox)
    numbers = f"{burst:>9.1f}{done:>9.1f}{files / done:>9,.0f}{seen:>9,}{lost:>7,}{doubled:>9,}"
    return f"  {label:<36}{numbers}{int(peak.split()[1]) / 1024:>9.0f}"


def wait_until_quiet(pid: int) -> float:
    """When the process (and its children) last used more than a tenth of a core over two seconds."""
    ticks = os.sysconf("SC_CLK_TCK")
    last, quiet_since = cpu_ticks(pid), time.monotonic()
    while time.monotonic() - quiet_since < 6.0:
        time.sleep(0.5)
        used = cpu_ticks(pid)
        if used - last > 0.05 * ticks:
            quiet_since = time.monotonic()
        last = used
    return quiet_since


def cpu_ticks(pid: int) -> int:
    """Of the process, in clock ticks."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


if __name__ == "__main__":
    main()
