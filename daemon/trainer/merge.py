"""`python -m daemon.trainer.merge VERSION_DIR OUT MODEL_JSON ROOT STATE_DIR`: merge base and adapter into one model, in bfloat16.

Prints one JSON object: `parameters`, `size_bytes`, `probe` and `warnings`, or `error` and `hint`. A merge that does not compute what base
and adapter compute is not written: the logits of a probe batch are compared first, and what was saved is read back.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from daemon.base_identity import Digest, identify_base, remembered
from daemon.job import FailureKind
from daemon.recipe import ModelSettings
from daemon.trainer.base_model import load_tokenizer, resolve_base
from daemon.trainer.errors import RunFailure
from daemon.trainer.generation import end_ids
from daemon.trainer.model import load_adapter, load_network, saved_config
from daemon.trainer.origin import require_same_base
from daemon.versions import read_version
from guard.atomic import apply_umask, fsync_tree, rename_durable
from guard.digest import digest_file

PROBE_ROWS, PROBE_TOKENS = 4, 64
# Of the largest logit: adding up in another order differs by less than 1e-5 of it, a weight in the wrong place by far more.
MERGE_TOLERANCE = 1e-3
BASE_HINT = "put that base back, or name it as model_name_or_path under [model], and merge again"


def merge(
    version_dir: Path, out: Path, model: ModelSettings, *, root: Path | None = None, digest: Digest = digest_file
) -> dict[str, Any]:
    """Write `out`, a folder that AutoModelForCausalLM loads; it has its name only once it is whole.

    Added up in float32 and rounded once. The base is the configured one, never one that the adapter names. Returns
    `parameters`, `size_bytes`, `probe` (see `compare_logits`) and `warnings`. `digest` reads the base's files. Raises
    RunFailure(CONFIG) when `out` exists, RunFailure(IDENTITY) when the version was trained on another base, RunFailure(INTERNAL)
    when the merge would compute something else.
    """
    if out.exists():
        raise RunFailure(FailureKind.CONFIG, f"{out} exists", hint="name a folder that does not")
    base = resolve_base(model, root)
    warnings = require_same_base(read_version(version_dir), base, identify_base(base, digest), model)
    config = saved_config(version_dir, base)
    network = load_network(base, model.model_copy(update={"load_in_4bit": False}), dtype=torch.float32)
    adapted = load_adapter(network, version_dir, config).eval()
    probe = probe_batch(network.config)
    expected = logits_of(adapted, probe)
    untie(adapted)  # a change of the head alone would be added to the embeddings as well
    merged = adapted.merge_and_unload(safe_merge=True)
    require_same(compare_logits(expected, logits_of(merged, probe)), version_dir.name)
    tie_again(merged)
    merged = merged.to(torch.bfloat16)
    rounded = compare_logits(expected, logits_of(merged, probe))
    merged.config.use_cache = True
    if ends := end_ids(version_dir):
        merged.generation_config.eos_token_id = ends
    beside = out.with_name(f".{out.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    merged.save_pretrained(beside)
    load_tokenizer(base).save_pretrained(beside)
    apply_umask(beside)
    require_saved(merged, beside)
    fsync_tree(beside)
    rename_durable(beside, out)
    return {
        "parameters": int(merged.num_parameters()),
        "size_bytes": sum(path.stat().st_size for path in out.iterdir()),
        "probe": rounded,
        "warnings": warnings,
    }


def probe_batch(config: Any) -> torch.Tensor:
    """Token ids spread over the whole vocabulary, int64 (PROBE_ROWS, PROBE_TOKENS or the model's positions); always the same."""
    text = config.get_text_config()
    length = min(PROBE_TOKENS, getattr(text, "max_position_embeddings", None) or PROBE_TOKENS)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(text.vocab_size, (PROBE_ROWS, length), generator=generator)


def logits_of(model: Any, probe: torch.Tensor) -> torch.Tensor:
    """Return the logits, float32 (B, T, vocabulary)."""
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=probe).logits
    return logits.float()


def compare_logits(expected: torch.Tensor, actual: torch.Tensor) -> dict[str, float]:
    """Return `largest_difference`, `largest_logit` and `same_best_token`, the share of positions that agree."""
    return {
        "largest_difference": float((expected - actual).abs().max()),
        "largest_logit": float(expected.abs().max()),
        "same_best_token": float((expected.argmax(-1) == actual.argmax(-1)).float().mean()),
    }


def require_same(compared: dict[str, float], version: str) -> None:
    """Raise RunFailure(INTERNAL) when the merged model computes something else than base and adapter."""
    difference, largest = compared["largest_difference"], compared["largest_logit"]
    if not difference <= MERGE_TOLERANCE * largest:  # NaN as well
        raise RunFailure(
            FailureKind.INTERNAL,
            f"the merged model does not compute what version {version} computes: logits differ by up to {difference:.3g}"
            f" (allowed: {MERGE_TOLERANCE:g} of {largest:.3g}), the best token is the same at"
            f" {compared['same_best_token']:.1%} of the probe",
            hint="load base and adapter together instead (PeftModel.from_pretrained); nothing was written",
        )


def untie(model: Any) -> None:
    """Give every parameter that several modules share a copy in each of them."""
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in seen:
                setattr(module, name, torch.nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
            seen.add(id(parameter))


def tie_again(model: Any) -> None:
    """Share head and embeddings where the base does and both are still the same; else save them as two."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if not model.config.get_text_config().tie_word_embeddings or head is None:
        return
    if torch.equal(head.weight, embeddings.weight):
        head.weight = embeddings.weight
    else:
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False


def require_saved(model: Any, folder: Path) -> None:
    """Raise RunFailure(INTERNAL) unless `folder`, read back, holds every weight of `model` to the bit."""
    loaded = load_saved(folder).state_dict()
    expected = model.state_dict()
    different = [name for name in expected if name not in loaded or not torch.equal(expected[name], loaded[name])]
    if different:
        raise RunFailure(
            FailureKind.INTERNAL,
            f"the merged model reads back with other weights: {', '.join(different[:3])} ({len(different)} of {len(expected)})",
            hint=f"the files are kept in {folder} for inspection",
        )


def load_saved(folder: Path) -> Any:
    """Load the merged model as its users will."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True)


if __name__ == "__main__":
    try:
        version, target, model_json, root_dir, state_dir = sys.argv[1:]
        settings = ModelSettings.model_validate_json(model_json)
        print(
            json.dumps(
                merge(Path(version), Path(target), settings, root=Path(root_dir), digest=remembered(Path(state_dir)))
            )
        )
    except RunFailure as failure:
        hint = BASE_HINT if failure.kind is FailureKind.IDENTITY else failure.hint
        print(json.dumps({"error": failure.message, "hint": hint}))
        sys.exit(1)
