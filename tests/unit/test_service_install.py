"""`service install`: it looks whether the service could start, and says of a second one what changed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon.cli.admin import install_report
from daemon.cli.systemd import install
from daemon.cli.systemd.look import NOBODY, Account, closed_to, find_obstacle
from daemon.cli.systemd.units import DropIn, Unit, UnitKind
from daemon.config import Settings

ACCOUNT = Account(name="dropforge", uid=NOBODY, gid=NOBODY, groups=())
USR = Path("/usr")


def obstacle(python: Path, *, kind: UnitKind = UnitKind.SYSTEM, executed: bool = False, root: str = "/srv/x") -> str:
    unit = Unit(kind=kind, python=python, root=Path(root))
    found = find_obstacle(
        unit, ACCOUNT, program=python, base_prefix=USR, executed=executed, environment={"PATH": os.environ["PATH"]}
    )
    return "" if found is None else f"{found.message}; {found.hint}"


@pytest.fixture
def programs() -> Iterator[Path]:
    """A folder that lies neither in a home nor in /tmp, which the unit replaces."""
    folder = Path(f"/var/lib/dropforge-test-{os.getpid()}")
    try:
        folder.mkdir(mode=0o755)
    except OSError:
        pytest.skip("making a folder outside /tmp and homes takes root")
    yield folder
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


def program(path: Path, script: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_an_interpreter_in_a_closed_home_is_refused_with_the_folder_that_is_closed(programs: Path) -> None:
    python = program(programs / "alice" / "python", "exit 0")
    assert obstacle(python) == ""
    python.parent.chmod(0o700)
    told = obstacle(python)
    assert f"dropforge cannot run {python}: {python.parent} is closed to it" in told
    assert "python3 -m venv /opt/dropforge/.venv" in told
    assert obstacle(python, kind=UnitKind.USER) == ""  # it runs as whoever installs it


def test_what_the_unit_s_own_tmp_would_hide_is_refused(tmp_path: Path) -> None:
    assert "the unit has a /tmp of its own" in obstacle(Path("/tmp/venv/bin/python"))
    assert "choose another --root" in obstacle(Path("/usr/bin/python3"), root="/var/tmp/forge")


@pytest.mark.skipif(os.geteuid() != 0, reason="running an interpreter as another account takes root")
def test_the_interpreter_is_run_as_the_account(programs: Path) -> None:
    whole = program(programs / "whole", 'test "$(id -u)" = 65534')
    assert obstacle(whole, executed=True) == ""
    torn = program(programs / "torn", "echo \"ModuleNotFoundError: No module named 'daemon'\" >&2; exit 1")
    assert f"cannot run {torn}: ModuleNotFoundError: No module named 'daemon'" in obstacle(torn, executed=True)


def test_modes_are_read_as_the_kernel_reads_them(programs: Path) -> None:
    path = program(programs / "a" / "b", "")
    for mode, uid, groups, expected in (
        (0o755, 1, (), None),
        (0o750, 1, (), path.parent),
        (0o750, 1, (os.getegid(),), None),
        (0o705, 1, (os.getegid(),), path.parent),  # the group's bits count for its members
        (0o700, os.geteuid(), (), None),
        (0o704, 1, (), path.parent),
    ):
        path.parent.chmod(mode)
        assert closed_to(path, uid, groups) == expected, oct(mode)


def test_a_second_install_says_what_changed_and_that_a_restart_applies_it(tmp_path: Path) -> None:
    root, units = Path("/srv/forge"), tmp_path / "units"
    first = install.plan_install(Settings(root=root), drop_ins=[DropIn.METRICS], directory=units)
    assert any(command.startswith("systemctl enable --now") for command in first.commands)
    first.execute()
    same = install.plan_install(Settings(root=root), drop_ins=[DropIn.METRICS], directory=units)
    said = list(install_report(same, dry_run=False))
    assert [line.split()[0] for line in said[:3]] == ["unchanged"] * 3
    assert said[-1] == "\nnothing changed: no restart is needed"
    slower = install.plan_install(Settings(root=root, queue={"stop_timeout": 500.0}), directory=units)
    said = list(install_report(slower, dry_run=False))
    assert said[:3] == [f"changed {units / 'dropforge.service'}", "  - TimeoutStopSec=90", "  + TimeoutStopSec=530"]
    assert f"left {units / 'dropforge.service.d' / 'metrics.conf'}, which the settings call for no more" in "\n".join(
        said
    )
    commands = [line.strip().partition("   #")[0] for line in said[said.index("\nnext:") + 1 :]]
    assert commands[0].endswith("config check")
    assert commands[1:] == ["systemctl daemon-reload", "systemctl restart dropforge.service"]
