"""`dropforge service install`: which files go where on this machine, and what to type next.

`plan` decides, `execute` writes; nothing is started, no account is made.
"""

from __future__ import annotations

import difflib
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from daemon.cli.systemd import look, units
from daemon.cli.systemd.look import Obstacle
from daemon.cli.systemd.units import ACCOUNT, DropIn, Unit, UnitKind
from daemon.config import Settings
from daemon.errors import ConfigError, DropforgeError
from guard.atomic import make_folder_durable, write_atomic

SYSTEM_UNITS = Path("/etc/systemd/system")
TMPFILES = Path("/etc/tmpfiles.d/dropforge.conf")
INBOX_FOLDERS = ("", "high", "low")


@dataclass(frozen=True, kw_only=True)
class PlannedFile:
    """One file, and what it is now."""

    path: Path
    text: str
    before: str | None  # None: it is not there

    @property
    def is_changed(self) -> bool:
        """Whether there is one with other words."""
        return self.before is not None and self.before != self.text

    @property
    def difference(self) -> list[str]:
        """The lines that go and come, each with - or + before it."""
        lines = difflib.ndiff((self.before or "").splitlines(), self.text.splitlines())
        return [line for line in lines if line.startswith(("- ", "+ "))]


@dataclass(frozen=True, kw_only=True)
class InstallPlan:
    """Files to write, in order, and the commands that a person runs afterwards."""

    unit: Unit
    planned: tuple[PlannedFile, ...]
    commands: tuple[str, ...]
    left: tuple[Path, ...] = ()  # drop-ins of ours that nothing calls for any more

    @property
    def files(self) -> tuple[tuple[Path, str], ...]:
        """Path and text of each."""
        return tuple((file.path, file.text) for file in self.planned)

    def execute(self) -> None:
        """Write the files that are new or changed. Raises DropforgeError."""
        for file in self.planned:
            if file.before == file.text:
                continue
            try:
                make_folder_durable(file.path.parent)
                write_atomic(file.path, file.text)
            except OSError as error:
                raise DropforgeError(
                    operation="write",
                    subject=file.path,
                    cause=error.strerror or str(error),
                    hint="run it as root, or with --user for a service of your own",
                ) from error


def plan_install(
    settings: Settings,
    *,
    user: bool = False,
    instance: str = "",
    drop_ins: Sequence[DropIn] = (),
    directory: Path | None = None,
    python: Path | None = None,
) -> InstallPlan:
    """Plan the service over `settings.root`. Raises ConfigError when the request makes no sense."""
    if user and instance:
        raise ConfigError(
            operation="install",
            cause="--user and --instance do not go together",
            hint="several models of one user: one root each, and a unit file each by hand",
        )
    if instance and not instance.replace("-", "").replace("_", "").isalnum():
        raise ConfigError(operation="install instance", subject=instance, cause="a name has letters, digits, - and _")
    where = directory or (_user_units() if user else SYSTEM_UNITS)
    unit = _unit(
        settings, UnitKind.USER if user else UnitKind.TEMPLATE if instance else UnitKind.SYSTEM, python or _python()
    )
    usual = units.STATE_PARENT / f"dropforge-{instance}"
    written = unit
    if instance:  # the template itself knows no instance
        written = replace(unit, root=units.STATE_PARENT / "dropforge-%i", outside=(), read=())
    name = f"dropforge@{instance}.service" if instance else "dropforge.service"
    files = [(where / written.name, units.render_unit(written))]
    if instance and (unit.root != usual or unit.outside or unit.homes):
        files.append((where / f"{name}.d" / "root.conf", units.instance_drop_in(unit)))
    if not user:
        files += [(where / f"{name}.d" / f"{kind}.conf", units.drop_in(kind)) for kind in drop_ins]
    tmpfiles = TMPFILES if directory is None else where / "tmpfiles.d" / TMPFILES.name
    if not user:
        files.append((tmpfiles, units.tmpfiles()))
    planned = tuple(PlannedFile(path=path, text=text, before=_read(path)) for path, text in files)
    folder = where / f"{name}.d"
    unwanted = [folder / f"{kind}.conf" for kind in DropIn if kind not in drop_ins]
    if planned[0].before is not None:
        commands = _commands_again(unit, name, is_changed=any(file.before != file.text for file in planned))
    else:
        commands = _user_commands(unit) if user else _commands(unit, name, tmpfiles)
    return InstallPlan(
        unit=unit,
        planned=planned,
        commands=commands,
        left=tuple(path for path in unwanted if not user and path.exists()),
    )


