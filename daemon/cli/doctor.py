"""`dropforge doctor`: what would bite, before it does. Each check gives one finding: ok, warn or fail, and what to do.

It looks as the user who runs it; run it as the service's user to learn what the service will meet.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, packages_distributions, requires, version
from pathlib import Path
from typing import Any

from daemon import config, verification, versions
from daemon.base_identity import base_problem, find_base, hub_folder
from daemon.cli.account import access_to, require_reader
from daemon.config import Settings
from daemon.errors import ConfigError, DropforgeError
from daemon.evaluation.evals import read_evals, why_unused
from daemon.holds import TRAINING_PACKAGES, unusable_trainer
from daemon.inbox.layout import UNFINISHED_SECONDS, NameKind, name_kind, watched_folders
from daemon.inbox.other_files import UNFINISHED, explain_other_name, names_unfinished_dataset
from daemon.inbox.strays import find_strays
from daemon.inbox.watcher import mounted_type, remote_type
from daemon.notice_sender import MISSING, read_urls
from daemon.processes import account_name, group_name
from daemon.text import escape, format_bytes

IMPORT_TIMEOUT_SECONDS = 120.0
LEAST_FREE_BYTES, LITTLE_FREE_BYTES = 2**30, 10 * 2**30
LEAST_INOTIFY_WATCHES, LEAST_INOTIFY_INSTANCES = 1024, 16
OLDEST_SYSTEMD = 252
SHOWN_FILES = 10  # of the inbox
EARLIEST_CLOCK = 1_767_225_600  # 2026: a clock before this was never set
# What a trainer would meet; in a process of its own, because only the trainer's packages import torch.
_PROBE = """
import json, torch, transformers, peft
found = {"torch": torch.__version__, "cuda": torch.version.cuda, "devices": []}
if torch.cuda.is_available():
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        found["devices"].append([torch.cuda.get_device_name(number), free, total])
print(json.dumps(found))
"""


class Severity(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line."""

    name: str
    verdict: Severity
    message: str
    hint: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For --json, where the message has the key `told`."""
        return {"name": self.name, "verdict": self.verdict, "told": self.message, "hint": self.hint}


def examine(root: Path, *, verify: bool = False) -> list[Finding]:
    """Run every check on `root`; a check that breaks is a finding itself.

    With `verify` it is the root's contents that are checked, and nothing of the machine.
    """
    try:
        require_reader(root)
        settings = config.load(root)
    except DropforgeError as error:
        return [_fail("settings", error.sentence, error.hint), *_guarded("python", _python, None)]
    found = [_ok("settings", f"{root / config.CONFIG_NAME} is valid")]
    if not (root / config.CONFIG_NAME).exists():
        found = [_warn("settings", f"{root} has no {config.CONFIG_NAME}: all is at its default", "`dropforge init`")]
    for name, check in ({"kept": _kept_now} if verify else CHECKS).items():
        found += _guarded(name, check, settings)
    return found


def before_run(settings: Settings) -> list[Finding]:
    """Return what fails of the checks that cost nothing: what a daemon that starts now would be held for."""
    found = [finding for name in BEFORE_RUN for finding in _guarded(name, CHECKS[name], settings)]
    return [finding for finding in found if finding.verdict is Severity.FAIL]


def _guarded(name: str, check: Callable[[Any], Iterator[Finding]], settings: Settings | None) -> list[Finding]:
    try:
        return list(check(settings))
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        return [_warn(name, f"could not be checked: {error}", "")]


def _python(settings: Settings | None) -> Iterator[Finding]:
    message = f"Python {sys.version.split()[0]}, dropforge {_version('dropforge') or 'not installed as a package'}"
    yield (
        _ok("python", message)
        if sys.version_info >= (3, 11)
        else _fail("python", message, "Python 3.11 or newer is needed")
    )


def _packages(settings: Settings) -> Iterator[Finding]:
    for other in sorted(set(packages_distributions().get("daemon", ())) - {"dropforge"}):
        message = f"{other} {_version(other)} has the import name `daemon` too: the one installed last overwrote a file of both"
        yield _warn("packages", message, "install dropforge into a virtual environment of its own")
    ours = tuple(settings.executor.command) == tuple(config.ExecutorSettings().command)
    missing = [name for name in TRAINING_PACKAGES if _version(name) is None]
    message = ", ".join(f"{name} {_version(name)}" for name in TRAINING_PACKAGES if _version(name))
    for name, found, least in _too_old():
        yield _fail("packages", f"{name} {found} is older than {least}", f"`pip install --upgrade '{name}>={least}'`")
    if missing and not ours:
        yield _ok("packages", f"the trainer has an environment of its own: {' '.join(settings.executor.command[:1])}")
    elif not missing:
        yield _ok("packages", message)


def _trainer(settings: Settings) -> Iterator[Finding]:
    if (hold := unusable_trainer(settings)) is not None:
        message, _, hint = hold.reason.partition("; ")
        yield _fail("trainer", message, hint)


def _gpu(settings: Settings) -> Iterator[Finding]:
    driver = Path("/proc/driver/nvidia/version")
    has_card = driver.exists() or any(Path("/dev").glob("nvidia[0-9]*"))
    if _version("torch") is None:
        return
    done = subprocess.run(
        [sys.executable, "-P", "-c", _PROBE],
        capture_output=True,
        text=True,
        timeout=IMPORT_TIMEOUT_SECONDS,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        yield _fail("torch", f"cannot be imported: {last}", "reinstall the training packages: `make setup`")
        return
    found = json.loads(done.stdout.splitlines()[-1])
    if found["devices"]:
        for name, free, total in found["devices"]:
            yield _ok("gpu", f"{name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, CUDA {found['cuda']}")
    elif has_card:
        message = f"there is an NVIDIA card, but torch {found['torch']} (CUDA {found['cuda']}) does not see it"
        yield _fail("gpu", message, "is torch a build for this driver's CUDA? May this user open /dev/nvidia*?")
    else:
        yield _warn("gpu", "no GPU: training runs on the CPU", "fine for a first try; real models want a GPU")
    if driver.exists():
        yield _ok("driver", driver.read_text(encoding="utf-8", errors="replace").splitlines()[0])


def _disk(settings: Settings) -> Iterator[Finding]:
    seen: set[int] = set()
    for folder in (settings.model_dir, settings.inbox_dir, settings.state_dir):
        existing = _nearest(folder)
        device = existing.stat().st_dev
        if device in seen:
            continue
        seen.add(device)
        free = shutil.disk_usage(existing).free
        message = f"{free / 2**30:.1f} GiB free for {folder}"
        if free < LEAST_FREE_BYTES:
            yield _fail("disk", message, "checkpoints need room; free some, or move [paths] to another disk")
        elif free < LITTLE_FREE_BYTES:
            yield _warn("disk", message, "a large model's checkpoints may not fit")
        else:
            yield _ok("disk", message)


def _inotify(settings: Settings) -> Iterator[Finding]:
    limits = Path("/proc/sys/fs/inotify")
    watches = int((limits / "max_user_watches").read_text())
    instances = int((limits / "max_user_instances").read_text())
    message = f"{watches} watches, {instances} instances a user"
    if watches < LEAST_INOTIFY_WATCHES or instances < LEAST_INOTIFY_INSTANCES:
        yield _warn("inotify", message, "`sysctl fs.inotify.max_user_watches=65536 fs.inotify.max_user_instances=256`")
    else:
        yield _ok("inotify", message)


def _inbox(settings: Settings) -> Iterator[Finding]:
    folder = settings.inbox_dir
    if not folder.is_dir():
        yield _warn("inbox", f"{folder} does not exist", "the daemon makes it at its start")
        return
    kind = remote_type(folder)
    if kind is not None:
        yield _warn(
            "inbox", f"{folder} is on {kind}, which tells of no changes: it is polled", "a local disk is quicker"
        )
    else:
        yield _ok("inbox", f"{folder} is on {mounted_type(folder) or 'a file system'}, which tells of changes")


def _dropped(settings: Settings) -> Iterator[Finding]:
    """What lies in the inbox and is not taken as it is."""
    message = [f"{escape(stray.folder)}/{escape(stray.name)}: {stray.reason}" for stray in find_strays(settings)]
    for folder in watched_folders(settings).values():
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if (reason := _why_not_taken(path)) is not None:
                message.append(f"{escape(str(path.relative_to(settings.inbox_dir)))}: {reason}")
    for line in message[:SHOWN_FILES]:
        yield _warn("inbox", line, "")
    if len(message) > SHOWN_FILES:
        yield _warn("inbox", f"and {len(message) - SHOWN_FILES} more files that are not taken as they are", "")


def _why_not_taken(path: Path) -> str | None:
    """Why a dataset in the inbox is not taken; None when it is, or when it is none."""
    kind = name_kind(path.name)
    if kind is NameKind.DATA:
        if path.is_symlink() or not path.is_file():
            return "only regular files are trained"
        return None if os.access(path, os.R_OK) else f"{account_name(os.geteuid())} may not read it"
    if kind is NameKind.UNFINISHED:
        old = names_unfinished_dataset(path.name) and time.time() - path.lstat().st_mtime > UNFINISHED_SECONDS
        return UNFINISHED if old else None
    other = explain_other_name(path.name)
    return other.reason if kind is NameKind.OTHER and other.meant else None


def _permissions(settings: Settings) -> Iterator[Finding]:
    access = access_to(settings)
    closed = [
        str(folder)
        for folder in (settings.inbox_dir, settings.model_dir, settings.state_dir)
        if not os.access(_nearest(folder), os.W_OK | os.X_OK)
    ]
    if closed and not access.is_owner:
        hint = f"`{access.as_owner} --root {settings.root} doctor` sees what its daemon sees"
        yield _warn("permissions", f"this is {access.account}'s view; {access.sentence}", hint)
    elif closed:
        hint = (
            f"`chown -R {access.owner} {' '.join(map(shlex.quote, closed))}` as root, or mount what is read-only anew"
        )
        yield _fail("permissions", f"{access.account} may not write to {', '.join(closed)}", hint)
    else:
        yield _ok("permissions", f"{access.account} may write to inbox, model and state")
    owner = _nearest(settings.state_dir).stat().st_uid
    if os.geteuid() == 0 and owner != 0:  # root may do everything, which says nothing of the service
        message = f"this is root's view; {settings.state_dir} belongs to {account_name(owner)}"
        yield _warn(
            "permissions", message, f"`runuser -u {account_name(owner)} -- dropforge doctor` sees what the service sees"
        )
    key_file = settings.guard.key_file
    if (
        key_file is not None
        and (settings.root / key_file).exists()
        and (settings.root / key_file).stat().st_mode & 0o077
    ):
        yield _fail("key", f"{settings.root / key_file} is open to others", f"`chmod 600 {settings.root / key_file}`")
    config_path = settings.root / config.CONFIG_NAME
    if config_path.exists() and config_path.stat().st_mode & 0o022:
        group = group_name(config_path.stat().st_gid)
        message = f"{config_path} may be changed by others (group {group} or everybody): it names what the daemon runs"
        yield _warn("settings", message, f"`chmod go-w {config_path}`")


def _ownership(settings: Settings) -> Iterator[Finding]:
    """What in state and model directory belongs to another account than they do, as after one command as root."""
    if not settings.state_dir.exists():
        return
    owner = settings.state_dir.stat().st_uid
    foreign: list[Path] = []
    for part in (settings.state_dir, settings.model_dir):
        for folder, folders, files in os.walk(part):
            foreign += [path for name in (*folders, *files) if (path := Path(folder, name)).lstat().st_uid != owner]
    if not foreign:
        yield _ok("ownership", f"state and model belong to {account_name(owner)}, with all that is in them")
        return
    shown = ", ".join(escape(str(path)) for path in foreign[:3])
    what = "one file or folder does" if len(foreign) == 1 else f"{len(foreign)} files and folders do"
    yield _fail(
        "ownership",
        f"{what} not belong to {account_name(owner)}, as state/ does: {shown}",
        f"`chown -R {owner} {settings.state_dir} {settings.model_dir}` as root; run commands as {account_name(owner)}",
    )


def _model(settings: Settings) -> Iterator[Finding]:
    model = settings.recipe.model
    if (problem := base_problem(model)) is not None:
        yield _fail("model", problem.message, problem.hint)
    elif (base := find_base(model)) is not None:
        yield _ok("model", f"{model.model_name_or_path} is in {base.path}" if base.revision else str(base.path))
    else:
        message = (
            f"{model.model_name_or_path} is not in {hub_folder(model.model_name_or_path).parent}; it will be fetched"
        )
        yield _warn("model", message, "the service needs the drop-in downloads.conf")


def _places(settings: Settings) -> Iterator[Finding]:
    """Absolute paths, which a root that is moved does not take along."""
    named = {
        **{f"[paths] {name}": path for name, path in settings.paths},
        "[logging] folder": settings.logging.folder,
        "[guard] key_file": settings.guard.key_file,
    }
    for name, path in named.items():
        if path is None or not path.is_absolute() or path.is_relative_to(settings.root):
            continue
        message = f"{name} = {escape(str(path))} lies outside the root, and does not move along with it"
        if path.exists():
            yield _ok("places", message)
        else:
            yield _warn(
                "places", f"{message}; nothing is there", f"edit {settings.root / config.CONFIG_NAME}, or bring it"
            )
    with suppress(DropforgeError):  # which holds the queue, and is told there
        current = versions.current_version(settings.model_dir)
        base = versions.named_base(current)[0] if current is not None else ""
        if current is not None and Path(base).is_absolute() and not Path(base).is_dir():
            message = f"the adapter of version {current.name} names its base model {escape(base)}, which is not here"
            hint = "training goes on all the same, by the base's contents; programs that load the adapter need the base named"
            yield _warn("places", message, hint)


def _evals(settings: Settings) -> Iterator[Finding]:
    found = read_evals(settings.evals_dir)
    for problem in found.problems:
        yield _warn("evals", problem, "`dropforge evals` shows what is used")
    if found.usable:
        unused = why_unused(settings.evaluation, settings.gate)
        message = f"{len(found.usable)} evals, {sum(len(one.rows) for one in found.usable)} rows"
        yield _warn("evals", f"{message}: {unused}", "") if unused else _ok("evals", message)


def _clock(settings: Settings) -> Iterator[Finding]:
    if time.time() < EARLIEST_CLOCK:
        yield _fail("clock", f"it is {time.strftime('%Y-%m-%d')} here", "set the clock: `timedatectl set-ntp true`")
        return
    message = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    if Path("/run/systemd/system").is_dir() and not Path("/run/systemd/timesync/synchronized").exists():
        yield _ok("clock", f"{message}; not synchronised by systemd-timesyncd (another program may)")
    else:
        yield _ok("clock", message)


def _systemd(settings: Settings) -> Iterator[Finding]:
    if shutil.which("systemctl") is None:
        yield _warn("systemd", "it is not installed", "`dropforge run` under a supervisor of your own")
        return
    done = subprocess.run(["systemctl", "--version"], capture_output=True, text=True, timeout=20, check=False)
    words = done.stdout.split()
    number = int(words[1].split(".")[0]) if len(words) > 1 and words[1].split(".")[0].isdecimal() else 0
    if number < OLDEST_SYSTEMD:
        yield _warn(
            "systemd",
            f"version {number}",
            f"the unit is tried with {OLDEST_SYSTEMD} and newer; some hardening may be ignored",
        )
    else:
        yield _ok("systemd", f"version {number}")


def _kept_now(settings: Settings) -> Iterator[Finding]:
    """What versions, lineage, marks, base model and trained files are now."""
    found = verification.verify(settings)
    for problem in found.problems:
        yield _fail("kept", problem.message, problem.hint)
    if not found.problems:
        yield _ok("kept", _as_recorded(found))


def _kept_last(settings: Settings) -> Iterator[Finding]:
    """What the daemon's last check in the background found."""
    last = verification.read_verification(settings)
    if last is not None and last.problems:
        message = f"the check of {last.at} found: {last.problems[0].message}"
        more = f", and {len(last.problems) - 1} more" if len(last.problems) > 1 else ""
        yield _warn("kept", message + more, "`dropforge doctor --verify` looks again, and says what to do")
    elif last is not None:
        yield _ok("kept", f"{_as_recorded(last)} (checked at {last.at})")


