"""The base model with its adapter: a new LoRA, or the current version's, continued.

Weights are read from safetensors only and no model's own code is run. There is exactly one place that adds an adapter, and
it refuses a model that has one: a second adapter would start from zero and look like success.
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

from daemon.base_identity import BaseModel
from daemon.job import FailureKind
from daemon.recipe import LoraSettings, ModelSettings
from daemon.trainer.errors import RunFailure

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Of a saved configuration: its name and origin, and what a run may change.
IGNORED_FIELDS = frozenset(
    {
        *{"task_type", "base_model_name_or_path", "revision", "peft_version", "inference_mode", "auto_mapping"},
        *{"peft_type", "lora_dropout"},
    }
)
REQUIRED_FIELDS = frozenset({"r", "lora_alpha", "bias"})


def precision_of(model: ModelSettings) -> str:
    """Name the precision of the frozen base weights: "float32" or "bfloat16"; with load_in_4bit "nf4" and the compute dtype."""
    return f"nf4, {compute_dtype(model)}" if model.load_in_4bit else compute_dtype(model)


def compute_dtype(model: ModelSettings) -> str:
    """Return the dtype that is computed in: "float32" or "bfloat16"."""
    if model.dtype != "auto":
        return model.dtype
    # Emulated, as on GPUs before Ampere, bfloat16 is slower than float32.
    supported = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if supported else "float32"


def resolve_attention(base: BaseModel, model: ModelSettings) -> str:
    """Name the attention kernel; "auto" is "sdpa" where the architecture has it, else "eager", as Gemma 2 needs.

    Raises RunFailure(CONFIG).
    """
    if model.attn_implementation != "auto":
        return model.attn_implementation
    try:
        build_without_weights(base, "sdpa")
    except (OSError, ValueError, ImportError):
        with report_load_errors(base):
            build_without_weights(base, "eager")
        return "eager"
    return "sdpa"


def build_without_weights(base: BaseModel, attention: str) -> Any:
    """Build the base model on the meta device: all its layers, no memory."""
    config = AutoConfig.from_pretrained(base.path, trust_remote_code=False, local_files_only=True)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention, trust_remote_code=False)


def load_model(base: BaseModel, model: ModelSettings, lora: LoraSettings, parent: Path | None) -> PeftModel:
    """Load the base model with a trainable adapter "default": `parent`'s weights, or a fresh one with lora_B = 0.

    Raises RunFailure(CONFIG) when the parent's shape is not the recipe's, or not one for this base model.
    """
    if parent is not None:
        require_same_shape(parent, lora, base)
    network = load_network(base, model, dtype=getattr(torch, compute_dtype(model)))
    if model.load_in_4bit:
        # Norms and the head in float32, as QLoRA has them; gradient checkpointing is decided elsewhere.
        network = prepare_model_for_kbit_training(network, use_gradient_checkpointing=False)
    network.config.use_cache = False
    network.name_or_path = base.reference  # peft writes this into the adapter; it would be the folder of the cache
    config = lora_config(lora, base)
    if parent is not None:
        return load_adapter(network, parent, config, trainable=True)
    with _report_adapter_errors(base):
        return get_peft_model(network, config)


def load_adapter(network: Any, folder: Path, config: LoraConfig, *, trainable: bool = False) -> PeftModel:
    """Load the weights in `folder` under `config`; the configuration saved there is not read.

    Raises RunFailure(CONFIG) when there are none in safetensors: peft would load a pickled file; RunFailure(IDENTITY) when
    they have other shapes than the base model's layers.
    """
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise RunFailure(
            FailureKind.CONFIG,
            f"{folder.name} has no {ADAPTER_WEIGHTS}",
            hint="pickled weights are never loaded; go back to another version (`dropforge versions` lists them)",
        )
    config.inference_mode = not trainable
    try:
        return PeftModel.from_pretrained(network, folder, config=config, is_trainable=trainable, local_files_only=True)
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        raise RunFailure(
            FailureKind.IDENTITY,
            f"version {folder.name} does not fit the base model {config.base_model_name_or_path}: layers have other shapes",
            hint='put back the base that it was trained on, or set start_from = "base" under [training]',
        ) from error


def saved_config(folder: Path, base: BaseModel) -> LoraConfig:
    """Return the configuration, from our own settings, of which peft makes what is saved in `folder`.

    Raises RunFailure(CONFIG) when there is none.
    """
    saved = json.loads((folder / ADAPTER_CONFIG).read_bytes())
    settings = LoraSettings.model_validate({name: saved[name] for name in LoraSettings.model_fields if saved.get(name)})
    all_linear = settings.model_copy(update={"target_modules": "all-linear"})  # saved as a list of layers
    with suppress(RunFailure):
        require_same_shape(folder, all_linear, base)
        return lora_config(all_linear, base)
    require_same_shape(folder, settings, base)
    return lora_config(settings, base)


def load_network(base: BaseModel, model: ModelSettings, *, dtype: torch.dtype) -> Any:
    """Load the base model alone, from safetensors. Raises RunFailure(BASE)."""
    options: dict[str, Any] = {"quantization_config": _four_bits(dtype)} if model.load_in_4bit else {}
    attention = resolve_attention(base, model)
    with report_load_errors(base):
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
            FailureKind.BASE,
            f"the base model in {base.path} carries an adapter already",
            hint="point model_name_or_path at a plain base model",
        )
    return network


@contextmanager
def report_load_errors(base: BaseModel) -> Iterator[None]:
    """Report an error with the base model's files as RunFailure(BASE)."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        raise RunFailure(
            FailureKind.BASE,
            f"cannot load the base model in {base.path}: {error}",
            hint="fetch the model again, or look at attn_implementation under [model]",
        ) from error


