"""The decision before a run, in a model directory with many checkpoints, digests excluded.

python -m benchmarks.guard_decide [--checkpoints 1000] [--rounds 20] [--dir FOLDER]
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import struct
import tempfile
import tracemalloc
import zipfile
from pathlib import Path

import guard
from benchmarks._table import Arm, measure, print_goal, print_table

GOAL_MS = 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--dir", type=Path, default=None, help="where to put them (default: a temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        root = Path(name)
        dataset = root / "rows.jsonl"
        dataset.write_text('{"text": "one"}\n')
        ours, other = fingerprint("a"), fingerprint("b")
        many, few = root / "many", root / "few"
        fill(many, options.checkpoints, ours, dataset)
        fill(few, 10, ours, dataset)
        torn = root / "torn"
        shutil.copytree(many, torn)
        for _, path in guard.list_checkpoints(torn)[0][-5:]:
            (path / "optimizer.pt").unlink()
        arms = [
            Arm(name="resume", run=lambda: decide(many, ours)),
            Arm(name="resume, newest five torn", run=lambda: decide(torn, ours)),
            Arm(name="stale", run=lambda: decide(many, other)),
            Arm(name="resume, 10 checkpoints", run=lambda: decide(few, ours)),
            Arm(name="verify all, structure", run=lambda: guard.scan_checkpoints(many)),
        ]
        seconds = measure(arms, rounds=options.rounds)
        print_table(f"Decision with {options.checkpoints:,} checkpoints", seconds, relative_to=["resume"])
        for arm in ("resume", "resume, newest five torn", "stale"):
            print_goal(f"{arm}, milliseconds", value=statistics.median(seconds[arm]) * 1e3, at_most=GOAL_MS)
        peaks = f"{peak_kb(many, ours):,.0f} kB with {options.checkpoints:,} checkpoints"
        print(f"  memory at its peak: {peaks}, {peak_kb(few, ours):,.0f} kB with 10")


def decide(model_dir: Path, run: guard.Fingerprint) -> guard.Verdict:
    return guard.assess(model_dir, fingerprint=run, digests=False)


def peak_kb(model_dir: Path, run: guard.Fingerprint) -> float:
    tracemalloc.start()
    decide(model_dir, run)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 1024


def fingerprint(dataset: str) -> guard.Fingerprint:
    """As many components as a real run has."""
    names = [component.name for component in guard.COMPONENTS if not component.name.endswith("*")]
    return guard.Fingerprint({**dict.fromkeys(names, "a value"), "dataset.digest": dataset * 64})


def fill(model_dir: Path, count: int, run: guard.Fingerprint, dataset: Path) -> None:
    """`count` sealed checkpoints of small files; the first is made, the others are its copies with another
    step.
    """
    with guard.ModelLock(model_dir, owner="benchmark"):
        guard.prepare_run(model_dir, fingerprint=run, dataset_path=dataset, lora_config={})
    for step in range(10, 10 * count + 1, 10):
        path = model_dir / f"checkpoint-{step}"
        path.mkdir()
        header = json.dumps({"weight": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}}).encode()
        (path / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
        for name in ("README.md", "adapter_config.json"):
            (path / name).write_text("{}")
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            with zipfile.ZipFile(path / name, "w") as archive:
                archive.writestr("data.pkl", name)
        (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        guard.seal_checkpoint(path, step=step, fingerprint=run)


if __name__ == "__main__":
    main()
