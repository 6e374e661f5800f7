"""The systemd units as text: system, one a model (template), user, and the drop-ins that open one thing each.

Values in, text out. The files under systemd/ are made from this by docs/generate.py with the paths that the documents
use; `dropforge service install` fills in those of this machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

DEFAULT_PYTHON = Path("/opt/dropforge/.venv/bin/python")
DEFAULT_ROOT = Path("/var/lib/dropforge")
STATE_PARENT = Path("/var/lib")
ACCOUNT = "dropforge"
GPU_LOCK = "/run/dropforge/gpu.lock"
# What ProtectHome= hides.
HOMES = (Path("/home"), Path("/root"), Path("/run/user"))
STOP_MARGIN_SECONDS = 30  # beyond the daemon's own patience with its trainer


class Kind(StrEnum):
    """Which unit."""

    SYSTEM = "system"  # dropforge.service
    TEMPLATE = "template"  # dropforge@.service: dropforge@NAME is one of several models on this machine
    USER = "user"  # dropforge.service of a user's own manager


class DropIn(StrEnum):
    """What a drop-in opens."""

    DOWNLOADS = "downloads"
    NVIDIA = "nvidia"
    METRICS = "metrics"


@dataclass(frozen=True, kw_only=True)
class Unit:
    """What a unit is made for. `root` of a template may hold %i."""

    kind: Kind
    python: Path = DEFAULT_PYTHON
    root: Path = DEFAULT_ROOT
    stop_seconds: float = 60.0  # [queue] stop_timeout
    outside: tuple[Path, ...] = ()  # folders that the daemon writes to and that do not lie below the root
    read: tuple[Path, ...] = ()  # folders that it reads, such as the base model

    @property
    def name(self) -> str:
        """The file's name."""
        return "dropforge@.service" if self.kind is Kind.TEMPLATE else "dropforge.service"

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


def render(unit: Unit) -> str:
    """The unit file."""
    if unit.kind is Kind.USER:
        return "\n".join([*_head(unit), *_service(unit), *_USER_HARDENING, *_install("default.target")])
    return "\n".join(
        [*_head(unit), *_service(unit), *_account(unit), *_HARDENING, *_paths(unit), *_install("multi-user.target")]
    )


def drop_in(kind: DropIn) -> str:
    """The drop-in file, for DROPFORGE.service.d/."""
    return _DROP_INS[kind]


def instance_drop_in(unit: Unit) -> str:
    """For dropforge@NAME.service.d/: an instance whose root is not where the template says."""
    return "\n".join(
        [
            "# The root of this instance.",
            "[Service]",
            f"WorkingDirectory=-{_setting(unit.root)}",
            f"Environment={_quoted(f'HOME={unit.root}')}",
            "ExecStart=",
            f"ExecStart={_command(unit)}",
            *_paths(unit),
        ]
    )


def _head(unit: Unit) -> list[str]:
    what = {Kind.SYSTEM: "", Kind.TEMPLATE: " (%i)", Kind.USER: " (user)"}[unit.kind]
    return [
        "# Written by `dropforge service install`; changes belong into a drop-in: `systemctl edit`.",
        "[Unit]",
        f"Description=Dropforge{what}: continuous training by dropping files",
        "# A daemon that fails five times in ten minutes needs a person, not a sixth start.",
        "StartLimitIntervalSec=600",
        "StartLimitBurst=5",
        "",
    ]


def _service(unit: Unit) -> list[str]:
    return [
        "[Service]",
        "# READY=1 comes when recovery is done and the inbox is watched.",
        "Type=notify",
        "NotifyAccess=main",
        f"ExecStart={_command(unit)}",
        "# Opens the log again and reads dropforge.toml again.",
        "ExecReload=/bin/kill -HUP $MAINPID",
        f"WorkingDirectory=-{_setting(unit.root)}",
        "# A recovery moves files and may find a long queue.",
        "TimeoutStartSec=300",
        "",
        "# The heartbeat comes from the main loop itself; a scan or a checkpoint runs in a process of its own and does not",
        "# hold it up. A loop that hangs is ended and started again; the job resumes from its last checkpoint.",
        "WatchdogSec=60",
        "Restart=on-failure",
        "RestartSec=10",
        "# 2: the configuration is wrong; 5: another daemon holds this root. Starting again changes neither.",
        "RestartPreventExitStatus=2 5",
        "",
        "# mixed: SIGTERM goes to the daemon alone, which asks its trainer for a checkpoint and waits for it; what is left",
        "# when the daemon has gone is killed. The daemon's own patience is [queue] stop_timeout, and it asks for more time",
        "# (EXTEND_TIMEOUT_USEC) while a checkpoint is written.",
        "KillMode=mixed",
        f"TimeoutStopSec={int(unit.stop_seconds) + STOP_MARGIN_SECONDS}",
        "# A trainer that the kernel ended for want of memory is a failed attempt; it must not take the daemon along.",
        "OOMPolicy=continue",
        "# A core file would hold the model and the data.",
        "LimitCORE=0",
        "",
        "SyslogIdentifier=dropforge",
        "# The journal drops what comes faster; 0 is ignored by systemd 252. The complete log is dropforge.jsonl.",
        "LogRateLimitIntervalSec=1s",
        "LogRateLimitBurst=1000000",
        "",
    ]


