"""What the account that types a command may do on a root, and how the account that may do more does it."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from daemon.config import CONFIG_NAME, Settings, find_root
from daemon.errors import ConfigError
from daemon.processes import account_name, group_name


@dataclass(frozen=True, kw_only=True)
class RootAccess:
    """An account on a root, which belongs to whom its state belongs to."""

    root: Path
    account_uid: int
    account: str
    owner: str
    owner_uid: int
    is_owner: bool
    may_read: bool  # status, queue and log
    may_drop: bool
    may_control: bool  # the queue, the model, the settings

    @property
    def as_owner(self) -> str:
        """How a command is typed as the owner."""
        return as_account(self.owner_uid)

    @property
    def run_hint(self) -> str:
        """Say how a daemon is started here, by this account or by the one that may."""
        if self.may_control and (self.is_owner or self.account_uid != 0):
            return f"`{typed(self.root, 'run')}` starts one"
        return f"{self.owner} starts one: `{self.as_owner} --root {self.root} run`, or its service"

    @property
    def sentence(self) -> str:
        """Say whose root it is and what this account may do there."""
        allowed = [word for word, may in (("read", self.may_read), ("drop files", self.may_drop)) if may]
        may = f"may {' and '.join(allowed)}, and no more" if allowed else "may neither read it nor drop files"
        return f"it belongs to {self.owner}, and {self.account} {may}"


def typed(root: Path, command: str) -> str:
    """Return how a command is typed here: with the root's name where it would not be found without."""
    return f"dropforge {command}" if root == find_root(None) else f"dropforge --root {shlex.quote(str(root))} {command}"


def as_account(uid: int) -> str:
    """How a command is typed as another account."""
    if uid == 0:
        return "sudo dropforge"
    name = account_name(uid)
    account = f"'#{uid}'" if " " in name else name
    return f"sudo -u {account} dropforge"


def access_to(settings: Settings) -> RootAccess:
    """Look at what this process may do on a root. Raises OSError."""
    home = settings.state_dir if settings.state_dir.exists() else settings.root
    store, inbox = settings.store_path, settings.inbox_dir
    owner, uid = home.stat().st_uid, os.geteuid()
    return RootAccess(
        root=settings.root,
        account_uid=uid,
        account=account_name(uid),
        owner=account_name(owner),
        owner_uid=owner,
        is_owner=uid == owner,
        may_read=os.access(home, os.R_OK | os.X_OK),
        may_drop=os.access(inbox if inbox.exists() else home, os.W_OK | os.X_OK),
        may_control=os.access(home, os.W_OK | os.X_OK) and (not store.exists() or os.access(store, os.W_OK)),
    )


def require_reader(root: Path) -> None:
    """Raise ConfigError for an account that may not enter a root or read its settings."""
    path = root / CONFIG_NAME
    try:
        closed = root if not os.access(root, os.R_OK | os.X_OK) else path
        if closed is path and (not path.exists() or os.access(path, os.R_OK)):
            return
        found = closed.stat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(operation="use", subject=root, cause=error.strerror or str(error)) from error
    account, owner, group = account_name(os.geteuid()), account_name(found.st_uid), group_name(found.st_gid)
    raise ConfigError(
        operation="use",
        subject=root,
        cause=f"{account} may not read {closed}, which belongs to {owner} and the group {group}",
        hint=f"root makes {account} a member of it: `usermod --append --groups {group} {account}`, then log in anew",
    )


def require_own_account(settings: Settings) -> None:
    """Raise ConfigError for an account that may not change this root, or would leave there what its owner may not.

    That is root as well, on the root of another account.
    """
    if not settings.root.exists():
        return
    try:
        access = access_to(settings)
    except OSError as error:
        raise ConfigError(operation="use", subject=settings.root, cause=error.strerror or str(error)) from error
    if os.geteuid() == 0:
        if access.is_owner:
            return
        raise ConfigError(
            operation="work as root on",
            subject=settings.root,
            cause=f"it belongs to {access.owner}, and what root makes there would keep its daemon out",
            hint=f"`{access.as_owner} ...`; or `chown -R root {settings.root}` if it shall be root's",
        )
    _require_control(access, "change")


def require_whole_view(settings: Settings, operation: str) -> None:
    """Raise ConfigError for an account that cannot read all of a root; root can. Raises OSError."""
    if settings.root.exists():
        _require_control(access_to(settings), operation)


def _require_control(access: RootAccess, operation: str) -> None:
    if not access.may_control:
        raise ConfigError(
            operation=operation,
            subject=access.root,
            cause=access.sentence,
            hint=f"who may become {access.owner} types `{access.as_owner} --root {access.root} ...`",
        )
