"""The kernel kills for want of memory, in a control group with a limit: ours is told from anybody else's."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from daemon.children import oom_kills
from tests.support.root import environment, wait_until

LIMIT_BYTES = 192 * 2**20
GREEDY = f"hoard = bytearray({2 * LIMIT_BYTES})"
# The daemon's part: a trainer is launched, and what its end is taken for is printed.
LAUNCH = """
import sys, time
from pathlib import Path
from daemon.executors.local import LocalExecutor
from tests.integration.test_train_executors import specify
folder, code = Path(sys.argv[1]), sys.argv[2]
executor = LocalExecutor((sys.executable, "-c", code))
executor.launch(specify(folder))
while (end := executor.poll(folder)) is None:
    time.sleep(0.01)
print(end.signal, end.out_of_memory)
"""
WAIT_FOR_KILL = (
    "import os, pathlib, sys, time; pathlib.Path(sys.argv[1], 'pid').write_text(str(os.getpid())); time.sleep(300)"
)


@contextmanager
def limited_group(bytes_: int) -> Iterator[Path]:
    """A control group whose processes get so much memory together."""
    old, new = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    group = (old if old.is_dir() else new) / f"dropforge-test-{uuid.uuid4().hex[:12]}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        try:
            (group / ("memory.limit_in_bytes" if old.is_dir() else "memory.max")).write_text(str(bytes_))
            with suppress(OSError):  # where there is no swap
                (group / ("memory.memsw.limit_in_bytes" if old.is_dir() else "memory.swap.max")).write_text(
                    str(bytes_ if old.is_dir() else 0)
                )
        except OSError as error:
            pytest.skip(f"control groups of this machine limit no memory: {error}")
        yield group
    finally:
        wait_until(lambda: not (group / "cgroup.procs").read_text(), what="the group to be empty")
        group.rmdir()


def start(group: Path, *command: str) -> subprocess.Popen[str]:
    """Run python with `command` as a process of the group."""
    join = "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid())); os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
    return subprocess.Popen(
        [sys.executable, "-c", join, str(group / "cgroup.procs"), *command],
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )


def test_a_trainer_that_the_kernel_killed_for_its_memory_is_told_so(tmp_path: Path) -> None:
    before = oom_kills()
    with limited_group(LIMIT_BYTES) as group, start(group, "-c", LAUNCH, str(tmp_path), GREEDY) as daemon:
        assert daemon.communicate(timeout=60)[0].split() == ["9", "True"]
    assert oom_kills() == before  # this process is of another group


def test_a_kill_beside_somebody_elses_want_of_memory_is_a_plain_kill(tmp_path: Path) -> None:
    with ExitStack() as stack:
        groups = [stack.enter_context(limited_group(LIMIT_BYTES)) for _ in range(2)]
        daemon = stack.enter_context(start(groups[0], "-c", LAUNCH, str(tmp_path), WAIT_FOR_KILL))
        wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), what="the trainer")
        with start(groups[1], "-c", GREEDY) as other:
            assert other.wait(timeout=60) == -9
        os.kill(int((tmp_path / "pid").read_text()), 9)
        assert daemon.communicate(timeout=60)[0].split() == ["9", "False"]


def test_a_machine_without_control_groups_has_one_count(tmp_path: Path) -> None:
    assert oom_kills(tmp_path, tmp_path) == 0
    (tmp_path / "vmstat").write_text("pgfault 7\noom_kill 3\n")
    assert oom_kills(tmp_path, tmp_path) == 3


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("0::/system.slice/dropforge.service", "system.slice/dropforge.service/memory.events"),
        ("0::/a/b", "unified/a/b/memory.events"),
        ("4:cpu,memory:/a/b", "memory/a/b/memory.oom_control"),
        ("0::/", "memory.events"),
    ],
)
def test_the_count_of_the_own_group_comes_first(tmp_path: Path, line: str, count: str) -> None:
    (tmp_path / "vmstat").write_text("oom_kill 3\n")
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "cgroup").write_text(f"9:name=systemd:/\n{line}\n")
    assert oom_kills(tmp_path, tmp_path / "groups") == 3  # a group without a count
    path = tmp_path / "groups" / count
    path.parent.mkdir(parents=True)
    path.write_text("oom 9\noom_kill 1\n")
    assert oom_kills(tmp_path, tmp_path / "groups") == 1
