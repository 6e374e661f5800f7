"""What the killed process was doing. Each function is one scenario; its arguments are JSON."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import guard
from tests.unit.guard.conftest import make_fingerprint


def prepare(model_dir: str, dataset: str, changes: dict[str, Any]) -> str:
    """Start a run: decide, clear, record."""
    with guard.ModelLock(model_dir, owner="scenario"):
        prepared = guard.prepare_run(
            model_dir, fingerprint=make_fingerprint(**changes), dataset_path=dataset, lora_config={"r": 8}
        )
    return prepared.verdict.kind.value


def seal(model_dir: str, step: int, staged: bool) -> None:
    """Seal what the Trainer has just written, put it in place, rotate."""
    name = f"checkpoint-{step}"
    with guard.ModelLock(model_dir, owner="scenario"):
        directory = Path(model_dir, ".staging", name) if staged else Path(model_dir, name)
        guard.seal_checkpoint(
            directory,
            step=step,
            fingerprint=make_fingerprint(),
            into=Path(model_dir, name) if staged else None,
        )
        guard.rotate(model_dir, keep=2)


def metadata(model_dir: str, dataset: str) -> None:
    """Write metadata, and then mark its run as finished."""
    with guard.ModelLock(model_dir, owner="scenario"):
        guard.write_metadata(
            model_dir,
            guard.RunMetadata(
                dataset_name=Path(dataset).name,
                dataset_hash=guard.compute_dataset_hash(dataset),
                dataset_path=dataset,
                lora_config={},
                fingerprint=make_fingerprint(),
            ),
        )
        guard.mark_finished(model_dir, "0001")


def clear(model_dir: str) -> list[str] | None:
    """Plan and execute a clear of everything; on failure return the class, the message and the hint."""
    everything = guard.Verdict(cause=guard.VerdictCause.REQUESTED, reasons=("for the test",))
    try:
        with guard.ModelLock(model_dir, owner="scenario"):
            guard.plan_clear(model_dir, verdict=everything).execute()
    except guard.GuardError as error:
        return [type(error).__name__, error.cause, error.hint]
    return None


def try_seal(model_dir: str, step: int, staged: bool) -> list[str] | None:
    """`seal`; on failure return the class, the message and the hint."""
    try:
        seal(model_dir, step, staged)
    except guard.GuardError as error:
        return [type(error).__name__, error.cause, error.hint]
    return None


def purge(model_dir: str) -> None:
    """Delete all cleared sets but the newest."""
    with guard.ModelLock(model_dir, owner="scenario"):
        guard.purge_cleared(model_dir, keep_sets=1, now=datetime(2030, 1, 1, tzinfo=UTC))


def restore(model_dir: str, set_name: str) -> None:
    """Bring a cleared set back."""
    with guard.ModelLock(model_dir, owner="scenario"):
        guard.restore_set(model_dir, set_name)


def append(path: str) -> None:
    """Append two lines to a file whose last line is torn."""
    guard.append_line_durable(path, '{"n": 2}')
    guard.append_line_durable(path, '{"n": 3}')


def write(path: str, size_bytes: int) -> None:
    """Replace a file."""
    guard.write_atomic(path, b"n" * size_bytes)
