"""A quick engine in place of torch: real locks, verdicts, seals and candidates; a step costs microseconds.

Run as `python -P fake_trainer.py BEHAVIOUR.json RUN_DIR` through `[executor] command`. What it "learns" is a chain of
digests over (row order, step), so that two runs over the same steps end with the same weights, and a step that was
skipped or taken twice shows.

BEHAVIOUR.json may hold, by attempt ("1", "2", ...) or "*":
  step_seconds        how long a step takes
  first_step_seconds  how much longer the first one takes
  die_at              SIGKILL to itself after this step (before its checkpoint)
  fail                {"kind": ..., "message": ..., "tried": [...]}: end with this failure after the first step
  events              objects that are written as events at each step, whatever they are
  quit_at             leave as if asked to after this step, without a checkpoint
  lie_about_steps     claim success after so many steps fewer than planned
  ignore_terminate    true: do not listen to SIGTERM
  spoil_candidate     true: the adapter that the result names is cut short after all
  evaluation          {"passes": ..., "lost": nats a token of one earlier dataset}: what the gate says, and rows were rehearsed
  seal_seconds        how long the checkpoint takes that a stop asked for
  seal_after          a file that this checkpoint waits for
"""

from __future__ import annotations

import json
import math
import os
import signal
import struct
import sys
import time
from pathlib import Path
from typing import Any

from blake3 import blake3

import guard
from daemon.dataset.rows import iter_rows
from daemon.evaluation.values import Change, DatasetEvaluation, Evaluation, GateVerdict
from daemon.fingerprint import fingerprint_run
from daemon.job import FailureKind, MemoryMeasure, Outcome, ReplayedDataset, RunResult, RunSpec
from daemon.recipe import Recipe
from daemon.run_dir import EVENTS_NAME, RunWriter
from daemon.trainer.attempt import StopFlag, check_unchanged, run_attempt
from daemon.trainer.errors import Interrupted, RunFailure
from daemon.trainer.origin import find_origin, require_base

TOKENS_A_ROW = 10
STATE_NAME = "trainer_state.json"
WEIGHTS_NAME = "adapter_model.safetensors"


