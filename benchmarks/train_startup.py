"""From the start of a job to its first optimizer step, cold and warm, and twenty small jobs in a row.

    python -m benchmarks.train_startup [--rounds 3] [--jobs 20]

The arms take turns: a plain script with transformers and peft, our trainer cold, our trainer forked from a warm server.
Times are those that the trainers themselves note; a job's end is when its process is gone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from benchmarks._table import print_goal
from daemon.cli.init import build_tiny_in_child, examples_dir
from daemon.executors.forked import ForkedExecutor
from daemon.executors.local import LocalExecutor
from tests.support.inprocess import rows, specify

COMMAND = (sys.executable, "-P", "-m", "daemon.trainer")
TABLES = {"training": {"max_steps": 3}, "data": {"held_out_fraction": 0.0, "max_length": 256}}
PLAIN = """
import sys, json, time
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, TrainerCallback
from peft import LoraConfig, get_peft_model
base, path, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(base)
rows = [json.loads(line)["messages"] for line in open(path)]
data = [{"input_ids": ids, "labels": ids} for ids in
        (tokenizer.apply_chat_template(row, tokenize=True, return_dict=True)["input_ids"][:256] for row in rows)]
model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear"))
class First(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            print("first", time.time())
def collate(batch):
    import torch
    width = max(len(row["input_ids"]) for row in batch)
    ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in batch])
    return {"input_ids": ids, "labels": ids.clone()}
trainer = Trainer(model=model, args=TrainingArguments(out, max_steps=3, per_device_train_batch_size=4, gradient_accumulation_steps=2,
    use_cpu=True, report_to="none", disable_tqdm=True), train_dataset=data, data_collator=collate, callbacks=[First()])
trainer.train()
model.save_pretrained(out + "/adapter")
"""


def plain(folder: Path, base: Path) -> tuple[float, float]:
    spec = specify(folder, rows(24), base, TABLES)
    began = time.time()
    done = subprocess.run(
        [sys.executable, "-P", "-c", PLAIN, str(base), spec.dataset.path, str(folder / "out")],
        capture_output=True,
        text=True,
        check=True,
    )
    ended = time.time()
    first = next(float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("first "))
    return first - began, ended - began


def ours(executor: LocalExecutor, folder: Path, base: Path) -> tuple[float, float]:
    """(seconds to the first step, to the end)"""
    spec = replace(specify(folder, rows(24), base, TABLES), daemon_pid=os.getpid())
    run_dir = Path(spec.run_dir)
    began = time.time()
    executor.launch(spec)
    while executor.poll(run_dir) is None:
        time.sleep(0.005)
    ended = time.time()
    result = json.loads((run_dir / "result.json").read_text())
    if result["outcome"] != "succeeded":
        raise SystemExit(f"a job failed: {result['message']}")
    noted = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    first = next(event["at"] for event in noted if event["event"] == "run.first_step")
    return datetime.fromisoformat(first).timestamp() - began, ended - began


def heated(executor: ForkedExecutor, folder: Path, base: Path) -> None:
    """The first job is cold and starts the server; wait until that has its imports."""
    ours(executor, folder, base)
    deadline = time.monotonic() + 60
    while not executor.is_ready and time.monotonic() < deadline:
        time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=20)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        build_tiny_in_child(root / "base")
        assert examples_dir().is_dir()
        count = iter(range(10_000))

        def folder() -> Path:
            return root / f"job{next(count)}"

        cold, warm = LocalExecutor(COMMAND), ForkedExecutor(COMMAND)
        heated(warm, folder(), root / "base")
        arms: dict[str, Callable[[], tuple[float, float]]] = {
            "plain script": lambda: plain(folder(), root / "base"),
            "dropforge cold": lambda: ours(cold, folder(), root / "base"),
            "dropforge warm": lambda: ours(warm, folder(), root / "base"),
        }
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
        for _ in range(chosen.rounds):
            for name, run in arms.items():
                found[name].append(run())
        print(f"\nstart of a job to its first step, 24 rows, 3 steps ({chosen.rounds} rounds, interleaved)")
        print(f"  {'':<16}{'first step':>12}{'min':>9}{'max':>9}{'end':>9}")
        firsts = {}
        for name, times in found.items():
            each = [first for first, _ in times]
            firsts[name] = statistics.median(each)
            end = statistics.median(end for _, end in times)
            print(f"  {name:<16}{firsts[name]:>10.2f} s{min(each):>7.2f} s{max(each):>7.2f} s{end:>7.2f} s")
        print_goal("seconds to the first step, warm", value=firsts["dropforge warm"], at_most=1.0)

        print(f"\n{chosen.jobs} jobs in a row, end to end: from the start of the first to the end of the last")
        for name, run in arms.items():
            began = time.monotonic()
            for _ in range(chosen.jobs):
                run()
            spent = time.monotonic() - began
            print(f"  {name:<16}{spent:>10.1f} s{spent / chosen.jobs:>8.2f} s each")
        warm.close()


if __name__ == "__main__":
    main()