def _as_recorded(found: verification.Verification) -> str:
    counts = f"{found.versions} versions and {found.datasets} trained files"
    return f"{counts}, {format_bytes(found.size_bytes)}, are as they were recorded"


def _notices(settings: Settings) -> Iterator[Finding]:
    if not (settings.notify.urls or settings.notify.urls_file):
        return
    if importlib.util.find_spec("apprise") is None:
        yield _warn("notices", MISSING, "")
    try:
        urls = read_urls(settings)
    except ConfigError as error:
        yield _warn("notices", error.sentence, error.hint)
        return
    path = settings.root / config.CONFIG_NAME
    if settings.notify.urls and path.stat().st_mode & 0o004:
        hint = f"write them into a file that only the service reads, and set urls_file; or `chmod o= {path}`"
        yield _warn("notices", f"every account can read the addresses under [notify] in {path}", hint)
    else:
        yield _ok("notices", f"{len(urls)} address{'es' if len(urls) != 1 else ''}; `dropforge notify test` tries them")


CHECKS: dict[str, Callable[[Any], Iterator[Finding]]] = {
    "python": _python,
    "packages": _packages,
    "trainer": _trainer,
    "gpu": _gpu,
    "disk": _disk,
    "inotify": _inotify,
    "inbox": _inbox,
    "dropped": _dropped,
    "permissions": _permissions,
    "ownership": _ownership,
    "model": _model,
    "places": _places,
    "evals": _evals,
    "clock": _clock,
    "notices": _notices,
    "systemd": _systemd,
    "kept": _kept_last,
}
BEFORE_RUN = ("trainer", "disk", "permissions", "model", "clock")


