"""The base model with its adapter: a new LoRA, or the current version's, continued.

Weights are read from safetensors only and no model's own code is run. There is exactly one place that adds an adapter, and
it refuses a model that has one: a second adapter would start again from nothing and look like success.
"""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from daemon.job import FailureKind
from daemon.recipe import LoraSettings, ModelSettings
from daemon.trainer.base import BaseModel
from daemon.trainer.failure import RunFailure

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Of a saved configuration: what it was called and where it came from, which decides nothing here.
FREE_FIELDS = frozenset(
    {"task_type", "base_model_name_or_path", "revision", "peft_version", "inference_mode", "auto_mapping", "peft_type"}
)
NAMED_FIELDS = frozenset({"r", "lora_alpha", "bias"})


def precision_of(model: ModelSettings) -> str:
    """The frozen base weights: "float32" or "bfloat16"; with load_in_4bit "nf4", and the one that is computed in."""
    return f"nf4, {compute_dtype(model)}" if model.load_in_4bit else compute_dtype(model)


def compute_dtype(model: ModelSettings) -> str:
    """What is computed in: "float32" or "bfloat16"."""
    if model.dtype != "auto":
        return model.dtype
    # Emulated, as on GPUs before Ampere, it is slower than float32.
    has_it = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if has_it else "float32"


def load_tokenizer(base: BaseModel) -> Any:
    """The base model's tokenizer; its padding token is set (to EOS where it has none)."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(base.path, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        raise RunFailure(
            FailureKind.CONFIG,
            f"the base model in {base.path} has no usable tokenizer: {error}",
            hint="fetch the model again, tokenizer.json included",
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(base: BaseModel, model: ModelSettings, lora: LoraSettings, parent: Path | None) -> PeftModel:
    """Base model plus a trainable adapter named "default": `parent`'s weights, or a fresh one with lora_B = 0.

    Raises RunFailure(CONFIG) when the parent's shape is not the recipe's.
    """
    if parent is not None:
        refuse_other_shape(parent, lora)
    network = load_network(base, model, dtype=getattr(torch, compute_dtype(model)))
    if model.load_in_4bit:
        # Norms and the head in float32, as QLoRA has them; gradient checkpointing stays our own decision.
        network = prepare_model_for_kbit_training(network, use_gradient_checkpointing=False)
    network.config.use_cache = False
    network.name_or_path = base.reference  # peft writes this into the adapter; it would be the cache's folder
    config = lora_config(lora, base)
    if parent is None:
        return get_peft_model(network, config)
    return load_adapter(network, parent, config, trainable=True)


def load_adapter(network: Any, folder: Path, config: LoraConfig, *, trainable: bool = False) -> PeftModel:
    """The weights in `folder` under our own configuration; peft does not get to see the one that lies there.

    Raises RunFailure(CONFIG) where there are none in safetensors: peft would go on to a pickled file.
    """
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise RunFailure(
            FailureKind.CONFIG,
            f"{folder.name} has no {ADAPTER_WEIGHTS}",
            hint="pickled weights are never loaded; `dropforge versions` lists what else there is to go back to",
        )
    config.inference_mode = not trainable
    return PeftModel.from_pretrained(network, folder, config=config, is_trainable=trainable, local_files_only=True)


def saved_shape(folder: Path) -> LoraSettings:
    """The shape of a saved adapter, as far as our settings know shapes. Raises RunFailure(CONFIG) when they do not."""
    saved = json.loads((folder / ADAPTER_CONFIG).read_bytes())
    lora = LoraSettings.model_validate({name: saved[name] for name in LoraSettings.model_fields if saved.get(name)})
    refuse_other_shape(folder, lora)
    return lora


def load_network(base: BaseModel, model: ModelSettings, *, dtype: torch.dtype) -> Any:
    """The base model alone, from safetensors. Raises RunFailure(CONFIG)."""
    options: dict[str, Any] = {"quantization_config": _four_bits(dtype)} if model.load_in_4bit else {}
    try:
        network = AutoModelForCausalLM.from_pretrained(
            base.path,
            dtype=dtype,
            attn_implementation=model.attn_implementation,
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            **options,
        )
    except (OSError, ValueError, ImportError) as error:
        raise RunFailure(
            FailureKind.CONFIG, f"cannot load the base model in {base.path}: {error}", hint="fetch the model again"
        ) from error
    if getattr(network, "peft_config", None):
        raise RunFailure(
            FailureKind.CONFIG,
            f"the base model in {base.path} carries an adapter already",
            hint="point model_name_or_path at a plain base model",
        )
    return network


def _four_bits(dtype: torch.dtype) -> BitsAndBytesConfig:
    if not torch.cuda.is_available() or find_spec("bitsandbytes") is None:
        missing = "a CUDA device" if find_spec("bitsandbytes") else "bitsandbytes"
        raise RunFailure(
            FailureKind.CONFIG,
            f"load_in_4bit needs {missing}",
            hint="`pip install 'dropforge[gpu]'` on a machine with a GPU, or load_in_4bit = false under [model]",
        )
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def lora_config(lora: LoraSettings, base: BaseModel) -> LoraConfig:
    """peft's configuration from our own settings, field by field; never from a file that was found or dropped."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base.reference,
        revision=base.revision,
        r=lora.r,
        lora_alpha=_whole(lora.lora_alpha),
        lora_dropout=lora.lora_dropout,
        target_modules=lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules),
        modules_to_save=list(lora.modules_to_save) or None,
        bias=lora.bias,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
    )


