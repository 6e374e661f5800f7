"""Settings: `dropforge.toml`, `DROPFORGE_*` variables and flags, checked once, in this order of increasing weight.

Names are those of transformers and peft wherever they have one. A `Recipe` is the part of the settings that decides
what a run computes; a sidecar may override some of it for one dataset, and nothing else.
"""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from daemon.errors import ConfigError

CONFIG_NAME = "dropforge.toml"
ENV_PREFIX = "DROPFORGE_"
ROOT_VARIABLE = "DROPFORGE_ROOT"

# What a dropped file has no say in: it is about this machine, or keeps one file from harming the daemon.
NOT_FOR_ONE_DATASET: Mapping[str, frozenset[str]] = {
    "training": frozenset({"num_processes", "report_to", "save_total_limit"}),
    "data": frozenset({"max_line_bytes", "max_expansion", "render_seconds"}),
}

PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]


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


class ModelSettings(Section):
    """`[model]`: what the adapters are trained on."""

    model_name_or_path: str = Field("", description="A local folder or a Hub id of the base model.")
    revision: str | None = Field(None, description="Hub revision; a commit is safest.")
    allow_downloads: bool = Field(False, description="May fetch the base model from the Hub when it is missing.")
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = Field(
        "sdpa", description="Attention kernel, always explicit."
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
    num_train_epochs: PositiveFloat = Field(1.0, description="Passes over the data.")
    max_steps: int = Field(-1, ge=-1, description="Stop after so many steps; -1: as the epochs say.")
    per_device_train_batch_size: PositiveInt = Field(
        4, description="Rows of max_length that fit one forward pass on one device; of shorter rows, as many tokens."
    )
    gradient_accumulation_steps: PositiveInt = Field(
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
    warmup_steps: float = Field(0.03, ge=0, description="Steps of linear warm-up; below 1: a share of all steps.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay.")
    max_grad_norm: float = Field(1.0, ge=0, description="Gradient clipping; 0: none.")
    optim: Literal["adamw_torch", "adamw_torch_fused"] = Field(
        "adamw_torch_fused", description="Optimizer, by its name in transformers."
    )
    seed: int = Field(42, ge=0, description="Of weights, dropout and data order.")
    gradient_checkpointing: bool | Literal["auto"] = Field(
        "auto", description="Trade speed for memory; auto: only when it would run out."
    )
    use_liger_kernel: bool = Field(False, description="Fused kernels of `dropforge[gpu]`.")
    torch_compile: bool = Field(False, description="Compile the model; pays in runs of thousands of steps only.")
    save_steps: PositiveInt = Field(100, description="Steps between sealed checkpoints.")
    save_total_limit: PositiveInt = Field(2, description="Checkpoints of a run that are kept.")
    logging_steps: PositiveInt = Field(10, description="Steps between logged losses.")
    report_to: tuple[str, ...] = Field((), description="Further trackers, by their names in transformers.")


class LoraSettings(Section):
    """`[lora]`: shape of the adapter. May be overridden by a sidecar."""

    r: PositiveInt = Field(16, description="Rank.")
    lora_alpha: PositiveFloat = Field(32, description="Scale; the update is multiplied by lora_alpha / r.")
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

    max_length: PositiveInt = Field(2048, description="Tokens a row; of longer rows the trained part is kept.")
    train_on: Literal["auto", "completion", "assistant", "last_turn", "all"] = Field(
        "auto",
        description="Tokens that get a loss; auto: the completion, the assistant's turns, or all of a text.",
    )
    render_seconds: PositiveFloat = Field(10.0, description="Time limit for turning one row into tokens.")
    held_out_fraction: float = Field(0.02, ge=0, lt=1, description="Share of rows, by content, never trained.")
    held_out_max_rows: int = Field(256, ge=0, description="Upper bound on held-out rows.")
    on_bad_rows: Literal["reject", "skip"] = Field("reject", description="Refuse the file, or leave bad rows out.")
    max_bad_fraction: float = Field(0.01, ge=0, le=1, description="Under skip: more bad rows refuse the file.")
    max_line_bytes: PositiveInt = Field(16 * 2**20, description="Longest line that is read.")
    max_expansion: float = Field(
        100.0, ge=1, description="A .gz or .zst may expand to so many times its size (and always to 64 MiB)."
    )
    columns: ColumnSettings = Field(ColumnSettings(), description="Columns of files in no known format.")


class InboxSettings(Section):
    """`[inbox]`: when a dropped file is taken, and what happens to it afterwards."""

    settle_seconds: float = Field(2.0, ge=0, description="A file is taken when it stayed the same for so long.")
    quiet_seconds: float = Field(
        0.02,
        ge=0,
        description="A file renamed in or closed whole waits only so long; its sidecar may follow meanwhile.",
    )
    take_on_close: bool = Field(
        True,
        description="A file written in place may be taken once closed; false: it settles. For writers that reopen.",
    )
    rescan_seconds: PositiveFloat = Field(5.0, description="Longest time between two looks at the folder.")
    poll_seconds: PositiveFloat = Field(1.0, description="The same where the folder cannot be watched.")
    max_queued: PositiveInt = Field(1000, description="Jobs that may wait; further files stay in the inbox.")
    on_success: Literal["keep", "delete"] = Field("keep", description="A trained file: kept in done/, or deleted.")
    keep_done_days: float = Field(0.0, ge=0, description="Trained files in done/ are deleted after; 0: never.")
    scan_processes: int = Field(0, ge=0, description="Processes that check one large file; 0: as many as cores.")


class QueueSettings(Section):
    """`[queue]`: attempts and limits of the trainer."""

    max_attempts: PositiveInt = Field(3, description="Launches without new progress before a job has failed.")
    retry_seconds: float = Field(30.0, ge=0, description="First back-off after a failed attempt; it doubles.")
    stall_timeout: float = Field(
        1800.0, ge=0, description="Seconds without progress before a trainer is ended; 0: never."
    )
    job_timeout: float = Field(0.0, ge=0, description="Seconds a job may train in one attempt; 0: any time.")
    min_free_bytes: int = Field(512 * 2**20, ge=0, description="Free space to leave beyond what a run needs.")
    keep_jobs_days: float = Field(365.0, ge=0, description="Finished jobs are forgotten after; 0: never.")
    stop_timeout: PositiveFloat = Field(60.0, description="Seconds a trainer gets to seal a checkpoint and leave.")


class ExecutorSettings(Section):
    """`[executor]`: how a trainer is started."""

    command: tuple[str, ...] = Field(
        (sys.executable, "-P", "-m", "daemon.trainer"),
        description="Program and arguments; the run directory is appended. For a trainer in an environment of its own.",
    )
    gpu_lock: Path | None = Field(
        None, description="Lock file that several daemons share, so that they train one at a time."
    )
    warm_start: bool = Field(
        False, description="Keep a process with all imports done, about 500 MB, from which trainers start in a second."
    )
    idle_timeout: PositiveFloat = Field(900.0, description="That process ends after so many seconds without a job.")


class GpuSettings(Section):
    """`[gpu]`: which device trains, and when it is free enough."""

    device: str = Field("auto", description='"auto" (the one with most free memory), an index, a UUID, or "none".')
    min_free_bytes: int = Field(0, ge=0, description="Free memory to wait for; 0: estimated from the base model.")
    lock_dir: Path = Field(
        Path("/run/lock"), description="Where daemons of this machine share a lock file for each GPU, by its UUID."
    )


class HookSettings(Section):
    """`[hooks]`: commands (program and arguments) that get the facts as JSON on stdin."""

    on_job_finished: tuple[str, ...] = Field((), description="After each job that came to its end.")
    on_queue_empty: tuple[str, ...] = Field((), description="When the last job of the queue came to its end.")
    on_hold: tuple[str, ...] = Field((), description="When the queue has to wait: paused, no space, GPU in use.")
    timeout: PositiveFloat = Field(30.0, description="Seconds before a hook is ended.")


class GuardSettings(Section):
    """`[guard]`: seals, and what happens to cleared checkpoints."""

    key_file: Path | None = Field(None, description="Key (mode 0600) that turns seals into HMACs.")
    keep_cleared_sets: int = Field(10, ge=1, description="Cleared sets that are kept at most, the newest always.")
    keep_cleared_days: float = Field(14.0, ge=0, description="Older sets are purged.")
    keep_cleared_bytes: int = Field(20 * 2**30, ge=0, description="Oldest sets are purged above this.")


class PathSettings(Section):
    """`[paths]`: relative ones start at the root."""

    inbox: Path = Field(Path("inbox"), description="Watched folder.")
    current_model: Path = Field(Path("current_model"), description="Model directory.")
    state: Path = Field(Path("state"), description="Queue, status, logs, run directories.")


class StatusSettings(Section):
    """`[status]`: the status file."""

    status_interval: PositiveFloat = Field(2.0, description="Seconds between heartbeats.")


class LogSettings(Section):
    """`[logging]`: `dropforge.jsonl`, the complete log."""

    folder: Path | None = Field(None, description="Where it lies; unset: logs/ under [paths] state.")
    level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe level written.")
    max_bytes: int = Field(
        64 * 2**20, ge=0, description="Rotate above this size; 0: never, for logrotate (reopened on SIGHUP)."
    )
    backups: int = Field(5, ge=1, description="Rotated files that are kept.")


class MetricsSettings(Section):
    """`[metrics]`: for Prometheus; both are off unless they are set."""

    port: int | None = Field(None, ge=1, le=65535, description="Port of the endpoint on 127.0.0.1.")
    textfile: Path | None = Field(
        None, description="File for node_exporter's textfile collector; its name ends in .prom."
    )


class Recipe(Section):
    """Everything besides the data that decides what a run computes."""

    model: ModelSettings = ModelSettings()
    training: TrainingSettings = TrainingSettings()
    lora: LoraSettings = LoraSettings()
    data: DataSettings = DataSettings()

    def with_overrides(self, overrides: Mapping[str, Any]) -> Recipe:
        """This recipe with a sidecar's `[training]`, `[lora]` and `[data]` laid over it.

        Raises ConfigError that names the key; `[model]` and everything else is refused.
        """
        for table, values in overrides.items():
            if table not in ("training", "lora", "data") or not isinstance(values, Mapping):
                raise ConfigError(
                    operation="apply the sidecar",
                    cause=f"[{table}] cannot be set for one dataset",
                    hint="a sidecar may hold priority, force, [training], [lora] and [data]",
                )
            if named := sorted(NOT_FOR_ONE_DATASET.get(table, frozenset()) & values.keys()):
                raise ConfigError(
                    operation="apply the sidecar",
                    cause=f"[{table}] {', '.join(named)} cannot be set for one dataset",
                    hint="set it in dropforge.toml: it is about this machine, not about the dataset",
                )
        modules = overrides.get("lora", {}).get("target_modules", "all-linear")
        if isinstance(modules, str) and modules != "all-linear":  # peft takes it for a pattern, which may never end
            raise ConfigError(
                operation="apply the sidecar",
                cause="[lora] target_modules cannot be a pattern for one dataset",
                hint='list the modules by name, or say "all-linear"',
            )
        try:
            return Recipe.model_validate(_layered(self.model_dump(), overrides))
        except ValidationError as error:
            raise ConfigError(operation="apply the sidecar", cause=explain(error)) from error


class Settings(BaseSettings):
    """All settings of one root, immutable."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_nested_delimiter="__", frozen=True, extra="forbid", protected_namespaces=()
    )

    root: Path = Field(Path(), exclude=True, description="Directory that holds dropforge.toml.")
    model: ModelSettings = ModelSettings()
    training: TrainingSettings = TrainingSettings()
    lora: LoraSettings = LoraSettings()
    data: DataSettings = DataSettings()
    inbox: InboxSettings = InboxSettings()
    queue: QueueSettings = QueueSettings()
    executor: ExecutorSettings = ExecutorSettings()
    gpu: GpuSettings = GpuSettings()
    hooks: HookSettings = HookSettings()
    guard: GuardSettings = GuardSettings()
    paths: PathSettings = PathSettings()
    status: StatusSettings = StatusSettings()
    logging: LogSettings = LogSettings()
    metrics: MetricsSettings = MetricsSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what `load` passes in: it lays the layers over each other itself, in one visible order."""
        return (init_settings,)

    @property
    def inbox_dir(self) -> Path:
        """The watched folder, absolute."""
        return self.root / self.paths.inbox

    @property
    def model_dir(self) -> Path:
        """The model directory, absolute."""
        return self.root / self.paths.current_model

    @property
    def state_dir(self) -> Path:
        """Queue, status, logs and run directories, absolute."""
        return self.root / self.paths.state

    @property
    def store_path(self) -> Path:
        """The job store."""
        return self.state_dir / "queue.sqlite3"

    @property
    def status_path(self) -> Path:
        """The status file."""
        return self.state_dir / "status.json"

    @property
    def log_path(self) -> Path:
        """The log, one JSON object a line."""
        folder = self.logging.folder
        return (self.root / folder if folder else self.state_dir / "logs") / "dropforge.jsonl"

    @property
    def recipe(self) -> Recipe:
        """The part that decides what a run computes; a base model in a folder of the root is named in full."""
        model = self.model
        if model.model_name_or_path and (self.root / model.model_name_or_path).is_dir():
            model = model.model_copy(update={"model_name_or_path": str(self.root / model.model_name_or_path)})
        return Recipe(model=model, training=self.training, lora=self.lora, data=self.data)


def find_root(flag: Path | None) -> Path:
    """`--root`, else DROPFORGE_ROOT, else the current directory; absolute."""
    chosen = flag or (Path(os.environ[ROOT_VARIABLE]) if os.environ.get(ROOT_VARIABLE) else Path.cwd())
    return chosen.expanduser().resolve()


def load(root: Path, flags: Mapping[str, Any] | None = None) -> Settings:
    """Read and check the settings of `root`; `flags` are nested tables from the command line.

    A root without `dropforge.toml` has the defaults. Raises ConfigError with every fault, one a line.
    """
    path = root / CONFIG_NAME
    try:
        table = tomllib.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        table = {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(
            operation="read",
            subject=path,
            cause=str(error),
            hint="mend the file; `dropforge init` in an empty folder shows a complete example",
        ) from error
    _refuse_unknown_variables()
    if "root" in table:
        raise ConfigError(operation="use", subject=path, cause="unknown key root", hint="use --root or DROPFORGE_ROOT")
    environment = EnvSettingsSource(Settings)()
    try:
        return Settings.model_validate({"root": root, **_layered(table, environment, flags or {})})
    except ValidationError as error:
        raise ConfigError(
            operation="use",
            subject=path,
            cause=explain(error),
            hint="`dropforge init` in an empty folder shows every key with its default",
        ) from error


def _layered(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Tables of later layers laid over those of earlier ones, key by key."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            below = merged.get(name)
            merged[name] = {**below, **value} if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def explain(error: ValidationError) -> str:
    """Pydantic's findings as `[table] key: what is wrong (got VALUE)`, joined by `; `."""
    lines = []
    for item in error.errors(include_url=False):
        table, *keys = (str(part) for part in item["loc"]) if item["loc"] else ("",)
        place = f"[{table}] {'.'.join(keys)}" if keys else table
        if item["type"] == "extra_forbidden":
            lines.append(f"unknown key {place}")
        else:
            lines.append(f"{place}: {item['msg'][0].lower()}{item['msg'][1:]} (got {item['input']!r:.80})")
    return "; ".join(dict.fromkeys(lines))


def _refuse_unknown_variables() -> None:
    """A misspelt DROPFORGE_ variable would be ignored in silence."""
    known = {ROOT_VARIABLE}
    for name, info in Settings.model_fields.items():
        section = info.annotation
        if isinstance(section, type) and issubclass(section, Section):
            known |= {f"{ENV_PREFIX}{name}__{key}".upper() for key in section.model_fields} | {
                f"{ENV_PREFIX}{name}".upper()
            }
    for variable in sorted(os.environ):
        if variable.upper().startswith(ENV_PREFIX) and variable.upper() not in known:
            raise ConfigError(
                operation="use",
                subject=f"the environment variable {variable}",
                cause="there is no such setting",
                hint="write DROPFORGE_TABLE__KEY, for example DROPFORGE_TRAINING__LEARNING_RATE=1e-4",
            )