def _too_old() -> Iterator[tuple[str, str, str]]:
    """Name, version and least version of each installed package that is older than Dropforge's own metadata asks for."""
    try:
        wanted = requires("dropforge") or []
    except PackageNotFoundError:  # run from a checkout that was not installed
        return
    for requirement in wanted:
        match = re.match(r"([A-Za-z0-9_.-]+)>=([0-9.]+)", requirement)
        found = _version(match[1]) if match and "bench" not in requirement and "test" not in requirement else None
        if match and found and _numbers(found) < _numbers(match[2]):
            yield match[1], found, match[2]


def _numbers(text: str) -> tuple[int, ...]:
    """The numbers that a version begins with: 2.13.0+cpu is (2, 13, 0)."""
    return tuple(int(part) for part in re.match(r"[0-9.]*", text)[0].split(".") if part)  # type: ignore[index]


def _nearest(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _ok(name: str, message: str) -> Finding:
    return Finding(name=name, verdict=Severity.OK, message=message)


def _warn(name: str, message: str, hint: str) -> Finding:
    return Finding(name=name, verdict=Severity.WARN, message=message, hint=hint)


def _fail(name: str, message: str, hint: str) -> Finding:
    return Finding(name=name, verdict=Severity.FAIL, message=message, hint=hint)
