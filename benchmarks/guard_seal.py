"""Sealing and verifying a large checkpoint, beside `cp` and `sync` of the same files.

python -m benchmarks.guard_seal [--size-mb 2048] [--rounds 3] [--dir FOLDER]
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
from pathlib import Path

import guard
from benchmarks._table import Arm, measure, print_table
from benchmarks.guard_fingerprint import write_random


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-mb", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, help="where to put it (default: a temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        root = Path(name)
        source = make_checkpoint(root / "source", options.size_mb)
        run = guard.Fingerprint({"dataset.digest": "a" * 64})
        fresh, copied, sealed = root / "checkpoint-10", root / "copy", root / "sealed"
        shutil.copytree(source, sealed)
        guard.seal_checkpoint(sealed, step=10, fingerprint=run)

        def unsynced_copy() -> None:
            """As the Trainer leaves a checkpoint: written, and for the most part still in memory."""
            shutil.rmtree(fresh, ignore_errors=True)
            subprocess.run(["sync"], check=True)
            subprocess.run(["cp", "-r", source, fresh], check=True)

        def remove_copy() -> None:
            shutil.rmtree(copied, ignore_errors=True)
            subprocess.run(["sync"], check=True)

        def copy_and_sync() -> None:
            subprocess.run(["cp", "-r", source, copied], check=True)
            subprocess.run(["sync", *copied.iterdir()], check=True)

        def sync_only() -> None:
            subprocess.run(["sync", *fresh.iterdir()], check=True)

        arms = [
            Arm(name="cp + sync", run=copy_and_sync, before=remove_copy),
            Arm(name="sync alone", run=sync_only, before=unsynced_copy),
            Arm(
                name="seal",
                run=lambda: guard.seal_checkpoint(fresh, step=10, fingerprint=run),
                before=unsynced_copy,
            ),
            Arm(name="verify, digests", run=lambda: guard.verify_checkpoint(sealed)),
            Arm(name="verify, structure", run=lambda: guard.verify_checkpoint(sealed, digests=False)),
        ]
        seconds = measure(arms, rounds=options.rounds)
        title = f"Checkpoint of {options.size_mb:,} MiB"
        size_bytes = sum(path.stat().st_size for path in source.iterdir())
        print_table(title, seconds, relative_to=["cp + sync", "sync alone"], size_bytes=size_bytes)


def make_checkpoint(folder: Path, size_mb: int) -> Path:
    """Sizes as in a checkpoint of LoRA: the optimizer's two moments are twice the weights."""
    folder.mkdir()
    write_random(folder / "adapter_model.safetensors", size_mb * 1024 * 1024 // 3)
    write_random(folder / "optimizer.pt", 2 * size_mb * 1024 * 1024 // 3)
    (folder / "scheduler.pt").write_bytes(bytes(1000))
    (folder / "rng_state.pth").write_bytes(bytes(14_000))
    (folder / "adapter_config.json").write_text("{}")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 10}))
    return folder


if __name__ == "__main__":
    main()
