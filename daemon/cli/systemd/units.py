"""Fill in the templates of the systemd units: system, one a model (instances), user, and drop-ins.

Values in, text out. `dropforge service install` fills in the paths of this machine; the files under systemd/ are made by
docs/generate.py with the paths that the documents use.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from daemon.gpu import SHARED_LOCKS, TMPFILES_LINE

TEMPLATES = Path(__file__).with_name("templates")
_PLACEHOLDER = re.compile(r"@([A-Z_]+)@")
DEFAULT_PYTHON = Path("/opt/dropforge/.venv/bin/python")
DEFAULT_ROOT = Path("/var/lib/dropforge")
STATE_PARENT = Path("/var/lib")
ACCOUNT = "dropforge"
# What ProtectHome= hides.
HOMES = (Path("/home"), Path("/root"), Path("/run/user"))
STOP_MARGIN_SECONDS = 30  # beyond the daemon's own patience with its trainer


class UnitKind(StrEnum):
    """Which unit."""

    SYSTEM = "system"  # dropforge.service
    TEMPLATE = "template"  # dropforge@.service: dropforge@NAME is one of several models on this machine
    USER = "user"  # dropforge.service of a user's own manager


class DropIn(StrEnum):
    """What a drop-in opens."""

    DOWNLOADS = "downloads"
    NVIDIA = "nvidia"
    METRICS = "metrics"
    NOTICES = "notices"


@dataclass(frozen=True, kw_only=True)
class Unit:
    """What a unit is made for. `root` of a template may hold %i."""

    kind: UnitKind
    python: Path = DEFAULT_PYTHON
    root: Path = DEFAULT_ROOT
    stop_seconds: float = 60.0  # [queue] stop_timeout
    outside: tuple[Path, ...] = ()  # folders that the daemon writes to and that do not lie below the root
    read: tuple[Path, ...] = ()  # folders that it reads, such as the base model

    @property
    def name(self) -> str:
        """The file's name."""
        return "dropforge@.service" if self.kind is UnitKind.TEMPLATE else "dropforge.service"

    @property
    def state_directory(self) -> str | None:
        """The root's name when systemd is to make it, directly below /var/lib."""
        return self.root.name if self.root.parent == STATE_PARENT else None

    @property
    def homes(self) -> tuple[Path, ...]:
        """What of all this lies where ProtectHome= would hide it."""
        return tuple(
            path
            for path in (self.python, self.root, *self.outside, *self.read)
            if any(path.is_relative_to(home) for home in HOMES)
        )


def render_unit(unit: Unit) -> str:
    """Render the unit file."""
    values = _values(unit)
    template = "user.service.in" if unit.kind is UnitKind.USER else "system.service.in"
    return _fill(template, {**values, "COMMON": _fill("common.in", values)})


def drop_in(kind: DropIn) -> str:
    """Read the drop-in file, for DROPFORGE.service.d/."""
    return (TEMPLATES / f"{kind}.conf").read_text(encoding="utf-8")


def tmpfiles() -> str:
    """Render the tmpfiles.d(5) file that makes the folder of the GPUs' locks."""
    return _fill("tmpfiles.conf.in", {"LINE": TMPFILES_LINE})


def instance_drop_in(unit: Unit) -> str:
    """Render dropforge@NAME.service.d/root.conf: an instance whose root is not where the template says."""
    return _fill("instance.conf.in", _values(unit))


def command(python: Path, root: Path, *words: str) -> Sequence[str]:
    """The command line of a command, `run` by default. -P: a folder `daemon` in the working directory is not ours."""
    return [str(python), "-P", "-m", "daemon", "--root", str(root), *(words or ("run",))]


def _fill(template: str, values: Mapping[str, str]) -> str:
    """Replace each @NAME@; a line that is nothing else becomes as many lines as its value has, also none."""
    lines: list[str] = []
    for line in (TEMPLATES / template).read_text(encoding="utf-8").splitlines():
        alone = _PLACEHOLDER.fullmatch(line)
        lines += values[alone[1]].splitlines() if alone else [_PLACEHOLDER.sub(lambda found: values[found[1]], line)]
    return "\n".join(lines) + "\n"


def _values(unit: Unit) -> dict[str, str]:
    logs = unit.state_directory or ACCOUNT
    state = (
        [f"StateDirectory={_setting(unit.state_directory)}", "StateDirectoryMode=0750"] if unit.state_directory else []
    )
    return {
        "INSTANCE": {UnitKind.SYSTEM: "", UnitKind.TEMPLATE: " (%i)", UnitKind.USER: " (user)"}[unit.kind],
        "COMMAND": _command_line(command(unit.python, unit.root)),
        "CHECK": _command_line(command(unit.python, unit.root, "config", "check")),
        "ROOT": _setting(unit.root),
        "STOP_SECONDS": str(int(unit.stop_seconds) + STOP_MARGIN_SECONDS),
        "ACCOUNT": ACCOUNT,
        "STATE_DIRECTORY": "\n".join(state),
        "LOGS": _setting(logs),
        "LOG_FOLDER_VARIABLE": _quoted(f"DROPFORGE_LOGGING__FOLDER=/var/log/{logs}"),
        "HOME_VARIABLE": _quoted(f"HOME={unit.root}"),
        "GPU_LOCKS": str(SHARED_LOCKS),
        "PATHS": "\n".join(_paths(unit)),
    }


def _paths(unit: Unit) -> list[str]:
    protect = ["ProtectHome=yes"]
    if unit.homes:
        protect = ["# Part of this installation lies in a home.", "ProtectHome=read-only"]
    writable = unit.outside if unit.state_directory is not None else (unit.root, *unit.outside)
    return [*protect, *(f"ReadWritePaths={_quoted(str(path))}" for path in writable)]


def _command_line(words: Sequence[str]) -> str:
    return " ".join(_quoted(word, dollar=True) for word in words)


def _quoted(word: str, *, dollar: bool = False) -> str:
    """A word as systemd.syntax(7) reads it."""
    text = _setting(word).replace("\\", "\\\\").replace('"', '\\"')
    if dollar:
        text = text.replace("$", "$$")
    return f'"{text}"' if set(text) & set(" \t'\"") else text


def _setting(path: Path | str) -> str:
    """A path in a setting that takes the rest of its line; % is itself but for the two specifiers that units mean."""
    return str(path).replace("%", "%%").replace("%%i", "%i").replace("%%h", "%h")
