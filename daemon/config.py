"""Settings: `dropforge.toml`, `DROPFORGE_*` variables and flags, checked once, in this order of increasing weight."""

from __future__ import annotations

import os
import re
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from daemon.errors import ConfigError, InvalidSettings
from daemon.evaluation.settings import EvaluationSettings, GateSettings
from daemon.limits import LimitSettings
from daemon.notices import NoticeEvent
from daemon.recipe import (
    DataSettings,
    LoraSettings,
    ModelSettings,
    PositiveFloat,
    PositiveInt,
    Recipe,
    ReplaySettings,
    Section,
    TrainingSettings,
    layered,
)
from daemon.schedule import ScheduleSettings, parse_hours
from daemon.setting_names import faults, line_of

CONFIG_NAME = "dropforge.toml"
ENV_PREFIX = "DROPFORGE_"
ROOT_VARIABLE = "DROPFORGE_ROOT"
# Tables of which a running daemon holds things open: folders, the lock, its log, an endpoint. SIGHUP leaves them alone.
SECRET_SETTINGS = ("notify.urls",)  # never shown
RESTART_TABLES = ("paths", "executor", "logging", "metrics")


def expand_variables(text: str) -> str:
    """Return `text` with `$NAME` and `${NAME}` as the environment has them, and `$$` as a dollar. Raises ValueError."""

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if name and name not in os.environ:
            raise ValueError(f"the environment variable {name} is not set, and a dollar of its own is written $$")
        return os.environ[name] if name else "$"

    return re.sub(r"\$(?:\$|\{(\w+)\}|([A-Za-z_]\w*))", value, text)


def expand_path(value: Any) -> Any:
    """Return a path with its variables and its leading `~` spelled out. Raises ValueError."""
    if not isinstance(value, str):
        return value
    expanded = expand_variables(value)
    try:
        return str(Path(expanded).expanduser()) if expanded.startswith("~") else expanded
    except RuntimeError as error:
        raise ValueError("no account has that home, and a folder of that name is written ./~NAME") from error


def _expand_program(value: Any) -> Any:
    """A command with its program spelled out; its arguments are its own, and no shell reads them."""
    return (expand_path(value[0]), *value[1:]) if isinstance(value, list | tuple) and value else value


SomePath = Annotated[Path, BeforeValidator(expand_path)]
OptionalPath = Annotated[Path | None, BeforeValidator(expand_path)]
Command = Annotated[tuple[str, ...], BeforeValidator(_expand_program)]


class InboxSettings(Section):
    """`[inbox]`: when a dropped file is taken, and what happens to it afterwards."""

    settle_seconds: float = Field(
        2.0,
        ge=0,
        description="A file is taken when it stayed the same for so long; up to ten times as long where rows are appended.",
    )
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

    command: Command = Field(
        (sys.executable, "-P", "-m", "daemon.trainer"),
        description="Program and arguments; the run directory is appended. For a trainer in an environment of its own.",
    )
    gpu_lock: OptionalPath = Field(
        None, description="Lock file that several daemons share, so that they train one at a time."
    )
    warm_start: bool = Field(
        False, description="Fork trainers from a process with all imports done: 3 s less a job, for about 500 MB."
    )
    idle_timeout: PositiveFloat = Field(900.0, description="That process ends after so many seconds without a job.")


class GpuSettings(Section):
    """`[gpu]`: which device trains, and when it is free enough."""

    device: str = Field("auto", description='"auto" (the one with most free memory), an index, a UUID, or "none".')
    min_free_bytes: int = Field(0, ge=0, description="Free memory to wait for; 0: estimated from the base model.")
    lock_dir: OptionalPath = Field(
        None,
        description="Where daemons of this machine share a lock file for each GPU, by its UUID; not set: `/run/dropforge`"
        " where `dropforge service install` made it, else `/run/lock`.",
    )


class HookSettings(Section):
    """`[hooks]`: commands (program and arguments) that get the facts as JSON on stdin."""

    on_job_finished: Command = Field((), description="After each job that came to its end.")
    on_queue_empty: Command = Field((), description="When the last job of the queue came to its end.")
    on_gate: Command = Field(
        (), description="When a version has lost something of earlier datasets: held, or warned of."
    )
    on_hold: Command = Field((), description="When the queue has to wait: paused, no space, GPU in use.")
    timeout: PositiveFloat = Field(30.0, description="Seconds before a hook is ended.")


class NotifySettings(Section):
    """`[notify]`: people who are told, through Apprise (extra `notify`)."""

    urls: tuple[str, ...] = Field((), description="Addresses as Apprise writes them: ntfy://host/topic, mailto://...")
    urls_file: OptionalPath = Field(
        None, description="File with one address a line, closed to other accounts: addresses hold passwords."
    )
    events: tuple[NoticeEvent, ...] = Field(
        ("failed", "rejected", "held", "recovered"),
        description='What is told: "failed", "rejected", "held" (queue or version), "recovered", "succeeded".',
    )
    quiet_hours: tuple[str, ...] = Field(
        (), description='Local time in which nothing is sent; one summary follows: ["22:00-07:00"].'
    )
    summary_seconds: PositiveFloat = Field(300.0, description="Least time between two; what came meanwhile is one.")
    held_seconds: float = Field(60.0, ge=0, description="A hold of the queue is told once it has lasted so long.")

    @field_validator("quiet_hours")
    @classmethod
    def _readable(cls, hours: tuple[str, ...]) -> tuple[str, ...]:
        parse_hours(hours)
        return hours


class GuardSettings(Section):
    """`[guard]`: seals, checks, and what happens to cleared checkpoints."""

    key_file: OptionalPath = Field(None, description="Key (mode 0600) that turns seals into HMACs.")
    verify_days: float = Field(
        7.0, ge=0, description="Between two checks, in the background, of all that is kept; 0: never."
    )
    keep_cleared_sets: int = Field(10, ge=1, description="Cleared sets that are kept at most, the newest always.")
    keep_cleared_days: float = Field(14.0, ge=0, description="Older sets are purged.")
    keep_cleared_bytes: int = Field(20 * 2**30, ge=0, description="Oldest sets are purged above this.")


class VersionSettings(Section):
    """`[versions]`: how many finished adapters are kept."""

    keep: int = Field(
        0,
        ge=0,
        description="Newest versions that stay; older ones are moved aside after a promotion, but the current one,"
        " what it continues and what the gate holds. 0: all stay.",
    )
    keep_pruned_days: float = Field(14.0, ge=0, description="Days after which those that were moved aside are deleted.")


class PathSettings(Section):
    """`[paths]`: relative ones start at the root."""

    inbox: SomePath = Field(Path("inbox"), description="Watched folder.")
    current_model: SomePath = Field(Path("current_model"), description="Model directory.")
    state: SomePath = Field(Path("state"), description="Queue, status, logs, run directories.")
    evals: SomePath = Field(Path("evals"), description="Evals that every version answers; the administrator's alone.")


class StatusSettings(Section):
    """`[status]`: the status file."""

    status_interval: PositiveFloat = Field(2.0, description="Seconds between heartbeats.")


class LogSettings(Section):
    """`[logging]`: `dropforge.jsonl`, the complete log."""

    folder: OptionalPath = Field(None, description="Its folder; unset: logs/ under [paths] state.")
    level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe level written.")
    max_bytes: int = Field(
        64 * 2**20, ge=0, description="Rotate above this size; 0: never, for logrotate (reopened on SIGHUP)."
    )
    backups: int = Field(5, ge=1, description="Rotated files that are kept.")


class MetricsSettings(Section):
    """`[metrics]`: for Prometheus; both are off unless they are set."""

    port: int | None = Field(None, ge=1, le=65535, description="Port of the endpoint on 127.0.0.1.")
    textfile: OptionalPath = Field(
        None, description="File for node_exporter's textfile collector; its name ends in .prom."
    )