def obstacle(plan: InstallPlan, settings: Settings) -> Obstacle | None:
    """Return what keeps the planned service from starting, None when nothing is seen."""
    return look.find_obstacle(
        plan.unit,
        look.service_account(),
        program=Path(shutil.which(settings.executor.command[0]) or settings.executor.command[0]),
        base_prefix=Path(sys.base_prefix),
        executed=os.geteuid() == 0,
        environment=os.environ,
    )


def wanted_drop_ins(settings: Settings) -> tuple[DropIn, ...]:
    """What the settings and this machine's devices call for."""
    required = {
        DropIn.DOWNLOADS: settings.model.allow_downloads,
        DropIn.METRICS: settings.metrics.port is not None,
        DropIn.NOTICES: bool(settings.notify.urls or settings.notify.urls_file),
        DropIn.NVIDIA: Path("/dev/nvidiactl").exists(),
    }
    return tuple(kind for kind, is_required in required.items() if is_required)


def _unit(settings: Settings, kind: UnitKind, python: Path) -> Unit:
    root = settings.root
    folders = [settings.inbox_dir, settings.model_dir, settings.state_dir]
    if kind is UnitKind.USER or settings.logging.folder:
        folders.append(settings.log_path.parent)
    if settings.metrics.textfile:
        folders.append((root / settings.metrics.textfile).parent)
    model = Path(settings.model.model_name_or_path or "/").expanduser()
    return Unit(
        kind=kind,
        python=python,
        root=root,
        stop_seconds=settings.queue.stop_timeout,
        outside=tuple(dict.fromkeys(folder for folder in folders if not folder.is_relative_to(root))),
        read=(Path(sys.base_prefix), *((model,) if model.is_absolute() else ())),
    )


def _python() -> Path:
    """The interpreter by the name that makes it a virtual environment; its target would lose the packages."""
    return Path(sys.prefix) / "bin" / "python" if sys.prefix != sys.base_prefix else Path(sys.executable)


def _user_units() -> Path:
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "systemd" / "user"


def _commands(unit: Unit, name: str, tmpfiles: Path) -> tuple[str, ...]:
    root = shlex.quote(str(unit.root))
    folders = " ".join(shlex.quote(str(unit.root / "inbox" / part)) for part in INBOX_FOLDERS)
    dropforge = f"{shlex.quote(str(unit.python))} -P -m daemon --root {root}"
    config = unit.root / "dropforge.toml"
    commands = [
        f"getent passwd {ACCOUNT} || useradd --system --user-group --home-dir {root} --shell /usr/sbin/nologin {ACCOUNT}",
        f"install -d -o {ACCOUNT} -g {ACCOUNT} -m 0750 {root}",
        # Sticky, so that nobody moves another's file or a folder of ours; setgid, so that the daemon may read what is dropped.
        f"install -d -o {ACCOUNT} -g {ACCOUNT} -m 3770 {folders}",
    ]
    if not config.exists():
        commands += [
            f"runuser -u {ACCOUNT} -- {dropforge} init",
            f"editor {shlex.quote(str(config))}   # set model_name_or_path under [model]",
        ]
    return (
        *commands,
        f"runuser -u {ACCOUNT} -- {dropforge} doctor",
        f"systemd-tmpfiles --create {shlex.quote(str(tmpfiles))}",
        "systemctl daemon-reload",
        f"systemctl enable --now {name}",
        f"systemctl status {name}",
        f"usermod --append --groups {ACCOUNT} ALICE   # who may drop files; ALICE logs in anew",
    )


def _commands_again(unit: Unit, name: str, *, is_changed: bool) -> tuple[str, ...]:
    """What follows when the unit was there before: the service goes on with the old one until it is restarted."""
    if not is_changed:
        return ()
    dropforge = f"{shlex.quote(str(unit.python))} -P -m daemon --root {shlex.quote(str(unit.root))}"
    is_user = unit.kind is UnitKind.USER
    systemctl = "systemctl --user" if is_user else "systemctl"
    become = "" if is_user else f"runuser -u {ACCOUNT} -- "
    return (
        f"{become}{dropforge} config check",
        f"{systemctl} daemon-reload",
        f"{systemctl} restart {name}   # until then it runs as before; a job that trains seals a checkpoint and goes on",
    )


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _user_commands(unit: Unit) -> tuple[str, ...]:
    dropforge = f"{shlex.quote(str(unit.python))} -P -m daemon --root {shlex.quote(str(unit.root))}"
    first = () if (unit.root / "dropforge.toml").exists() else (f"{dropforge} init",)
    return (
        *first,
        f"{dropforge} doctor",
        "systemctl --user daemon-reload",
        "systemctl --user enable --now dropforge.service",
        "systemctl --user status dropforge.service",
        "loginctl enable-linger   # it goes on when you log out",
    )
