"""The losses of the running job, few enough to be shown and to travel in the status file, however long the run is."""

from __future__ import annotations

import math
from pathlib import Path

from daemon.job import Progress
from daemon.run_dir import read_events

POINTS = 200
READ_BYTES = 8 * 2**20  # of the trainer's events, from their end; older points are drawn from what is left


class LossHistory:
    """At most POINTS points, evenly over the run's steps; each is the mean loss of the steps that it stands for."""

    def __init__(self) -> None:
        self._run: tuple[Path, int, int] | None = None  # run directory, attempt, steps
        self._sums: dict[int, tuple[float, int, int]] = {}  # by part of the run: sum, count, last step
        self._last_step = 0

    def observe(self, run_dir: Path, attempt: int, progress: Progress | None) -> list[tuple[int, float]]:
        """Note where a run is; returns (step, loss) so far, ascending.

        A run that is met in its middle, after a restart or by a later attempt, is caught up from the trainer's events.
        """
        if progress is None or progress.total_steps < 1:
            return []
        run = (run_dir, attempt, progress.total_steps)
        if run != self._run:
            self._run, self._sums, self._last_step = run, {}, 0
            self._catch_up(run_dir)
        if progress.loss is not None and progress.step > self._last_step:
            self._add(progress.step, progress.loss)
        return [(step, float(f"{total / count:.6g}")) for _, (total, count, step) in sorted(self._sums.items())]

    def _add(self, step: int, loss: float) -> None:
        if not math.isfinite(loss) or self._run is None or step < 1:
            return
        part = min((step - 1) * POINTS // self._run[2], POINTS - 1)
        total, count, last = self._sums.get(part, (0.0, 0, 0))
        self._sums[part] = (total + loss, count + 1, max(step, last))
        self._last_step = max(self._last_step, step)

    def _catch_up(self, run_dir: Path) -> None:
        """Replay the trainer's events; a run that began again at an earlier step takes back what came after it."""
        losses: dict[int, float] = {}
        for name, data in read_events(run_dir, last_bytes=READ_BYTES):
            try:
                if name == "run.started":
                    start = int(data["start_step"])
                    losses = {step: loss for step, loss in losses.items() if step <= start}
                elif name == "run.stepped":
                    losses[int(data["step"])] = float(data["loss"])
            except (ValueError, KeyError, TypeError):
                continue  # written by a trainer of another version
        for step, loss in sorted(losses.items()):
            self._add(step, loss)