class Settings(BaseModel):
    """All settings of one root, immutable."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())

    root: Path = Field(Path(), exclude=True, description="Directory that holds dropforge.toml.")
    model: ModelSettings = ModelSettings()
    training: TrainingSettings = TrainingSettings()
    lora: LoraSettings = LoraSettings()
    data: DataSettings = DataSettings()
    replay: ReplaySettings = ReplaySettings()
    inbox: InboxSettings = InboxSettings()
    limits: LimitSettings = LimitSettings()
    queue: QueueSettings = QueueSettings()
    executor: ExecutorSettings = ExecutorSettings()
    gpu: GpuSettings = GpuSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    hooks: HookSettings = HookSettings()
    notify: NotifySettings = NotifySettings()
    guard: GuardSettings = GuardSettings()
    versions: VersionSettings = VersionSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    gate: GateSettings = GateSettings()
    paths: PathSettings = PathSettings()
    status: StatusSettings = StatusSettings()
    logging: LogSettings = LogSettings()
    metrics: MetricsSettings = MetricsSettings()

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
    def evals_dir(self) -> Path:
        """The administrator's evals, absolute."""
        return self.root / self.paths.evals

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
        return Recipe(model=model, training=self.training, lora=self.lora, data=self.data, replay=self.replay)


def find_root(flag: Path | None) -> Path:
    """`--root`, else DROPFORGE_ROOT, else the current directory; absolute."""
    chosen = flag or (Path(os.environ[ROOT_VARIABLE]) if os.environ.get(ROOT_VARIABLE) else Path.cwd())
    return chosen.expanduser().resolve()


def load(root: Path, flags: Mapping[str, Any] | None = None, *, text: bytes | None = None) -> Settings:
    """Read and check the settings of `root`; `flags` are nested tables from the command line.

    `text` stands for a `dropforge.toml` that is not there yet. A root without `dropforge.toml` has the defaults. Raises ConfigError with every fault, one a line.
    """
    path = root / CONFIG_NAME
    written = ""
    try:
        written = (path.read_bytes() if text is None else text).decode("utf-8")
        table = tomllib.loads(written)
    except FileNotFoundError:
        table = {}
    except NotADirectoryError as error:
        raise ConfigError(
            operation="use", subject=root, cause="it is a file", hint="name the folder that holds dropforge.toml"
        ) from error
    except (OSError, ValueError, RecursionError) as error:  # besides what TOML forbids: too many digits, too deep
        raise ConfigError(
            operation="read",
            subject=path,
            cause=_unreadable(error),
            hint="mend the file; `dropforge init` in an empty folder shows a complete example",
        ) from error
    _refuse_unknown_variables()
    if "root" in table:
        raise ConfigError(operation="use", subject=path, cause="unknown key root", hint="use --root or DROPFORGE_ROOT")
    variables = from_environment()
    try:
        tables = layered(table, variables, flags or {})
        return Settings.model_validate({"root": root, **_with_base_expanded(tables, path, written)})
    except ValidationError as error:
        raise InvalidSettings(
            operation="use",
            subject=path,
            faults=faults(error, Settings, written, variable_of=lambda name: variable_of(variables, name)),
            hint="`dropforge init` in an empty folder shows every key with its default",
        ) from error


def _unreadable(error: OSError | ValueError | RecursionError) -> str:
    """Say why a file is no TOML, in words of the file."""
    match error:
        case RecursionError():
            return "it is nested too deeply"
        case OSError():
            return (error.strerror or str(error)).lower()
        case UnicodeDecodeError():
            line = error.object.count(b"\n", 0, error.start) + 1
            return f"line {line} is not UTF-8 text"
    told = str(error).replace("Cannot overwrite a value", "a key stands there twice")
    return re.sub(r"Cannot declare \((.*?)\) twice", _table_twice, told)


def _table_twice(found: re.Match[str]) -> str:
    names = re.findall("'([^']*)'", found[1])
    return f"[{'.'.join(names)}] stands there twice"


