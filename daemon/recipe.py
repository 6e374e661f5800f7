"""The recipe: the part of the settings that decides what a run computes.

Names are those of transformers and peft wherever they have one. A sidecar may override some of it for one dataset, and
nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from daemon.errors import ConfigError
from daemon.setting_names import explain

SIDECAR_TABLES = ("training", "lora", "data", "replay")
SIDECAR_CONTENT = "priority, force, [training], [lora], [data] and [replay]"
# What a dropped file has no say in: it is about this machine, or keeps one file from harming the daemon.
NOT_FOR_ONE_DATASET: Mapping[str, frozenset[str]] = {
    "training": frozenset({"num_processes", "report_to", "save_total_limit"}),
    "data": frozenset({"max_line_bytes", "max_expansion", "render_seconds"}),
    "replay": frozenset({"min_rows", "max_share", "memory_rows", "memory_bytes", "keep_deleted"}),
}
# What a dropped file may raise and not lower: it has no say in whether it is measured.
ONLY_UPWARDS = (("data", "held_out_min_rows"),)

# They decide together which step's weights a run ends with.
SELECTION_SETTINGS = ("eval_steps", "load_best_model_at_end", "early_stopping_patience", "early_stopping_threshold")

MOST = 10**9  # of anything that is counted or measured here: what is beyond is a slip, and overflows somewhere
PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1, le=MOST)]
Amount = Annotated[float, Field(gt=0, le=MOST)]


class Section(BaseModel):
    """A table of the configuration; unknown keys are errors, values do not change."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _empty_means_unset(cls, values: Any) -> Any:
        """TOML has no null: an empty string stands for it where null is the default."""
        if not isinstance(values, Mapping):
            return values
        unset = {name for name, field in cls.model_fields.items() if field.default is None}
        return {name: None if value == "" and name in unset else value for name, value in values.items()}

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """`r = true` would count as 1."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and bool not in {annotation, *get_args(annotation)}:
            raise ValueError("true and false are no value for it")
        return value


class ModelSettings(Section):
    """`[model]`: what the adapters are trained on."""

    model_name_or_path: str = Field("", description="A local folder or a Hub id of the base model.")
    revision: str | None = Field(None, description="Hub revision; a commit is safest.")
    allow_downloads: bool = Field(False, description="May fetch the base model from the Hub when it is missing.")
    allow_template_change: bool = Field(
        False, description="Continue a version that was trained with another chat template of the same base model."
    )
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto", description="Attention kernel; auto is sdpa where the architecture has it, else eager."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Of the frozen base weights; auto is bfloat16 where the device has it, else float32.",
    )
    load_in_4bit: bool = Field(False, description="QLoRA: base weights in NF4; needs CUDA and `dropforge[gpu]`.")


class TrainingSettings(Section):
    """`[training]`: batch arithmetic, schedule, optimizer. May be overridden by a sidecar."""

    start_from: Literal["latest", "base"] = Field(
        "latest", description="Continue the current version's weights, or start a new adapter on the base."
    )
    num_train_epochs: Amount = Field(1.0, description="Passes over the data.")
    max_steps: int = Field(-1, ge=-1, le=MOST, description="Stop after so many steps; -1: as the epochs say.")
    per_device_train_batch_size: Count = Field(
        4, description="Rows of max_length that fit one forward pass on one device; of shorter rows, as many tokens."
    )
    gradient_accumulation_steps: Count = Field(
        2, description="A step has this times per_device_train_batch_size times num_processes rows."
    )
    num_processes: PositiveInt = Field(1, description="Processes (one a GPU) that share each step.")
    train_sampling_strategy: Literal["group_by_length", "random"] = Field(
        "group_by_length", description="Rows of similar length share a step's parts, or rows at random."
    )
    learning_rate: PositiveFloat = Field(2e-4, description="Peak learning rate.")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        "cosine", description="Shape of the schedule."
    )
    warmup_steps: float = Field(
        0.03, ge=0, le=MOST, description="Steps of linear warm-up; below 1: a share of all steps."
    )
    weight_decay: float = Field(0.0, ge=0, le=MOST, description="AdamW weight decay.")
    max_grad_norm: float = Field(1.0, ge=0, le=MOST, description="Gradient clipping; 0: none.")
    optim: Literal["adamw_torch", "adamw_torch_fused"] = Field(
        "adamw_torch_fused", description="Optimizer, by its name in transformers."
    )
    seed: int = Field(42, ge=0, lt=2**32, description="Of weights, dropout and data order.")
    gradient_checkpointing: bool | Literal["auto"] = Field(
        "auto", description="Trade speed for memory; auto: only when it would run out."
    )
    use_liger_kernel: bool = Field(False, description="Fused kernels of `dropforge[gpu]`.")
    torch_compile: bool = Field(False, description="Compile the model; pays in runs of thousands of steps only.")
    eval_steps: float = Field(
        0,
        ge=0,
        le=MOST,
        description="Steps between evaluations of the held-out rows; below 1: a share of all steps; 0: before and after only.",
    )
    load_best_model_at_end: bool = Field(
        False, description="End with the weights of the evaluation with the lowest loss, not of the last step."
    )
    early_stopping_patience: int = Field(
        0, ge=0, le=MOST, description="Stop after so many evaluations in a row without a lower loss; 0: never."
    )
    early_stopping_threshold: float = Field(
        0.0, ge=0, le=MOST, description="By how much the loss must be lower to count, in nats a token."
    )
    save_steps: Count = Field(100, description="Steps between sealed checkpoints.")
    save_total_limit: PositiveInt = Field(2, description="Checkpoints of a run that are kept.")
    logging_steps: Count = Field(
        10, description="Steps between logged losses; a run of few steps logs at least 20 times."
    )
    report_to: tuple[str, ...] = Field((), description="Further trackers, by their names in transformers.")

    @property
    def selects(self) -> bool:
        """Whether evaluations during the run change what it ends with."""
        return self.eval_steps > 0 and (self.load_best_model_at_end or self.early_stopping_patience > 0)

    @model_validator(mode="after")
    def _evaluated(self) -> TrainingSettings:
        if self.eval_steps > 1 and not self.eval_steps.is_integer():
            raise ValueError("eval_steps is a whole number of steps, or below 1 a share of all steps")
        if not self.eval_steps and (self.load_best_model_at_end or self.early_stopping_patience):
            asks = "load_best_model_at_end" if self.load_best_model_at_end else "early_stopping_patience"
            raise ValueError(f"{asks} needs evaluations during the run: set eval_steps")
        return self


class LoraSettings(Section):
    """`[lora]`: shape of the adapter. May be overridden by a sidecar."""

    r: Count = Field(16, description="Rank.")
    lora_alpha: Amount = Field(32, description="Scale; the update is multiplied by lora_alpha / r.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    target_modules: str | tuple[str, ...] = Field("all-linear", description="Modules that get an adapter.")
    modules_to_save: tuple[str, ...] = Field((), description="Modules that are trained and saved in full.")
    bias: Literal["none", "all", "lora_only"] = Field("none", description="Which biases are trained.")
    use_rslora: bool = Field(False, description="Scale by lora_alpha / sqrt(r).")
    use_dora: bool = Field(False, description="Weight-decomposed LoRA.")


class ColumnSettings(Section):
    """`[data.columns]`: which columns of a flat file are what; `prompt` and `completion`, or `text` alone."""

    prompt: str | None = Field(None, description="Column that is the prompt; it gets no loss.")
    completion: str | None = Field(None, description="Column that is trained as the answer.")
    text: str | None = Field(None, description="Column that is trained as a whole.")

    @model_validator(mode="after")
    def _one_way(self) -> ColumnSettings:
        if (self.prompt is None) is not (self.completion is None):
            raise ValueError("prompt and completion are set together")
        if self.text is not None and self.prompt is not None:
            raise ValueError("set prompt and completion, or text, not both")
        return self


class DataSettings(Section):
    """`[data]`: how rows become tokens. May be overridden by a sidecar."""

    max_length: Count = Field(2048, description="Tokens a row; of longer rows the trained part is kept.")
    train_on: Literal["auto", "completion", "assistant", "last_turn", "all"] = Field(
        "auto",
        description="Tokens that get a loss; auto: the completion, the assistant's turns, or all of a text.",
    )
    prompt_completion: Literal["as_is", "chat"] = Field(
        "as_is",
        description="Rows of a text prompt and completion (also by columns): joined as they stand, or made a user's and"
        " an assistant's turn.",
    )
    render_seconds: PositiveFloat = Field(10.0, description="Time limit for turning one row into tokens.")
    held_out_fraction: float = Field(0.02, ge=0, lt=1, description="Share of rows, by content, never trained.")
    held_out_min_rows: int = Field(
        40,
        ge=0,
        le=MOST,
        description="At least so many rows are held out, but at most a fifth of the file; none of one with fewer than 25.",
    )
    held_out_max_rows: int = Field(256, ge=0, le=MOST, description="Upper bound on held-out rows.")
    on_bad_rows: Literal["reject", "skip"] = Field("reject", description="Refuse the file, or leave bad rows out.")
    max_bad_fraction: float = Field(0.01, ge=0, le=1, description="Under skip: more bad rows refuse the file.")
    max_line_bytes: PositiveInt = Field(16 * 2**20, description="Longest line that is read.")
    max_expansion: float = Field(
        100.0, ge=1, description="A .gz or .zst may expand to so many times its size (and always to 64 MiB)."
    )
    columns: ColumnSettings = Field(ColumnSettings(), description="Columns of files in no known format.")


class ReplaySettings(Section):
    """`[replay]`: rows of earlier datasets that are trained again beside a new one's, so that they are not forgotten."""

    share: float = Field(
        0.1, ge=0, lt=1, description="Of all trained tokens, those of earlier datasets' rows; 0: none are rehearsed."
    )
    min_rows: int = Field(16, ge=0, description="At least so many rows of each earlier dataset, within max_share.")
    max_share: float = Field(0.25, ge=0, lt=1, description="Of small files: the share up to which min_rows may lead.")
    supersedes: tuple[str, ...] = Field(
        (), description="Names of earlier files that this one replaces: what does not come again is rehearsed no more."
    )
    memory_rows: int = Field(1000, ge=0, description="Rows of each dataset that are kept for later.")
    memory_bytes: int = Field(
        256 * 2**20, ge=0, description="Bytes of all kept rows; datasets share them equally, larger ones shrink first."
    )
    keep_deleted: bool = Field(False, description="Also of files that [inbox] on_success or keep_done_days deletes.")

    @model_validator(mode="after")
    def _bounds(self) -> ReplaySettings:
        if self.share > self.max_share:
            raise ValueError(f"share is at most max_share = {self.max_share:g}")
        return self