def _account(unit: Unit) -> list[str]:
    lines = [
        "# A static user: the state directory of a DynamicUser lies below a folder that is closed to everybody, so that",
        "# nobody could drop a file. Members of the group may drop files and read status and log, and no more.",
        f"User={ACCOUNT}",
        f"Group={ACCOUNT}",
        "UMask=0027",
    ]
    if unit.state_directory is not None:
        lines += [f"StateDirectory={_setting(unit.state_directory)}", "StateDirectoryMode=0750"]
    logs = unit.state_directory or ACCOUNT
    lines += [
        f"LogsDirectory={_setting(logs)}",
        "LogsDirectoryMode=0750",
        f"Environment={_quoted(f'DROPFORGE_LOGGING__FOLDER=/var/log/{logs}')}",
        "# Caches (the Hub's, torch's) lie below the root.",
        f"Environment={_quoted(f'HOME={unit.root}')}",
        "# There is no network; the Hub's client would wait for one.",
        "Environment=HF_HUB_OFFLINE=1",
        "# Several services of this machine train one at a time.",
        "RuntimeDirectory=dropforge",
        "RuntimeDirectoryPreserve=yes",
        f"Environment=DROPFORGE_EXECUTOR__GPU_LOCK={GPU_LOCK}",
        "",
    ]
    return lines


_HARDENING = [
    "# Nothing below needs more than systemd 252. Left out, with the reason:",
    "#   MemoryDenyWriteExecute=  torch compiles kernels at run time (oneDNN's bf16 matmul fails, Triton as well)",
    "#   ProcSubset=pid           hides /proc/meminfo and /proc/sys/kernel, which memory checks and the status file read",
    "#   SystemCallFilter=~@resources  torch sets CPU affinity and memory policy",
    "#   DynamicUser=             see above",
    "#   RootDirectory=           the interpreter, its packages and the CUDA libraries lie all over the system",
    "NoNewPrivileges=yes",
    "CapabilityBoundingSet=",
    "AmbientCapabilities=",
    "# strict needs PrivateTmp: `import torch` fails without a temporary folder that it may write to.",
    "ProtectSystem=strict",
    "PrivateTmp=yes",
    "# No GPU: the drop-in nvidia.conf opens its devices.",
    "PrivateDevices=yes",
    "DevicePolicy=closed",
    "# No network, not even loopback: the drop-ins downloads.conf and metrics.conf open it.",
    "PrivateNetwork=yes",
    "IPAddressDeny=any",
    "RestrictAddressFamilies=AF_UNIX",
    "PrivateUsers=yes",
    "PrivateIPC=yes",
    "PrivateMounts=yes",
    "ProtectHostname=yes",
    "ProtectClock=yes",
    "ProtectKernelTunables=yes",
    "ProtectKernelModules=yes",
    "ProtectKernelLogs=yes",
    "ProtectControlGroups=yes",
    "ProtectProc=invisible",
    "RestrictNamespaces=yes",
    "RestrictRealtime=yes",
    "RestrictSUIDSGID=yes",
    "RemoveIPC=yes",
    "LockPersonality=yes",
    "KeyringMode=private",
    "SystemCallArchitectures=native",
    "SystemCallFilter=@system-service",
    "SystemCallFilter=~@privileged",
    "SystemCallErrorNumber=EPERM",
]

_USER_HARDENING = [
    "UMask=0027",
    "# A user's manager has no right to name spaces on every machine; these need none.",
    "NoNewPrivileges=yes",
    "RestrictRealtime=yes",
    "LockPersonality=yes",
    "SystemCallArchitectures=native",
]

_DROP_INS = {
    DropIn.DOWNLOADS: """\
# Lets Dropforge fetch a base model from the Hub ([model] allow_downloads = true). Everything may be reached: the Hub's
# addresses change, and systemd knows no names.
[Service]
PrivateNetwork=no
IPAddressDeny=
IPAddressAllow=any
RestrictAddressFamilies=AF_INET AF_INET6
Environment=HF_HUB_OFFLINE=0
""",
    DropIn.METRICS: """\
# Lets Prometheus reach [metrics] port on 127.0.0.1; nothing outside this machine can be reached. With [metrics] textfile
# alone none of this is needed.
[Service]
PrivateNetwork=no
IPAddressDeny=any
IPAddressAllow=localhost
RestrictAddressFamilies=AF_INET
""",
    DropIn.NVIDIA: """\
# Opens the devices of NVIDIA GPUs, and no others.
[Unit]
# The daemon has no right to make the device nodes; the persistence daemon does, before it starts.
Wants=nvidia-persistenced.service
After=nvidia-persistenced.service

[Service]
PrivateDevices=no
DevicePolicy=closed
DeviceAllow=char-nvidia* rw
""",
}


def _paths(unit: Unit) -> list[str]:
    writable = [*unit.outside] if unit.state_directory is not None else [unit.root, *unit.outside]
    lines = []
    if unit.homes:
        lines += ["# Part of this installation lies in a home.", "ProtectHome=read-only"]
    else:
        lines += ["ProtectHome=yes"]
    lines += [f"ReadWritePaths={_quoted(str(path))}" for path in writable]
    return lines


def _install(target: str) -> list[str]:
    return ["", "[Install]", f"WantedBy={target}", ""]


def _command(unit: Unit) -> str:
    return " ".join(_quoted(word, dollar=True) for word in command(unit.python, unit.root))


def command(python: Path, root: Path) -> Sequence[str]:
    """The daemon's command line. -P: a folder `daemon` in the working directory is not ours."""
    return [str(python), "-P", "-m", "daemon", "--root", str(root), "run"]


def _quoted(word: str, *, dollar: bool = False) -> str:
    """A word as systemd.syntax(7) reads it."""
    text = _setting(word).replace("\\", "\\\\").replace('"', '\\"')
    if dollar:
        text = text.replace("$", "$$")
    return f'"{text}"' if set(text) & set(" \t'\"") else text


def _setting(path: Path | str) -> str:
    """A path in a setting that takes the rest of its line; % is itself but for the two specifiers that units mean."""
    return str(path).replace("%", "%%").replace("%%i", "%i").replace("%%h", "%h")
