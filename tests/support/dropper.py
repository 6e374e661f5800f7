"""What another real user does: a forked child with that user's id, and none of our rights."""

from __future__ import annotations

import os
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ALICE, MALLORY = 61_001, 61_002
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as other users")


def act_as(user: int, action: Callable[[], object]) -> None:
    """Run `action` as this user, in a child; fails when it raises there."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
            os.umask(0o022)
            action()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, f"user {user} could not do it"


def drop_as(user: int, inbox: Path, name: str, content: str | bytes) -> None:
    """Write a file beside the inbox's others as this user, and rename it in."""

    def drop() -> None:
        hidden = inbox / f".{user}-{name}.part"
        hidden.write_bytes(content.encode() if isinstance(content, str) else content)
        hidden.rename(inbox / name)

    act_as(user, drop)


@contextmanager
def open_folder() -> Iterator[Path]:
    """A temporary folder that every user may enter, which pytest's own are not."""
    path = Path(tempfile.mkdtemp(prefix="dropforge-open-"))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path)


def share(inbox: Path) -> None:
    """Let every user drop, and none remove what is another's: as the installed service's inbox does for its group."""
    inbox.mkdir(exist_ok=True)
    for folder in (inbox, inbox / "high", inbox / "low"):
        folder.mkdir(exist_ok=True)
        folder.chmod(0o1777)