class Recipe(Section):
    """Everything besides the data that decides what a run computes."""

    model: ModelSettings = ModelSettings()
    training: TrainingSettings = TrainingSettings()
    lora: LoraSettings = LoraSettings()
    data: DataSettings = DataSettings()
    replay: ReplaySettings = ReplaySettings()

    def with_overrides(self, overrides: Mapping[str, Any]) -> Recipe:
        """This recipe with a sidecar's `[training]`, `[lora]`, `[data]` and `[replay]` laid over it.

        Raises ConfigError that names the key; `[model]` and everything else is refused.
        """
        for table, values in overrides.items():
            if table not in SIDECAR_TABLES or not isinstance(values, Mapping):
                raise ConfigError(
                    operation="apply the sidecar",
                    cause=f"[{table}] cannot be set for one dataset",
                    hint=f"a sidecar may hold {SIDECAR_CONTENT}",
                )
            if named := sorted(NOT_FOR_ONE_DATASET.get(table, frozenset()) & values.keys()):
                raise ConfigError(
                    operation="apply the sidecar",
                    cause=f"[{table}] {', '.join(named)} cannot be set for one dataset",
                    hint="set it in dropforge.toml: it is about this machine, not about the dataset",
                )
        for table, key in ONLY_UPWARDS:
            value, least = overrides.get(table, {}).get(key), getattr(getattr(self, table), key)
            if isinstance(value, int) and value < least:
                raise ConfigError(
                    operation="apply the sidecar",
                    cause=f"[{table}] {key} cannot be lowered for one dataset (got {value}, dropforge.toml has {least})",
                    hint="set it in dropforge.toml: it says how well datasets are measured",
                )
        modules = overrides.get("lora", {}).get("target_modules", "all-linear")
        if isinstance(modules, str) and modules != "all-linear":  # peft takes it for a pattern, which may never end
            raise ConfigError(
                operation="apply the sidecar",
                cause="[lora] target_modules cannot be a pattern for one dataset",
                hint='list the modules by name, or say "all-linear"',
            )
        try:
            return Recipe.model_validate(layered(self.model_dump(), overrides))
        except ValidationError as error:
            raise ConfigError(operation="apply the sidecar", cause=explain(error, Recipe)) from error


def layered(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Tables of later layers laid over those of earlier ones, key by key."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            below = merged.get(name)
            merged[name] = {**below, **value} if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged
