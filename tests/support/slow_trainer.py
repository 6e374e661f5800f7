"""The real trainer, held back: before each step it waits until the root's file `allowed` names a step that high.

It also notes which rows each step saw, in `seen.jsonl` of the run directory. Nothing that it computes is touched.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from daemon.trainer.attempt import Engine, run_attempt


def load(run_dir: Path) -> Engine:
    from daemon.trainer.callbacks import MonitorCallback
    from daemon.trainer.collate import Collator
    from daemon.trainer.train import train

    allowed = run_dir.parents[2] / "allowed"
    lines: list[int] = []
    collate = Collator.__call__
    begin, end = MonitorCallback.on_train_begin, MonitorCallback.on_step_end

    def noting(self: Any, examples: Any) -> Any:
        lines.extend(example.line for example in examples)
        return collate(self, examples)

    def on_train_begin(self: Any, *args: Any, **kwargs: Any) -> None:
        lines.clear()  # the held-out rows of the first evaluation
        begin(self, *args, **kwargs)

    def on_step_begin(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        while state.global_step >= int(allowed.read_text()) and not self._stop.requested:
            time.sleep(0.01)

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The loader reads a batch ahead; what this step saw comes first.
        size = args.per_device_train_batch_size * args.gradient_accumulation_steps
        left = len(self._trainer.train_dataset) - (state.global_step - 1) % self._plan.steps_per_epoch * size
        taken, lines[:] = lines[: min(size, left)], lines[min(size, left) :]
        with (run_dir / "seen.jsonl").open("a") as notes:
            notes.write(json.dumps({"step": state.global_step, "lines": taken}) + "\n")
        end(self, args, state, control, **kwargs)

    Collator.__call__ = noting  # type: ignore[method-assign]
    MonitorCallback.on_train_begin = on_train_begin  # type: ignore[method-assign]
    MonitorCallback.on_step_begin = on_step_begin  # type: ignore[method-assign]
    MonitorCallback.on_step_end = on_step_end  # type: ignore[method-assign]
    return train


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    sys.exit(run_attempt(folder, lambda: load(folder)))
