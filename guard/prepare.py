"""Everything that happens to a model directory before a run, in the one right order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .atomic import PathLike
from .checkpoints import list_checkpoints, scan_until_resumable, verify_checkpoint
from .clear import ClearResult, plan_clear
from .fingerprint import Fingerprint, name_size_hash, to_json_value
from .layout import ensure_staging
from .lock import require_lock
from .metadata import RunMetadata, read_metadata, require_known_form, write_metadata
from .verdict import Verdict, VerdictKind, decide, explain_skipped

Log = Callable[[str, dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class PreparedRun:
    """What a Trainer needs to know to run from the right state.

    `resume_from` goes to `Trainer.train(resume_from_checkpoint=...)`: None means from the start; never pass
    True. `staging_dir` exists and is empty; checkpoints that a Trainer writes there are sealed and moved into
    place.
    """

    model_dir: Path
    fingerprint: Fingerprint
    verdict: Verdict
    resume_from: Path | None
    cleared: ClearResult | None
    staging_dir: Path


def assess(model_dir: PathLike, *, fingerprint: Fingerprint, key: bytes | None = None, digests: bool = True) -> Verdict:
    """The verdict for a run, from what is on the disk; changes nothing.

    Looks at no more checkpoints than it needs. `digests` are taken of what could be resumed from. Raises
    MetadataTooNew.
    """
    reading = read_metadata(model_dir)
    require_known_form(model_dir, reading)
    metadata = reading.run
    agrees = (
        metadata is not None
        and metadata.finished is None
        and metadata.fingerprint is not None
        and metadata.fingerprint.same_run(fingerprint)
    )
    if agrees:
        checkpoints = scan_until_resumable(model_dir, fingerprint=fingerprint, key=key, digests=digests)
    else:
        # The metadata has decided; that there is a checkpoint at all is what still matters.
        newest = list_checkpoints(model_dir)[0][-1:]
        checkpoints = tuple(verify_checkpoint(path, key=key, digests=False) for _, path in newest)
    return decide(metadata=reading, fingerprint=fingerprint, checkpoints=checkpoints)


def prepare_run(
    model_dir: PathLike,
    *,
    fingerprint: Fingerprint,
    dataset_path: PathLike,
    lora_config: Any,
    key: bytes | None = None,
    log: Log | None = None,
) -> PreparedRun:
    """Decide, clear what does not belong, record the run, return where to resume.

    `lora_config` (a mapping, or peft's LoraConfig) is written into the metadata for readers of old; what decides
    is in the fingerprint.

    Under the model directory's lock. Raises NotLocked, MetadataTooNew, ClearRefused, StorageError, NotFound (no
    such dataset); a run that was not prepared leaves checkpoints and metadata as they were.
    """
    folder = Path(model_dir)
    require_lock(folder, "prepare a run in")
    publish = log if log is not None else _silent
    # Whatever can fail without touching anything comes first.
    metadata = make_metadata(fingerprint=fingerprint, dataset_path=dataset_path, lora_config=lora_config)
    verdict = assess(folder, fingerprint=fingerprint, key=key)
    _publish_decision(verdict, fingerprint, publish)
    plan = plan_clear(folder, verdict=verdict, key=key)
    for stray in plan.ignored:
        publish("guard.entry_left_alone", {"path": str(stray.path), "reason": stray.reason})
    # Clear before writing the metadata: a crash here leaves no checkpoints, which reads as FRESH. The other way round,
    # old checkpoints would stand beside metadata that calls them the new run's.
    cleared: ClearResult | None = plan.execute()
    if cleared is not None and cleared.set_path is not None:
        publish(
            "guard.checkpoints_cleared",
            {
                "set": str(cleared.set_path),
                "reason": plan.reason,
                "cleared": cleared.cleared,
                "size_bytes": cleared.size_bytes,
            },
        )
    else:
        cleared = None
    if verdict.kind is not VerdictKind.RESUME:
        write_metadata(folder, metadata)
        publish("guard.run_stamped", {"identity": fingerprint.identity_digest, "dataset": metadata.dataset_name})
    return PreparedRun(
        model_dir=folder,
        fingerprint=fingerprint,
        verdict=verdict,
        resume_from=verdict.checkpoint.path if verdict.checkpoint is not None else None,
        cleared=cleared,
        staging_dir=ensure_staging(folder),
    )


def _publish_decision(verdict: Verdict, fingerprint: Fingerprint, publish: Log) -> None:
    publish("guard.run_decided", verdict.to_json())
    for checkpoint in verdict.skipped:
        publish(
            "guard.checkpoint_passed_over",
            {
                "path": str(checkpoint.path),
                "step": checkpoint.step,
                "state": checkpoint.state.value,
                "reason": explain_skipped(checkpoint, fingerprint),
                "resume_from": str(verdict.checkpoint.path) if verdict.checkpoint is not None else None,
            },
        )


def plain_lora_config(lora_config: Any) -> dict[str, Any]:
    """Return a mapping as it is, of peft's LoraConfig the three old numbers.

    Raises TypeError.
    """
    if not isinstance(lora_config, Mapping):
        try:
            lora_config = {
                "r": lora_config.r, "alpha": lora_config.lora_alpha, "dropout": lora_config.lora_dropout
            }  # fmt: skip
        except AttributeError:
            raise TypeError(f"a {type(lora_config).__name__} is no lora_config") from None
    return {str(name): to_json_value(value) for name, value in lora_config.items()}


def _silent(_event: str, _data: dict[str, Any]) -> None:
    pass


def make_metadata(*, fingerprint: Fingerprint, dataset_path: PathLike, lora_config: Any) -> RunMetadata:
    """Make a run's metadata; `lora_config` as for prepare_run.

    Raises NotFound when there is no such dataset.
    """
    path = Path(dataset_path)
    _, name_size = name_size_hash(path)
    return RunMetadata(
        dataset_name=path.name,
        dataset_hash=name_size,
        dataset_path=str(path.absolute()),
        lora_config=plain_lora_config(lora_config),
        fingerprint=fingerprint,
    )
