"""Look, before a unit is written, whether the service's account can run this interpreter under the unit's protections."""

from __future__ import annotations

import os
import pwd
import stat
import subprocess
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from daemon.cli.systemd.units import ACCOUNT, Unit, UnitKind

OWN_FOLDERS = (Path("/tmp"), Path("/var/tmp"))  # noqa: S108  what PrivateTmp= replaces
NOBODY = 65_534  # an account that does not exist yet has the rights of everybody
LOOK_SECONDS = 120.0
ELSEWHERE = (
    "install Dropforge where every account may go: `python3 -m venv /opt/dropforge/.venv` by a Python that lies in no home,"
    " `pip install` there, and run its `dropforge service install`"
)
# What the daemon imports, and what its trainer will: those are looked up, which takes no seconds.
_PROBE = """
import importlib.util, daemon.service
for name in ("torch", "transformers", "peft"):
    if importlib.util.find_spec(name) is None:
        raise SystemExit(f"it does not find the package {name}")
"""


@dataclass(frozen=True, kw_only=True)
class Account:
    """Whose rights count."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Obstacle:
    """Why a service would not start: a sentence, and what to do."""

    message: str
    hint: str


def service_account(name: str = ACCOUNT) -> Account:
    """Return the service's account; one that is not made yet may do what everybody may."""
    try:
        found = pwd.getpwnam(name)
    except KeyError:
        return Account(name=name, uid=NOBODY, gid=NOBODY, groups=())
    groups = tuple(os.getgrouplist(found.pw_name, found.pw_gid))
    return Account(name=name, uid=found.pw_uid, gid=found.pw_gid, groups=groups)


def find_obstacle(
    unit: Unit, account: Account, *, program: Path, base_prefix: Path, executed: bool, environment: Mapping[str, str]
) -> Obstacle | None:
    """Return what keeps the service from starting, None when nothing is seen; a user's own unit needs no look.

    `program`: of [executor]. `executed`: run the interpreter as that account, which takes root, besides looking at modes.
    """
    if unit.kind is UnitKind.USER:
        return None
    for path in (unit.python, base_prefix, unit.root, program):
        folder = next((folder for folder in OWN_FOLDERS if path.is_relative_to(folder)), None)
        if folder is not None:
            what = f"{path} lies in {folder}, and the unit has a {folder} of its own (PrivateTmp)"
            return Obstacle(message=what, hint="choose another --root" if path == unit.root else ELSEWHERE)
    for path in dict.fromkeys((unit.python, unit.python.resolve(), base_prefix / "lib", program)):
        closed = closed_to(path, account.uid, {account.gid, *account.groups})
        if closed is not None:
            return Obstacle(message=f"{account.name} cannot run {path}: {closed} is closed to it", hint=ELSEWHERE)
    said = _run_as(account, unit.python, environment) if executed else ""
    return Obstacle(message=f"{account.name} cannot run {unit.python}: {said}", hint=ELSEWHERE) if said else None


def closed_to(path: Path, uid: int, groups: Collection[int]) -> Path | None:
    """Return the first part of an absolute path that an account may not go through, or not run or read; None when it may.

    By modes alone: an access control list may close or open more.
    """
    for part in [*reversed(path.parents), path]:
        try:
            found = part.stat()
        except FileNotFoundError:
            return None
        except OSError:
            return part
        needed = stat.S_IXOTH | (stat.S_IROTH if part == path else 0)
        shift = 6 if found.st_uid == uid else 3 if found.st_gid in groups else 0
        if found.st_mode >> shift & needed != needed:
            return part
    return None


def _run_as(account: Account, python: Path, environment: Mapping[str, str]) -> str:
    """Run the interpreter as the account; returns why it cannot, empty when it can."""
    variables = {name: value for name, value in environment.items() if not name.startswith("PYTHON")}
    try:
        done = subprocess.run(
            [str(python), "-P", "-B", "-c", _PROBE],
            user=account.uid,
            group=account.gid,
            extra_groups=list(account.groups),
            cwd="/",
            env={**variables, "HOME": "/"},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=LOOK_SECONDS,
            check=False,
        )
    except OSError as error:
        return (error.strerror or str(error)).lower()
    except subprocess.TimeoutExpired:
        return f"it had not imported the daemon after {LOOK_SECONDS:.0f} s"
    return (done.stderr.strip().splitlines() or ["it ended without a word"])[-1] if done.returncode else ""
