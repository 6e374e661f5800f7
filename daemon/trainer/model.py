"""The base model with its adapter: a new LoRA, or the current version's, continued.

Weights are read from safetensors only and no model's own code is run. There is exactly one place that adds an adapter, and
it refuses a model that has one: a second adapter would start again from nothing and look like success.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from daemon.job import FailureKind
from daemon.recipe import LoraSettings, ModelSettings
from daemon.trainer.base_model import BaseModel
from daemon.trainer.errors import RunFailure

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Of a saved configuration: what it was called and where it came from, which decides nothing here.
FREE_FIELDS = frozenset(
    {
        *{"task_type", "base_model_name_or_path", "revision", "peft_version", "inference_mode", "auto_mapping"},
        *{"peft_type", "lora_dropout"},
    }
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


def attention_of(base: BaseModel, model: ModelSettings) -> str:
    """The attention kernel by name: of "auto", "sdpa" where the architecture has it, else "eager", as Gemma 2 needs.

    Raises RunFailure(CONFIG).
    """
    if model.attn_implementation != "auto":
        return model.attn_implementation
    try:
        architecture(base, "sdpa")
    except (OSError, ValueError, ImportError):
        with readable(base):
            architecture(base, "eager")
        return "eager"
    return "sdpa"


def architecture(base: BaseModel, attention: str) -> Any:
    """The base model without its weights."""
    config = AutoConfig.from_pretrained(base.path, trust_remote_code=False, local_files_only=True)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention, trust_remote_code=False)


def load_model(base: BaseModel, model: ModelSettings, lora: LoraSettings, parent: Path | None) -> PeftModel:
    """Base model plus a trainable adapter named "default": `parent`'s weights, or a fresh one with lora_B = 0.

    Raises RunFailure(CONFIG) when the parent's shape is not the recipe's, or not one for this base model.
    """
    if parent is not None:
        refuse_other_shape(parent, lora, base)
    network = load_network(base, model, dtype=getattr(torch, compute_dtype(model)))
    if model.load_in_4bit:
        # Norms and the head in float32, as QLoRA has them; gradient checkpointing stays our own decision.
        network = prepare_model_for_kbit_training(network, use_gradient_checkpointing=False)
    network.config.use_cache = False
    network.name_or_path = base.reference  # peft writes this into the adapter; it would be the cache's folder
    config = lora_config(lora, base)
    if parent is not None:
        return load_adapter(network, parent, config, trainable=True)
    with _takes_adapter(base):
        return get_peft_model(network, config)


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


def saved_config(folder: Path, base: BaseModel) -> LoraConfig:
    """Our own configuration of which peft makes what is saved in `folder`. Raises RunFailure(CONFIG) when none does."""
    saved = json.loads((folder / ADAPTER_CONFIG).read_bytes())
    named = LoraSettings.model_validate({name: saved[name] for name in LoraSettings.model_fields if saved.get(name)})
    every = named.model_copy(update={"target_modules": "all-linear"})  # what that comes to is saved layer by layer
    with suppress(RunFailure):
        refuse_other_shape(folder, every, base)
        return lora_config(every, base)
    refuse_other_shape(folder, named, base)
    return lora_config(named, base)


def load_network(base: BaseModel, model: ModelSettings, *, dtype: torch.dtype) -> Any:
    """The base model alone, from safetensors. Raises RunFailure(CONFIG)."""
    options: dict[str, Any] = {"quantization_config": _four_bits(dtype)} if model.load_in_4bit else {}
    attention = attention_of(base, model)
    with readable(base):
        network = AutoModelForCausalLM.from_pretrained(
            base.path,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            **options,
        )
    if getattr(network, "peft_config", None):
        raise RunFailure(
            FailureKind.CONFIG,
            f"the base model in {base.path} carries an adapter already",
            hint="point model_name_or_path at a plain base model",
        )
    return network


@contextmanager
def readable(base: BaseModel) -> Iterator[None]:
    """Whatever goes wrong with the base model's files in here is RunFailure(CONFIG)."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        raise RunFailure(
            FailureKind.CONFIG,
            f"cannot load the base model in {base.path}: {error}",
            hint="fetch the model again, or look at attn_implementation under [model]",
        ) from error


@contextmanager
def _takes_adapter(base: BaseModel) -> Iterator[None]:
    try:
        yield
    except ValueError as error:  # layers that the architecture does not have, or that peft refuses
        raise RunFailure(
            FailureKind.CONFIG,
            f"the base model {base.name} cannot have this adapter: {error}",
            hint="name layers of the base model in target_modules and modules_to_save under [lora]",
        ) from error


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


def refuse_other_shape(parent: Path, lora: LoraSettings, base: BaseModel) -> None:
    """Raise RunFailure(CONFIG), naming both shapes and the two ways out, unless `parent` has the recipe's shape.

    Whatever it says must be what peft makes of our own settings on this base: settings that we do not know are nobody's
    wish.
    """
    saved = json.loads((parent / ADAPTER_CONFIG).read_bytes())
    made = resolved_config(lora, base).to_dict()
    wanted = {name: _comparable(value) for name, value in made.items() if name not in FREE_FIELDS}
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


def resolved_config(lora: LoraSettings, base: BaseModel) -> LoraConfig:
    """`lora_config` as peft leaves it once it has been applied: layers by name, and what an architecture needs besides.

    Experts of a mixture, for example, are tensors rather than layers, and have fields of their own. Raises
    RunFailure(CONFIG).
    """
    config = lora_config(lora, base)
    with readable(base):
        network = architecture(base, "eager")
    with torch.device("meta"), _takes_adapter(base):
        get_peft_model(network, config)
    return config


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
    return sorted(value) if isinstance(value, list | set | tuple) else value
