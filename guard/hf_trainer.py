"""Fingerprint a transformers Trainer from its attributes, without importing transformers or peft."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from .atomic import PathLike
from .digest import DigestCache, digest_model_files, digest_tokenizer_files
from .errors import NotFound
from .fingerprint import Fingerprint, fingerprint_dataset

# Fields of TrainingArguments that keep their name. Which of them are identity is said in `guard.components`.
_ARGUMENTS: Final = (
    *("num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs"),
    *("warmup_steps", "warmup_ratio", "weight_decay", "optim", "optim_args"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "seed", "data_seed"),
    *("label_smoothing_factor", "neftune_noise_alpha", "train_sampling_strategy", "group_by_length"),
    *("dataloader_drop_last", "ignore_data_skip", "average_tokens_across_devices"),
    *("use_liger_kernel", "torch_compile", "gradient_checkpointing"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "world_size"),
    *(
        "save_steps",
        "save_strategy",
        "save_total_limit",
        "logging_steps",
        "eval_steps",
        "dataloader_num_workers",
    ),
)
_PACKAGES: Final = ("torch", "transformers", "peft", "accelerate")


def fingerprint_trainer(
    trainer: Any,
    *,
    dataset_path: PathLike,
    extra: dict[str, Any] | None = None,
    cache: DigestCache | None = None,
) -> Fingerprint:
    """Dataset file, base model, adapter, training arguments and library versions of a transformers Trainer.

    The files of base model and tokenizer are digested when they were loaded from a folder; otherwise name
    and Hub commit stand for the model, and the chat template for the tokenizer. Not seen: how rows become tokens (max_length, packing, what carries loss) and losses of your
    own: name those in `extra`, for example `{"data.max_length": 2048}`. Raises what `fingerprint_dataset`
    raises.
    """
    components: dict[str, Any] = {
        **fingerprint_dataset(dataset_path).components(),
        "dataset.path": str(Path(dataset_path).absolute()),
        **_rows(trainer),
        **_model(trainer.model, cache),
        **_adapter(trainer.model),
        **_training(trainer.args),
        **_tokenizer(getattr(trainer, "processing_class", None), cache),
        **{f"versions.{name}": _major_minor(name) for name in _PACKAGES},
    }
    return Fingerprint({**components, **(extra or {})})


def _rows(trainer: Any) -> dict[str, Any]:
    try:
        return {"dataset.rows": len(trainer.train_dataset)}
    except TypeError:  # a stream has no length
        return {}


def _model(model: Any, cache: DigestCache | None) -> dict[str, Any]:
    config = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", "") or None
    found: dict[str, Any] = {
        "model.name": name,
        "model.revision": getattr(config, "_commit_hash", None),
        "training.attn_implementation": getattr(config, "_attn_implementation", None),
        "training.precision": str(getattr(model, "dtype", "")) or None,
    }
    if name is not None and Path(name).is_dir():
        with suppress(NotFound):  # a folder without weights: the name has to do
            found["model.digest"] = digest_model_files(name, cache)
    return found


def _tokenizer(tokenizer: Any, cache: DigestCache | None) -> dict[str, Any]:
    found: dict[str, Any] = {"tokenizer.chat_template": getattr(tokenizer, "chat_template", None)}
    name = getattr(tokenizer, "name_or_path", None)
    if name and Path(name).is_dir():
        with suppress(NotFound):
            found["tokenizer.digest"] = digest_tokenizer_files(name, cache)
    return found


def _adapter(model: Any) -> dict[str, Any]:
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict):
        return {}
    found: dict[str, Any] = {}
    for name, config in configs.items():
        section = "lora" if len(configs) == 1 else f"lora.{name}"
        found.update({f"{section}.{field}": value for field, value in config.to_dict().items()})
    return found


def _training(args: Any) -> dict[str, Any]:
    found = {f"training.{name}": getattr(args, name, None) for name in _ARGUMENTS}
    found["training.global_batch_size"] = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    autocast = next((name for name in ("bf16", "fp16") if getattr(args, name, False)), None)
    if autocast is not None:
        found["training.precision"] = f"{autocast} autocast"
    return found


def _major_minor(package: str) -> str | None:
    import importlib.metadata  # which brings e-mail's parser along, and few who import guard ask for it

    try:
        return ".".join(importlib.metadata.version(package).split(".")[:2])
    except importlib.metadata.PackageNotFoundError:
        return None
