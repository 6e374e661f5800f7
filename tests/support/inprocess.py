"""The real trainer's run inside the test's own process, where starting a process is not the point."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec import to_builtins

from daemon import versions
from daemon.cli.init import examples_dir
from daemon.evaluation.values import GateAction
from daemon.job import RUN_SPEC_VERSION, Dataset, RunResult, RunSpec
from daemon.memory.promotion import keep_memory
from daemon.recipe import Recipe, ReplaySettings
from daemon.run_dir import RunWriter
from daemon.trainer.errors import Interrupted
from daemon.versions import Version
from guard import digest_file

QUICK: Mapping[str, Mapping[str, Any]] = {
    "training": {"learning_rate": 3e-3, "logging_steps": 1, "save_steps": 1000},
    "data": {"max_length": 160, "held_out_fraction": 0.1},
}


class Wish:
    """A stop flag that a test sets; the real one would take the test process's signals."""

    requested = False

    def check(self) -> None:
        if self.requested:
            raise Interrupted


class StopAfterLoading(Wish):
    """Asks the run to stop once it may no longer leave without a checkpoint."""

    checks = 0

    def check(self) -> None:
        super().check()
        self.checks += 1
        self.requested = self.checks == 2  # the last check before the model is loaded


def rows(count: int, start: int = 0, name: str = "gsm8k_messages.jsonl") -> list[dict[str, Any]]:
    lines = (examples_dir() / name).read_text().splitlines()
    return [json.loads(line) for line in lines[start : start + count]]


def recipe(base: Path, tables: Mapping[str, Mapping[str, Any]] | None = None) -> Recipe:
    merged = {name: dict(values) for name, values in QUICK.items()}
    for name, values in (tables or {}).items():
        merged.setdefault(name, {}).update(values)
    merged.setdefault("model", {})["model_name_or_path"] = str(base)
    return Recipe.model_validate(merged)


def specify(
    folder: Path,
    content: list[dict[str, Any]],
    base: Path,
    tables: Mapping[str, Mapping[str, Any]] | None = None,
    format_: str = "messages",
) -> RunSpec:
    """A run over `content` in `folder`: rows.jsonl, run/ and model/ beside each other."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    for name in ("run", "model", "state"):
        (folder / name).mkdir(exist_ok=True)
    dataset = Dataset(
        name=path.name,
        path=str(path),
        size_bytes=path.stat().st_size,
        rows=len(content),
        digest=digest_file(path).blake3_hex,
        format=format_,
    )
    return RunSpec(
        schema_version=RUN_SPEC_VERSION,
        job_id="job",
        attempt=1,
        dataset=dataset,
        recipe=recipe(base, tables).model_dump(mode="json"),
        run_dir=str(folder / "run"),
        model_dir=str(folder / "model"),
        state_dir=str(folder / "state"),
    )


def train(spec: RunSpec, wish: Wish | None = None) -> RunResult:
    from daemon.trainer.train import train as run

    return run(spec, RunWriter(Path(spec.run_dir)), wish or Wish())  # type: ignore[arg-type]


def events(spec: RunSpec, name: str = "") -> list[dict[str, Any]]:
    path = Path(spec.run_dir) / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []  # made with its first event
    return [event for event in map(json.loads, lines) if event["event"].startswith(name)]


def promote(spec: RunSpec, result: RunResult) -> Version:
    """Promote a run's candidate as the daemon does: its memory first."""
    keep_memory(Path(spec.state_dir), Path(spec.run_dir), ReplaySettings(), file_is_deleted=False)
    record = {
        "dataset": spec.dataset.name,
        "dataset_digest": spec.dataset.digest,
        "replayed": {dataset.digest: dataset.rows for dataset in result.replayed},
        "parent": result.parent,
        "parent_digest": result.parent_digest,
        "base": result.base,
        "adapter_digest": result.adapter_digest,
        "evaluation": to_builtins(result.evaluation),
        **(
            {"held": list(result.evaluation.reasons)}
            if result.evaluation and result.evaluation.action is GateAction.HELD
            else {}
        ),
    }
    return versions.promote(Path(spec.model_dir), Path(result.candidate or ""), job_id=spec.job_id, record=record)