def refuse_other_shape(parent: Path, lora: LoraSettings) -> None:
    """Raise RunFailure(CONFIG), naming both shapes and the two ways out, unless `parent` has the recipe's shape."""
    saved = json.loads((parent / ADAPTER_CONFIG).read_bytes())
    wanted: dict[str, Any] = {
        "r": lora.r,
        "lora_alpha": _whole(lora.lora_alpha),
        "bias": lora.bias,
        "use_rslora": lora.use_rslora,
        "use_dora": lora.use_dora,
        "modules_to_save": sorted(lora.modules_to_save) or None,
    }
    # peft resolves "all-linear" to names when it saves, so only an explicit list can be compared.
    if not isinstance(lora.target_modules, str):
        wanted["target_modules"] = sorted(lora.target_modules)
    # Whatever else it says must be what peft itself would say: settings that we do not know are nobody's wish.
    ours = {*LoraSettings.model_fields, *FREE_FIELDS}
    wanted |= {name: _comparable(value) for name, value in LoraConfig().to_dict().items() if name not in ours}
    wanted["peft_type"] = "LORA"
    found = {name: _comparable(saved.get(name, wanted[name] if name not in NAMED_FIELDS else None)) for name in wanted}
    if found != wanted:
        different = ", ".join(
            f"{name} {found[name]} -> {wanted[name]}" for name in wanted if found[name] != wanted[name]
        )
        raise RunFailure(
            FailureKind.CONFIG,
            f"the recipe's LoRA cannot continue version {parent.name}: {different}",
            hint='set [lora] back to the version\'s shape, or start_from = "base" under [training] for a new adapter',
        )


def adapter_tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    """Name to trainable tensor, as it is now (no copy)."""
    return {name: tensor.detach() for name, tensor in model.named_parameters() if tensor.requires_grad}


def lora_b_norm(model: PeftModel) -> float:
    """Frobenius norm over all lora_B; 0 means that the adapter does nothing."""
    squares = [
        float(tensor.double().pow(2).sum()) for name, tensor in adapter_tensors(model).items() if "lora_B" in name
    ]
    return math.sqrt(sum(squares))


def all_finite(model: PeftModel) -> bool:
    """Whether no trainable weight is NaN or infinite."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in adapter_tensors(model).values())


def _whole(value: float) -> float | int:
    """32 rather than 32.0: peft writes and compares integers."""
    return int(value) if float(value).is_integer() else value


def _comparable(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value