def _with_base_expanded(tables: Mapping[str, Any], path: Path, written: str) -> Mapping[str, Any]:
    """The tables with the variables in the base model's name spelled out; its `~` stays, as versions record it.

    Done here and not where a recipe is validated: a job keeps the name that it was queued with. Raises ConfigError.
    """
    model = tables.get("model")
    if not isinstance(model, Mapping) or not isinstance(name := model.get("model_name_or_path"), str):
        return tables
    try:
        return {**tables, "model": {**model, "model_name_or_path": expand_variables(name)}}
    except ValueError as error:
        line = line_of(written, "model.model_name_or_path")
        raise ConfigError(
            operation="use",
            subject=path,
            cause=f"{f'line {line}: ' if line else ''}[model] model_name_or_path: {error}",
            hint="set the variable where the daemon is started, or write the path in full",
        ) from error


def changes_for_restart(running: Settings, read: Settings) -> list[str]:
    """Return the settings, as `[table] key`, that differ and that only a restart applies."""
    return [
        f"[{table}] {key}"
        for table in RESTART_TABLES
        for key in type(getattr(read, table)).model_fields
        if getattr(getattr(running, table), key) != getattr(getattr(read, table), key)
    ]


def reloaded(running: Settings, read: Settings) -> Settings:
    """Return `read`, but what only a restart applies as it is in `running`."""
    return read.model_copy(update={table: getattr(running, table) for table in RESTART_TABLES})


def from_environment() -> dict[str, Any]:
    """Return the tables that DROPFORGE_TABLE__KEY variables hold. Raises ConfigError when one is no JSON and has to be."""
    if not any(name.upper().startswith(ENV_PREFIX) and name.upper() != ROOT_VARIABLE for name in os.environ):
        return {}
    # It imports a third of what a command needs to start, and hardly anybody sets such a variable.
    from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsError

    source = EnvSettingsSource(cast("type[BaseSettings]", Settings), env_prefix=ENV_PREFIX, env_nested_delimiter="__")
    try:
        found = source()
    except SettingsError as error:
        table = next(iter(re.findall(r'field "(\w+)"', str(error))), "table")
        raise ConfigError(
            operation="use",
            subject=f"the environment variable {ENV_PREFIX}{table.upper()}",
            cause="it is no JSON object",
            hint="""write it as {"key": value}, or one setting as DROPFORGE_TABLE__KEY""",
        ) from error
    # find_root has weighed the root against --root.
    return {name: value for name, value in found.items() if name != "root"}


def holds(table: Mapping[str, Any], name: str) -> bool:
    """Whether nested tables have a value for `name` (`table.key`)."""
    at: Any = table
    for part in name.split("."):
        if not isinstance(at, Mapping) or part not in at:
            return False
        at = at[part]
    return True


def variable_of(variables: Mapping[str, Any], name: str) -> str:
    """Return the variable that sets `name`, the most precise one; empty when none does. `variables`: from_environment().

    DROPFORGE_TABLE may hold a whole table as JSON.
    """
    if not holds(variables, name):
        return ""
    parts = name.split(".")
    spelt = {variable.upper(): variable for variable in os.environ}
    precise_first = (f"{ENV_PREFIX}{'__'.join(parts[:length])}".upper() for length in range(len(parts), 0, -1))
    return next((spelt[variable] for variable in precise_first if variable in spelt), "")


def _refuse_unknown_variables() -> None:
    """A misspelt DROPFORGE_ variable would be ignored in silence."""
    known = {ROOT_VARIABLE}
    for name, info in Settings.model_fields.items():
        section = info.annotation
        if isinstance(section, type) and issubclass(section, Section):
            known |= {f"{ENV_PREFIX}{name}__{key}".upper() for key in section.model_fields} | {
                f"{ENV_PREFIX}{name}".upper()
            }
    unknown = [name for name in sorted(os.environ) if name.upper().startswith(ENV_PREFIX) and name.upper() not in known]
    if unknown:
        raise ConfigError(
            operation="use",
            subject=f"the environment variable{'s' if len(unknown) > 1 else ''} {', '.join(unknown)}",
            cause="there is no such setting",
            hint="write DROPFORGE_TABLE__KEY, for example DROPFORGE_TRAINING__LEARNING_RATE=1e-4",
        )
