"""Fingerprints, seals, verdicts: no run continues from a checkpoint that is not its own.

    run = guard.fingerprint_trainer(trainer, dataset_path="train.jsonl")
    with guard.ModelLock(model_dir, owner="my script"):
        prepared = guard.prepare_run(model_dir, fingerprint=run, dataset_path="train.jsonl", lora_config={})
        trainer.add_callback(guard.SealCallback(prepared))
        trainer.train(resume_from_checkpoint=prepared.resume_from)

`SealCallback` needs transformers, which is imported when it is first asked for; everything else needs blake3
alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .atomic import append_line_durable, fsync_dir, fsync_tree, rename_durable, write_atomic
from .checkpoints import (
    Checkpoint,
    CheckpointState,
    Stray,
    list_checkpoints,
    newest_intact,
    rotate,
    scan_checkpoints,
    scan_until_resumable,
    seal_checkpoint,
    verify_checkpoint,
)
from .clear import ClearPlan, ClearResult, plan_clear
from .cleared_sets import (
    PurgePlan,
    PurgeResult,
    RestoreResult,
    list_cleared_sets,
    plan_purge,
    purge_cleared,
    restore_set,
)
from .compat import (
    clear_checkpoints,
    compute_dataset_hash,
    load_dataset_metadata,
    save_dataset_metadata,
    validate_checkpoint_compatibility,
)
from .components import COMPONENTS, Component, ComponentKind
from .digest import DigestCache, FileDigest, digest_file, digest_model_files, digest_tokenizer_files
from .errors import (
    ClearRefused,
    DatasetUnreadable,
    FileChanged,
    FileUnreadable,
    GuardError,
    MetadataTooNew,
    MetadataUnusable,
    ModelLocked,
    NotFound,
    NotLocked,
    RunRefused,
    SealBroken,
    SealKeyMissing,
    StorageError,
    UsageError,
    WeightsNotFinite,
)
from .fingerprint import JSON, DatasetFingerprint, Difference, Fingerprint, fingerprint_dataset
from .hf_trainer import fingerprint_trainer
from .lock import ModelLock
from .metadata import MetadataKind, MetadataReading, RunMetadata, mark_finished, read_metadata, write_metadata
from .prepare import PreparedRun, assess, prepare_run
from .seal import load_key
from .verdict import Verdict, VerdictCause, VerdictKind, decide

if TYPE_CHECKING:
    from .callback import SealCallback

__all__ = [
    "COMPONENTS",
    "JSON",
    "Checkpoint",
    "CheckpointState",
    "ClearPlan",
    "ClearRefused",
    "ClearResult",
    "Component",
    "ComponentKind",
    "DatasetFingerprint",
    "DatasetUnreadable",
    "Difference",
    "DigestCache",
    "FileChanged",
    "FileDigest",
    "FileUnreadable",
    "Fingerprint",
    "GuardError",
    "MetadataKind",
    "MetadataReading",
    "MetadataTooNew",
    "MetadataUnusable",
    "ModelLock",
    "ModelLocked",
    "NotFound",
    "NotLocked",
    "PreparedRun",
    "PurgePlan",
    "PurgeResult",
    "RestoreResult",
    "RunMetadata",
    "RunRefused",
    "SealBroken",
    "SealCallback",
    "SealKeyMissing",
    "StorageError",
    "Stray",
    "UsageError",
    "Verdict",
    "VerdictCause",
    "VerdictKind",
    "WeightsNotFinite",
    "append_line_durable",
    "assess",
    "clear_checkpoints",
    "compute_dataset_hash",
    "decide",
    "digest_file",
    "digest_model_files",
    "digest_tokenizer_files",
    "fingerprint_dataset",
    "fingerprint_trainer",
    "fsync_dir",
    "fsync_tree",
    "list_checkpoints",
    "list_cleared_sets",
    "load_dataset_metadata",
    "load_key",
    "mark_finished",
    "newest_intact",
    "plan_clear",
    "plan_purge",
    "prepare_run",
    "purge_cleared",
    "read_metadata",
    "rename_durable",
    "restore_set",
    "rotate",
    "save_dataset_metadata",
    "scan_checkpoints",
    "scan_until_resumable",
    "seal_checkpoint",
    "validate_checkpoint_compatibility",
    "verify_checkpoint",
    "write_atomic",
    "write_metadata",
]


def __getattr__(name: str) -> Any:
    if name == "SealCallback":
        from .callback import SealCallback

        return SealCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