def train(spec: RunSpec, report: RunWriter, stop: StopFlag, behaviour: dict[str, Any]) -> RunResult:
    began = time.monotonic()
    recipe = Recipe.model_validate(spec.recipe)
    model_dir = Path(spec.model_dir)
    if behaviour.get("ignore_terminate"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    check_unchanged(spec)
    base = require_base(spec, recipe)
    origin = find_origin(spec, recipe, base)
    parent = origin.parent
    rows = sum(1 for _ in iter_rows(Path(spec.dataset.path), spec.dataset.format, recipe.data))
    batch = recipe.training.per_device_train_batch_size * recipe.training.gradient_accumulation_steps
    total = (
        recipe.training.max_steps
        if recipe.training.max_steps > 0
        else math.ceil(recipe.training.num_train_epochs * math.ceil(rows / batch))
    )
    with guard.ModelLock(model_dir, owner=f"job {spec.job_id}"):
        fingerprint = fingerprint_run(
            dataset=spec.dataset,
            recipe=recipe,
            base_path=base.path,
            base_revision=base.revision,
            parent_version=parent.name if parent else None,
            parent_digest=parent.digest if parent else None,
            precision="float32",
        )
        prepared = guard.prepare_run(
            model_dir,
            fingerprint=fingerprint,
            dataset_path=Path(spec.dataset.path),
            lora_config={"r": recipe.lora.r, "alpha": recipe.lora.lora_alpha, "dropout": recipe.lora.lora_dropout},
            log=lambda name, data: report.event(name, **data),
        )
        weights = parent.digest if parent else "base"
        start = 0
        if prepared.resume_from is not None:
            state = json.loads((prepared.resume_from / STATE_NAME).read_bytes())
            start, weights = state["global_step"], state["weights"]
        report.event("run.started", start_step=start, total_steps=total, resumed_from=str(prepared.resume_from))
        training_began = time.monotonic()
        last = total - behaviour.get("lie_about_steps", 0)
        step = start
        first_done = training_began
        for step in range(start + 1, last + 1):
            if step == start + 2:
                first_done = time.monotonic()
            time.sleep(behaviour.get("step_seconds", 0) + (step == start + 1) * behaviour.get("first_step_seconds", 0))
            weights = blake3(f"{weights}:{spec.dataset.digest}:{step}".encode()).hexdigest()
            report.progress(phase="training", step=step, total_steps=total, start_step=start, loss=1 / step)
            if "fail" in behaviour:
                fail = behaviour["fail"]
                tried = tuple(map(MemoryMeasure, fail.get("tried", ())))
                raise RunFailure(FailureKind(fail["kind"]), fail["message"], hint="a hint", tried=tried)
            for event in behaviour.get("events", ()):
                with (Path(spec.run_dir) / EVENTS_NAME).open("a") as file:
                    file.write(json.dumps(event) + "\n")
            if behaviour.get("quit_at") == step:
                raise Interrupted
            if behaviour.get("die_at") == step:
                os.kill(os.getpid(), signal.SIGKILL)
            if step % recipe.training.save_steps == 0 or step == last or stop.requested:
                time.sleep(behaviour.get("seal_seconds", 0) if stop.requested else 0)
                while stop.requested and "seal_after" in behaviour and not Path(behaviour["seal_after"]).exists():
                    time.sleep(0.01)
                seal(prepared, step, weights, fingerprint)
                guard.rotate(model_dir, keep=recipe.training.save_total_limit)
                report.event("checkpoint.sealed", step=step)
            if stop.requested:
                break
        result = RunResult(
            outcome=Outcome.SUCCEEDED if step >= last else Outcome.INTERRUPTED,
            steps_planned=total,
            steps_run=step,
            start_step=start,
            resumed_from=prepared.resume_from.name if prepared.resume_from else None,
            verdict=prepared.verdict.kind.name.lower(),
            reasons=prepared.verdict.reasons,
            cleared=prepared.cleared.cleared if prepared.cleared else 0,
            train_loss=1.0,
            held_out_before=2.0,
            held_out_after=1.0,
            rows=rows,
            tokens_trained=rows * TOKENS_A_ROW,
            tokens_per_second=rows * TOKENS_A_ROW / (time.monotonic() - training_began),
            steady_tokens_per_second=(rows * TOKENS_A_ROW) * (step - start - 1) / step / (time.monotonic() - first_done)
            if step > start + 1
            else None,
            wall_seconds=time.monotonic() - began,
            message=f"stopped at step {step}" if step < last else "",
            warnings=origin.warnings,
            base=origin.base.to_record(),
            parent=parent.name if parent else None,
            parent_digest=parent.digest if parent else None,
            **evaluated(behaviour.get("evaluation") if parent else None),
        )
        if result.outcome is Outcome.INTERRUPTED:
            return result
        candidate = prepared.staging_dir / f"candidate-{spec.job_id}"
        candidate.mkdir(exist_ok=True)
        write_adapter(candidate, weights)
        digest = guard.digest_file(candidate / WEIGHTS_NAME).blake3_hex
        if behaviour.get("spoil_candidate"):
            (candidate / WEIGHTS_NAME).write_bytes(b"")
        return RunResult(**{**vars(result), "candidate": str(candidate), "adapter_digest": digest})


def evaluated(said: dict[str, Any] | None) -> dict[str, Any]:
    """The fields of a result that tell of one earlier dataset."""
    if said is None:
        return {}
    change = Change(measured=said["lost"], low=said["lost"], high=said["lost"])
    verdict = GateVerdict.KEPT if said["passes"] else GateVerdict.REGRESSED
    one = DatasetEvaluation(
        name="earlier.jsonl",
        digest="e" * 64,
        rows=40,
        tokens=400,
        loss_before=1.0,
        loss_after=1.0 + said["lost"],
        exact_before=1.0,
        exact_after=1.0,
        loss=change,
        exact=Change(measured=0.0, low=0.0, high=0.0),
        verdict=verdict,
    )
    reasons = () if said["passes"] else (f"earlier.jsonl lost {said['lost']}",)
    return {
        "evaluation": Evaluation(verdict=verdict, passes=said["passes"], datasets=(one,), reasons=reasons),
        "replayed": (ReplayedDataset(name="earlier.jsonl", digest="e" * 64, rows=4, tokens=40),),
    }


def seal(prepared: guard.PreparedRun, step: int, weights: str, fingerprint: guard.Fingerprint) -> None:
    """A small checkpoint in the Trainer's form, sealed for real."""
    folder = prepared.staging_dir / f"checkpoint-{step}"
    folder.mkdir(exist_ok=True)
    write_adapter(folder, weights)
    (folder / "optimizer.pt").write_bytes(b"PK\x05\x06" + bytes(18))
    (folder / "scheduler.pt").write_bytes(b"PK\x05\x06" + bytes(18))
    (folder / STATE_NAME).write_text(json.dumps({"global_step": step, "weights": weights}))
    guard.seal_checkpoint(folder, step=step, fingerprint=fingerprint, into=prepared.model_dir / f"checkpoint-{step}")


def write_adapter(folder: Path, weights: str) -> None:
    (folder / WEIGHTS_NAME).write_bytes(adapter_bytes(weights))
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 16}))


def adapter_bytes(weights: str) -> bytes:
    """A whole safetensors file whose one tensor is the digest chain."""
    data = bytes.fromhex(blake3(weights.encode()).hexdigest())
    header = json.dumps({"lora_B": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}).encode()
    return struct.pack("<Q", len(header)) + header + data


def main() -> int:
    behaviours, run_dir = json.loads(Path(sys.argv[1]).read_bytes()), Path(sys.argv[2])
    attempt = str(json.loads((run_dir / "run.json").read_bytes())["attempt"])
    behaviour = {**behaviours.get("*", {}), **behaviours.get(attempt, {})}
    return run_attempt(run_dir, lambda: lambda spec, report, stop: train(spec, report, stop, behaviour))


if __name__ == "__main__":
    sys.exit(main())
