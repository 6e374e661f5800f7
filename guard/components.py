"""What a run's fingerprint is made of: one table, in the order in which a person looks for what changed.

IDENTITY: the component changes what the run computes; checkpoints from before the change are stale. NOTE:
recorded for people; a change does not stop a resume. A note that names another component under `instead_of`
is identity for as long as that other one is not known. A name that is not in the table is identity: when
unsure, refuse.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class ComponentKind(StrEnum):
    """Whether a component's change makes checkpoints stale."""

    IDENTITY = "identity"
    NOTE = "note"


@dataclass(frozen=True, kw_only=True)
class Component:
    """One line of the table.

    `name` may end in `.*` to cover a whole section. `unordered`: the value is a set, whatever list holds it.
    """

    name: str
    kind: ComponentKind
    reason: str
    instead_of: str | None = None
    unordered: bool = False


def _identity(name: str, reason: str, *, unordered: bool = False) -> Component:
    return Component(name=name, kind=ComponentKind.IDENTITY, reason=reason, unordered=unordered)


def _note(name: str, reason: str, instead_of: str | None = None) -> Component:
    return Component(name=name, kind=ComponentKind.NOTE, reason=reason, instead_of=instead_of)


def _section_of(name: str) -> str:
    return name.partition(".")[0]


COMPONENTS: Final[tuple[Component, ...]] = (
    # -- the data
    _identity("dataset.digest", "other rows: the step counter of one dataset means nothing for another"),
    _identity("dataset.rows", "the rows kept decide how long an epoch is"),
    _identity("dataset.rows_trained", "of the rows kept, those that are neither held out nor without a trained token"),
    _note("dataset.name", "the same content under another name is the same dataset", instead_of="dataset.digest"),
    _note("dataset.size_bytes", "the digest says more"),
    _note("dataset.path", "the same content in another place is the same dataset"),
    _identity("split.held_out_fraction", "rows held out are not trained; another share moves every step"),
    _identity("split.seed", "another seed holds out other rows"),
    _identity("data.order_seed", "the resumed run skips rows by position: the order must be the same"),
    _identity("data.format", "decides which text of a row is trained"),
    _identity("data.columns", "decides which text of a row is trained"),
    _identity(
        "data.prompt_completion", "decides whether a prompt and its completion are turns or joined as they stand"
    ),
    _identity("data.train_on", "decides which tokens carry loss"),
    _identity("data.max_length", "decides where rows are cut or dropped"),
    _identity("data.truncation", "decides what happens to rows that are too long"),
    _identity("data.packing", "decides how rows share a sequence, and so how many steps there are"),
    _identity("data.tokens", "what the rows became, and which of it is learned: all that training sees of them"),
    _identity("replay.share", "how many rows of earlier datasets are trained beside the new ones"),
    _identity("replay.datasets", "rows of these earlier datasets are trained again", unordered=True),
    _identity("replay.digest", "those rows: others move every step"),
    # -- the models
    _identity("tokenizer.digest", "other token ids for the same text"),
    _identity("tokenizer.chat_template", "other token ids for the same conversation"),
    _note("model.name", "the weights decide, not what they are called", instead_of="model.digest"),
    _identity("model.digest", "an adapter fits the base weights it was trained on"),
    _identity("model.revision", "another commit on the Hub can hold other weights and code"),
    _note("parent.version", "the number of the version; its digest decides", instead_of="parent.digest"),
    _identity("parent.digest", "the weights that the run started from"),
    _identity("start_from", "the base model or the latest version: another starting point"),
    # -- the adapter: every field of peft's LoraConfig
    _identity("lora.r", "the shape of the adapter"),
    _identity("lora.lora_alpha", "scales the adapter; weights of one scale are wrong under another"),
    _identity("lora.lora_dropout", "changes the gradients"),
    _identity("lora.target_modules", "which layers have an adapter", unordered=True),
    _identity("lora.exclude_modules", "which layers have none", unordered=True),
    _identity("lora.target_parameters", "which parameters have an adapter", unordered=True),
    _identity("lora.modules_to_save", "which layers are trained in full", unordered=True),
    _identity("lora.trainable_token_indices", "which embeddings are trained"),
    _identity("lora.bias", "which biases are trained"),
    _identity("lora.lora_bias", "whether the adapter has a bias"),
    _identity("lora.use_rslora", "scales by alpha / sqrt(r) instead of alpha / r"),
    _identity("lora.use_dora", "adds a magnitude to every adapter"),
    _identity("lora.use_qalora", "pools the adapter's input"),
    _identity("lora.qalora_group_size", "the size of those pools"),
    _identity("lora.use_bdlora", "block-diagonal adapters"),
    _identity("lora.init_lora_weights", "where the adapter starts; some choices change the base weights too"),
    _identity("lora.layers_to_transform", "which layers have an adapter", unordered=True),
    _identity("lora.layers_pattern", "how those layers are found"),
    _identity("lora.rank_pattern", "the shape of single adapters"),
    _identity("lora.alpha_pattern", "the scale of single adapters"),
    _identity("lora.layer_replication", "repeats layers of the base model"),
    _identity("lora.fan_in_fan_out", "how a layer stores its weights"),
    _identity("lora.megatron_config", "another implementation of the layers"),
    _identity("lora.megatron_core", "another implementation of the layers"),
    _identity("lora.loftq_config", "how the base weights are quantized"),
    _identity("lora.eva_config", "how the adapter is initialised"),
    _identity("lora.corda_config", "how the adapter is initialised"),
    _identity("lora.lora_ga_config", "how the adapter is initialised"),
    _identity("lora.velora_config", "changes the backward pass"),
    _identity("lora.alora_invocation_tokens", "decides on which tokens the adapter acts"),
    _identity("lora.monteclora_config", "adds sampling to the adapter"),
    _identity("lora.arrow_config", "routes between adapters"),
    _identity("lora.kasa_config", "changes base weights and adapter"),
    _identity("lora.ensure_weight_tying", "whether adapters of tied layers are tied"),
    _identity("lora.task_type", "decides how the base model is wrapped"),
    _identity("lora.peft_type", "another kind of adapter"),
    _identity("lora.inference_mode", "whether the adapter is trained at all"),
    _note("lora.auto_mapping", "which class wrapped the model; the task type decides"),
    _note(
        "lora.base_model_name_or_path",
        "the weights decide, not what they are called",
        instead_of="model.digest",
    ),
    _note("lora.revision", "repeats model.revision", instead_of="model.revision"),
    _note("lora.peft_version", "repeats versions.peft"),
    _note("lora.runtime_config", "where the work is done, not what is computed"),
    # -- the steps
    _identity("training.global_batch_size", "the step counter counts global batches"),
    _note("training.per_device_train_batch_size", "a factor of the global batch", "training.global_batch_size"),
    _note("training.gradient_accumulation_steps", "a factor of the global batch", "training.global_batch_size"),
    _note("training.world_size", "a factor of the global batch", "training.global_batch_size"),
    _identity("training.num_train_epochs", "the length of the run, and with it the schedule"),
    _identity("training.max_steps", "the length of the run, and with it the schedule"),
    _identity("training.total_steps", "the length of the run, and with it the schedule"),
    # On resume the Trainer takes the next nine from the checkpoint and ignores what was asked for, in
    # silence.
    _identity("training.learning_rate", "the checkpoint's value would win in silence"),
    _identity("training.lr_scheduler_type", "the checkpoint's schedule would win in silence"),
    _identity("training.lr_scheduler_kwargs", "the checkpoint's schedule would win in silence"),
    _identity("training.warmup_steps", "moves every later learning rate"),
    _identity("training.warmup_ratio", "moves every later learning rate"),
    _identity("training.weight_decay", "the checkpoint's value would win in silence"),
    _identity("training.optim", "another optimizer cannot use this one's state"),
    _identity("training.optim_args", "another optimizer cannot use this one's state"),
    _identity("training.adam_beta1", "the checkpoint's value would win in silence"),
    _identity("training.adam_beta2", "the checkpoint's value would win in silence"),
    _identity("training.adam_epsilon", "the checkpoint's value would win in silence"),
    _identity("training.max_grad_norm", "changes every step whose gradient is clipped"),
    _identity("training.seed", "dropout and initialisation"),
    _identity("training.data_seed", "the order of the rows"),
    _identity("training.precision", "other arithmetic"),
    _identity("training.attn_implementation", "other arithmetic"),
    _identity("training.loss", "another loss or reduction is another run"),
    _identity("training.label_smoothing_factor", "another loss is another run"),
    _identity("training.neftune_noise_alpha", "adds noise to the embeddings"),
    _identity("training.group_by_length", "the order of the rows"),
    _identity("training.train_sampling_strategy", "the order of the rows"),
    _identity("training.ignore_data_skip", "a resumed run would begin the rows anew"),
    _identity("training.average_tokens_across_devices", "how the loss of a batch is averaged"),
    _identity("training.use_liger_kernel", "other arithmetic"),
    _identity("training.torch_compile", "other arithmetic"),
    _identity("training.dataloader_drop_last", "the number of steps of an epoch"),
    # -- which step's weights the run ends with, where evaluations decide it
    _identity("selection.eval_steps", "the steps among which the best is chosen"),
    _identity("selection.load_best_model_at_end", "whether the run ends with the best weights or the last"),
    _identity("selection.early_stopping_patience", "when the run ends"),
    _identity("selection.early_stopping_threshold", "when the run ends"),
    _identity("selection.held_out", "the rows by which the best is chosen"),
    # -- the software (major.minor)
    _identity("versions.torch", "kernels and random numbers change between minor versions"),
    _identity("versions.transformers", "the training loop and the checkpoint's form change"),
    _identity("versions.peft", "the adapter's form changes"),
    _identity("versions.dropforge", "how rows become tokens, and the order of steps, may change"),
    _note("versions.accelerate", "carries out what transformers decides"),
    _note("versions.python", "carries out what the libraries decide"),
    # -- notes
    _note("training.save_steps", "when it is saved does not change what is computed"),
    _note("training.save_strategy", "when it is saved does not change what is computed"),
    _note("training.save_total_limit", "what is kept does not change what is computed"),
    _note("training.logging_steps", "what is logged does not change what is computed"),
    _note("training.eval_steps", "evaluation does not train"),
    _note("training.gradient_checkpointing", "trades memory for time; the gradients are the same"),
    _note("training.dataloader_num_workers", "who loads the rows does not change their order"),
    _note("attempt.*", "who runs it, where and when"),
)

_BY_NAME: Final = {component.name: component for component in COMPONENTS}
_POSITION: Final = {component.name: index for index, component in enumerate(COMPONENTS)}
# Where the last component of each section stands: names that the table does not know follow it.
_SECTION_END: Final = {_section_of(component.name): index for index, component in enumerate(COMPONENTS)}


def component_of(name: str) -> Component:
    """Return the table's line for a name; identity for an unknown one."""
    known = _BY_NAME.get(name) or _BY_NAME.get(f"{_section_of(name)}.*")
    return known or _identity(name, "not in the table: when unsure, refuse")


def reading_order(name: str) -> tuple[int, str]:
    """Sort key: the table's order.

    A name that it does not know comes after its section, or at the end.
    """
    if name in _POSITION:
        return _POSITION[name], ""
    return _SECTION_END.get(_section_of(name), len(COMPONENTS)), name
