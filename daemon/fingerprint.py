"""The components of a run's fingerprint, gathered without torch: what guard compares, name by name."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from daemon.job import Dataset, Plan, ReplayedDataset
from daemon.recipe import SELECTION_SETTINGS, Recipe
from guard import DigestCache, Fingerprint, digest_model_files, digest_tokenizer_files


def fingerprint_run(
    *,
    dataset: Dataset,
    recipe: Recipe,
    base_path: Path,
    base_revision: str | None,
    parent_version: str | None,
    parent_digest: str | None,
    precision: str,
    plan: Plan | None = None,
    tokens_digest: str | None = None,
    held_out_digest: str | None = None,
    replayed: Sequence[ReplayedDataset] = (),
    replay_digest: str | None = None,
    lora_config: Mapping[str, Any] | None = None,
    cache_path: Path | None = None,
) -> Fingerprint:
    """Everything that decides what a run computes, and some things worth recording that do not.

    `plan` and `tokens_digest`: what is left of the dataset once rows became tokens, and those; `held_out_digest`: the tokens of
    rows that are held out, which matter where evaluations decide what the run ends with. `replayed` and `replay_digest`:
    of which earlier datasets rows are trained again, and those rows. `lora_config`: every field of peft's own class, as the
    trainer uses it. `cache_path` keeps digests of base-model files between runs, keyed by size, mtime and inode.
    """
    training, lora, data = recipe.training, recipe.lora, recipe.data
    components: dict[str, Any] = {
        "dataset.digest": dataset.digest,
        "dataset.rows": dataset.rows,
        "dataset.name": dataset.name,
        "dataset.path": dataset.path,
        "data.format": dataset.format,
        "dataset.rows_trained": plan.rows if plan else None,
        "data.tokens": tokens_digest,
        "split.held_out_fraction": data.held_out_fraction,
        "split.seed": "none: by each row's own content",
        "data.order_seed": training.seed,
        "data.max_length": data.max_length,
        "data.truncation": "keep the trained part",
        "data.packing": False,
        "data.train_on": data.train_on,
        "data.columns": data.columns.model_dump(),
        "data.prompt_completion": data.prompt_completion,
        "replay.share": recipe.replay.share if replayed else None,
        "replay.datasets": [f"{found.name} {found.digest[:12]}" for found in replayed] or None,
        "replay.digest": replay_digest,
        "tokenizer.digest": digest_tokenizer_files(base_path),
        "model.name": recipe.model.model_name_or_path,
        "model.digest": digest_model_files(base_path, DigestCache(cache_path) if cache_path else None),
        "model.revision": base_revision,
        "parent.version": parent_version,
        "parent.digest": parent_digest,
        "start_from": training.start_from,
        "training.global_batch_size": training.per_device_train_batch_size
        * training.gradient_accumulation_steps
        * training.num_processes,
        "training.world_size": training.num_processes,
        "training.precision": precision,
        "training.attn_implementation": recipe.model.attn_implementation,
        "training.total_steps": plan.total_steps if plan else None,
        "training.loss": "mean over trained tokens of a step",
        "attempt.host": socket.gethostname(),
        "attempt.pid": os.getpid(),
    }
    components |= {f"lora.{name}": value for name, value in lora.model_dump(mode="json").items()}
    components |= {f"lora.{name}": value for name, value in (lora_config or {}).items()}
    if training.selects and held_out_digest is not None:
        components |= {f"selection.{name}": getattr(training, name) for name in SELECTION_SETTINGS}
        components["selection.held_out"] = held_out_digest
    # Named above, or nothing that computes.
    separate = {"start_from", "num_processes", "report_to", *SELECTION_SETTINGS} - {"eval_steps"}
    components |= {
        f"training.{name}": value for name, value in training.model_dump(mode="json").items() if name not in separate
    }
    components |= {f"versions.{name}": minor_version(name) for name in ("torch", "transformers", "peft", "dropforge")}
    return Fingerprint(components)


def minor_version(package: str) -> str | None:
    """`major.minor` of an installed package, None when it is missing."""
    try:
        return ".".join(version(package).split("+")[0].split(".")[:2])
    except PackageNotFoundError:
        return None
