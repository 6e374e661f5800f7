"""How often the gate stops what is harmless, and how often it misses what is not, with real runs of the tiny model.

    python -m benchmarks.gate [--seeds 20] [--parts 10] [--rows 100] [--work DIR]

Harmless: one task in so many parts, one after the other. Harmful: after the last part a file of the same kind whose answers
are those of other rows. Each run is the trainer's own, in this process, with the settings' defaults but for a learning rate that
the tiny model needs. Results are written to DIR/results.jsonl, a line a run; seeds that are there already are not run again.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks._tasks import Row, as_lines, make_tasks
from daemon.evaluation.gate import with_action
from daemon.evaluation.settings import GateSettings
from daemon.evaluation.values import GateAction
from daemon.trainer.tiny_model import build_tiny
from tests.support.inprocess import promote, specify, train

TABLES = {"training": {"learning_rate": 3e-3, "num_train_epochs": 2.0, "save_steps": 1000}, "data": {"max_length": 128}}


def run_seed(seed: int, parts: int, rows: int, base: Path, folder: Path) -> Iterator[dict[str, Any]]:
    """Train the parts of one task and then the harmful file; yields a line for each run."""
    draw = random.Random(seed)
    task = list(make_tasks(seed, rows=(parts + 1) * rows, test=1).values())[seed % 4]
    chunks = [task.rows[at : at + rows] for at in range(0, (parts + 1) * rows, rows)]
    for name in ("model", "state"):
        (folder / name).mkdir(parents=True)
    for number, chunk in enumerate(chunks):
        is_harmful = number == parts
        content = _with_wrong_answers(chunk, draw) if is_harmful else chunk
        spec = specify(folder / f"{number}", content, base, TABLES, format_="prompt_completion")
        spec = replace(
            spec,
            job_id=f"{number}",
            dataset=replace(spec.dataset, name=f"{number}.jsonl"),
            model_dir=str(folder / "model"),
            state_dir=str(folder / "state"),
        )
        result = with_action(train(spec), GateSettings())
        promote(spec, result)
        evaluation = result.evaluation
        if number and evaluation is not None:
            yield {
                "seed": seed,
                "task": task.name,
                "part": number,
                "harmful": is_harmful,
                "verdict": evaluation.verdict,
                "held": evaluation.action is GateAction.HELD,
                "alpha": evaluation.alpha,
                "datasets": len(evaluation.datasets),
                "unscored": len(evaluation.unscored),
                "scored_seconds": evaluation.seconds,
                "wall_seconds": round(result.wall_seconds, 3),
                "reasons": evaluation.reasons,
            }


def _with_wrong_answers(rows: Sequence[Row], draw: random.Random) -> list[Row]:
    """The same questions with letters drawn at random for answers."""
    return [{**row, "completion": " " + "".join(draw.choices("qxzjkv", k=12))} for row in rows]


def summarise(lines: Sequence[dict[str, Any]]) -> str:
    """The rates, as text."""
    told = []
    for is_harmful in (False, True):
        runs = [line for line in lines if line["harmful"] is is_harmful]
        if not runs:
            continue
        held = sum(line["held"] for line in runs)
        blended = sum(line["alpha"] is not None for line in runs)
        told.append(
            f"{'harmful' if is_harmful else 'harmless'}: {len(runs)} runs, {held} held ({held / len(runs):.1%}), {blended} blended"
        )
    spent, wall = (sum(line[key] for line in lines) for key in ("scored_seconds", "wall_seconds"))
    return "\n".join([*told, f"scoring: {spent / max(wall, 1e-9):.1%} of the runs' seconds"])


def main() -> None:
    """Run what is missing, and print the rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--parts", type=int, default=10)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--work", type=Path, default=Path("build/gate"))
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    base = chosen.work / "base"
    if not base.is_dir():
        corpus = chosen.work / "corpus.jsonl"
        corpus.write_bytes(as_lines(row for task in make_tasks(0, rows=200, test=1).values() for row in task.rows))
        build_tiny(base, [corpus])
    results = chosen.work / "results.jsonl"
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    done = {line["seed"] for line in lines if line["harmful"]}
    lines = [line for line in lines if line["seed"] in done]
    for seed in sorted(set(range(chosen.seeds)) - done):
        folder = chosen.work / f"seed-{seed}"
        shutil.rmtree(folder, ignore_errors=True)
        lines += run_seed(seed, chosen.parts, chosen.rows, base, folder)
        shutil.rmtree(folder)
        results.write_text("".join(json.dumps(line) + "\n" for line in lines))
        print(f"seed {seed}\n{summarise(lines)}", flush=True)
    print(summarise(lines))


if __name__ == "__main__":
    main()
