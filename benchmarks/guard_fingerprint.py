"""Fingerprint of a large file with a warm cache, beside b3sum, hashlib and cat.

python -m benchmarks.guard_fingerprint [--size-mb 2048] [--rounds 5] [--dir FOLDER]
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path

import guard
from benchmarks._table import Arm, measure, print_goal, print_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-mb", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path, help="where to put it (default: a temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        path = Path(folder, "rows.jsonl")
        write_random(path, options.size_mb * 1024 * 1024)
        arms = [
            Arm(name="guard", run=lambda: guard.fingerprint_dataset(path)),
            Arm(name="guard, in process", run=lambda: guard.digest_file(path, map_above_bytes=1 << 60)),
            Arm(name="hashlib sha256", run=lambda: hash_file(path, "sha256")),
            Arm(name="hashlib md5", run=lambda: hash_file(path, "md5")),
            Arm(name="cat", run=lambda: subprocess.run(["cat", path], stdout=subprocess.DEVNULL, check=True)),
        ]
        if shutil.which("b3sum"):
            b3sum = ["b3sum", "--no-names", path]
            arms.insert(1, Arm(name="b3sum", run=lambda: subprocess.run(b3sum, capture_output=True, check=True)))
        seconds = measure(arms, rounds=options.rounds)
        relative = [name for name in ("b3sum", "hashlib sha256", "cat") if name in seconds]
        title = f"Fingerprint of {options.size_mb:,} MiB, warm cache"
        print_table(title, seconds, relative_to=relative, size_bytes=path.stat().st_size)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        if "b3sum" in medians:
            print_goal("speed of b3sum", value=medians["b3sum"] / medians["guard"], at_least=0.9)
        print_goal("speed of sha256", value=medians["hashlib sha256"] / medians["guard"], at_least=6)


def write_random(path: Path, size_bytes: int) -> None:
    """Different blocks that no file system can fold together, without a second per GB for random numbers."""
    block = bytearray(os.urandom(16 * 1024 * 1024))
    with path.open("wb") as file:
        for number in range(0, size_bytes, len(block)):
            block[:8] = number.to_bytes(8, "little")
            file.write(memoryview(block)[: size_bytes - number])
        file.flush()
        os.fsync(file.fileno())


def hash_file(path: Path, name: str) -> str:
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, name).hexdigest()


if __name__ == "__main__":
    main()
