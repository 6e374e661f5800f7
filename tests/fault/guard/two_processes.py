"""Run by torchrun in two processes: a guarded run over a tiny model, cut back to half, and resumed."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import torch.distributed as dist

import guard
from tests.fault.guard.tiny import make_trainer


def main(root: Path) -> None:
    model_dir, lock = root / "model", None
    for _ in range(2):
        trainer, seen = make_trainer(
            base=root / "base",
            dataset=root / "rows.jsonl",
            output_dir=model_dir / ".staging",
            per_device_train_batch_size=2,
        )
        run = guard.fingerprint_trainer(trainer, dataset_path=root / "rows.jsonl")
        first = dist.get_rank() == 0
        prepared = None
        if first:
            lock = lock or guard.ModelLock(model_dir, owner="rank 0")
            if not lock.is_held:
                lock.acquire()
            shutil.rmtree(model_dir / "checkpoint-4", ignore_errors=True)
            prepared = guard.prepare_run(
                model_dir, fingerprint=run, dataset_path=root / "rows.jsonl", lora_config={"r": 4}
            )
        box = [prepared]
        dist.broadcast_object_list(box, src=0)
        assert box[0] is not None
        trainer.add_callback(guard.SealCallback(box[0]))
        trainer.train(resume_from_checkpoint=box[0].resume_from)
        (root / f"rank-{dist.get_rank()}").open("a").write(f"{box[0].verdict.kind.value} {seen.steps}\n")
    dist.barrier()
    os._exit(0)  # gloo's threads may abort or hang an interpreter that goes down, or the end of the group


if __name__ == "__main__":
    main(Path(sys.argv[1]))
