"""`python -m daemon.trainer.merge VERSION_DIR OUT MODEL_JSON`: base and adapter as one model, in bfloat16.

Prints one JSON object: `parameters` and `size_bytes`, or `error` and `hint`.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from daemon.job import FailureKind
from daemon.recipe import ModelSettings
from daemon.trainer.base_model import resolve_base
from daemon.trainer.errors import RunFailure
from daemon.trainer.model import ADAPTER_CONFIG, load_adapter, load_network, saved_config
from daemon.trainer.tokenizer import load_tokenizer
from guard.atomic import fsync_tree, rename_durable


def merge(version_dir: Path, out: Path, model: ModelSettings) -> dict[str, Any]:
    """Write `out`, a folder that AutoModelForCausalLM loads; it has its name only once it is whole.

    Added up in float32 and rounded once. The base is the configured one, never one that the adapter names. Raises
    RunFailure(CONFIG) when `out` exists, or when the adapter says that it was trained on another base.
    """
    if out.exists():
        raise RunFailure(FailureKind.CONFIG, f"{out} exists", hint="name a folder that does not")
    base = resolve_base(model)
    named = json.loads((version_dir / ADAPTER_CONFIG).read_bytes()).get("base_model_name_or_path")
    if named != base.reference:
        raise RunFailure(
            FailureKind.CONFIG,
            f"version {version_dir.name} was trained on {named!r}, and {base.reference!r} is configured",
            hint="set model_name_or_path under [model] to the base that it was trained on",
        )
    config = saved_config(version_dir, base)
    network = load_network(base, model.model_copy(update={"load_in_4bit": False}), dtype=torch.float32)
    merged = load_adapter(network, version_dir, config).merge_and_unload(safe_merge=True)
    head, embeddings = merged.get_output_embeddings(), merged.get_input_embeddings()
    if head is not None and head.weight.data_ptr() != embeddings.weight.data_ptr():
        merged.config.tie_word_embeddings = False  # one of them was trained: saved as tied, it would be lost
    merged = merged.to(torch.bfloat16)
    merged.config.use_cache = True
    beside = out.with_name(f".{out.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    merged.save_pretrained(beside)
    load_tokenizer(base).save_pretrained(beside)
    fsync_tree(beside)
    rename_durable(beside, out)
    return {
        "parameters": int(merged.num_parameters()),
        "size_bytes": sum(path.stat().st_size for path in out.iterdir()),
    }


if __name__ == "__main__":
    try:
        print(json.dumps(merge(Path(sys.argv[1]), Path(sys.argv[2]), ModelSettings.model_validate_json(sys.argv[3]))))
    except RunFailure as failure:
        print(json.dumps({"error": failure.message, "hint": failure.hint}))
        sys.exit(1)