@contextmanager
def _report_adapter_errors(base: BaseModel) -> Iterator[None]:
    """Report an adapter that the base model cannot have as RunFailure(CONFIG)."""
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
    """Return peft's configuration from our own settings, field by field; never from a saved or dropped file."""
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


def require_same_shape(parent: Path, lora: LoraSettings, base: BaseModel) -> None:
    """Raise RunFailure(CONFIG), naming both shapes and the two ways out, unless `parent` has the recipe's shape.

    All that is saved must be what peft makes of the recipe on this base: a field that no setting stands for was not
    requested by the user.
    """
    saved = json.loads((parent / ADAPTER_CONFIG).read_bytes())
    made = resolved_config(lora, base).to_dict()
    expected = {name: _comparable(value) for name, value in made.items() if name not in IGNORED_FIELDS}
    expected["peft_type"] = "LORA"
    actual = {
        name: _comparable(saved.get(name, None if name in REQUIRED_FIELDS else expected[name])) for name in expected
    }
    if actual != expected:
        different = ", ".join(
            f"{name} {actual[name]} -> {expected[name]}" for name in expected if actual[name] != expected[name]
        )
        raise RunFailure(
            FailureKind.CONFIG,
            f"the recipe's LoRA cannot continue version {parent.name}: {different}",
            hint='set [lora] back to the version\'s shape, or start_from = "base" under [training] for a new adapter',
        )


def resolved_config(lora: LoraSettings, base: BaseModel) -> LoraConfig:
    """Return `lora_config` as peft leaves it once applied: layers by name, and what an architecture needs besides.

    Experts of a mixture, for example, are tensors rather than layers, and have fields of their own. Raises
    RunFailure(CONFIG).
    """
    config = lora_config(lora, base)
    with report_load_errors(base):
        network = build_without_weights(base, "eager")
    with torch.device("meta"), _report_adapter_errors(base):
        get_peft_model(network, config)
    return config


def adapter_tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    """Return the trainable tensors by name; not copies."""
    return {name: tensor.detach() for name, tensor in model.named_parameters() if tensor.requires_grad}


def lora_b_norm(model: PeftModel) -> float:
    """Return the Frobenius norm over all lora_B; 0 means that the adapter does nothing."""
    squares = [
        float(tensor.double().pow(2).sum()) for name, tensor in adapter_tensors(model).items() if "lora_B" in name
    ]
    return math.sqrt(sum(squares))


def all_finite(model: PeftModel) -> bool:
    """Return whether no trainable weight is NaN or infinite."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in adapter_tensors(model).values())


def _whole(value: float) -> float | int:
    """Return 32 for 32.0: peft writes and compares integers."""
    return int(value) if float(value).is_integer() else value


def _comparable(value: Any) -> Any:
    return sorted(value) if isinstance(value, list | set | tuple) else value
