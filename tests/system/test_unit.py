"""The service unit, as systemd reads it, and the notifications that it relies on."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from daemon import sd_notify
from daemon.cli.systemd import units
from daemon.cli.systemd.units import DropIn, Unit, UnitKind
from tests.support.root import DROPFORGE, Root, environment, wait_until


def variants() -> list[Unit]:
    python = Path(sys.executable)
    return [
        Unit(kind=UnitKind.SYSTEM, python=python),
        Unit(kind=UnitKind.TEMPLATE, python=python, root=Path("/var/lib/dropforge-%i")),
        Unit(kind=UnitKind.USER, python=python, root=Path("/tmp/forge")),
        Unit(
            kind=UnitKind.SYSTEM, python=python, root=Path('/srv/a "quoted" 100% $root'), outside=(Path("/mnt/in box"),)
        ),
        Unit(kind=UnitKind.SYSTEM, python=python, root=Path("/home/alice/forge")),
    ]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("unit", variants(), ids=lambda unit: f"{unit.kind} {unit.root.name}")
@pytest.mark.parametrize("drop_ins", [(), tuple(DropIn)], ids=["closed", "open"])
def test_every_unit_is_accepted_without_a_word(tmp_path: Path, unit: Unit, drop_ins: tuple[DropIn, ...]) -> None:
    """`verify` exits 0 on unknown keys and bad values too, so its silence is what counts."""
    name = unit.name.replace("@", "@x")
    (tmp_path / name).write_text(units.render_unit(unit))
    for kind in drop_ins if unit.kind is not UnitKind.USER else ():
        folder = tmp_path / f"{name}.d"
        folder.mkdir(exist_ok=True)
        (folder / f"{kind}.conf").write_text(units.drop_in(kind))
    mode = ["--user"] if unit.kind is UnitKind.USER else []
    done = subprocess.run(
        ["systemd-analyze", *mode, "--man=no", "verify", str(tmp_path / name)],
        capture_output=True,
        text=True,
        check=False,
        env={**environment(), "XDG_RUNTIME_DIR": str(tmp_path)},
    )
    said = [line for line in (done.stdout + done.stderr).splitlines() if "dropforge" in line or str(tmp_path) in line]
    assert (done.returncode, said) == (0, [])


def test_a_unit_that_is_wrong_is_not_accepted_without_a_word(tmp_path: Path) -> None:
    """What the test above relies on."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / "dropforge.service"
    unit.write_text(
        units.render_unit(Unit(kind=UnitKind.SYSTEM, python=Path(sys.executable))) + "[Service]\nNoSuchKey=1\n"
    )
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert "NoSuchKey" in done.stderr


def test_each_directive_that_is_left_out_has_its_reason() -> None:
    text = units.render_unit(Unit(kind=UnitKind.SYSTEM))
    for directive in ("MemoryDenyWriteExecute", "ProcSubset", "DynamicUser", "RootDirectory", "~@resources"):
        assert re.search(rf"^#\s+.*{directive}.*\w+", text, re.MULTILINE)
        assert not re.search(rf"^{directive}=", text, re.MULTILINE)


def test_what_lies_outside_the_root_or_in_a_home_is_opened_and_nothing_else() -> None:
    text = units.render_unit(Unit(kind=UnitKind.SYSTEM, root=Path("/srv/forge"), outside=(Path("/mnt/in box"),)))
    assert "ReadWritePaths=/srv/forge\n" in text
    assert 'ReadWritePaths="/mnt/in box"' in text
    assert "ProtectHome=yes" in text
    assert "StateDirectory=" not in text
    assert "ProtectHome=read-only" in units.render_unit(Unit(kind=UnitKind.SYSTEM, root=Path("/home/a/forge")))


def test_what_is_told_to_systemd_is_one_line_of_text_that_it_takes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A newline would begin a message of its own; bytes that are no UTF-8 would make systemd drop all of it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        assert sd_notify.notify(sd_notify.status_line("training", "häßlich \udcff\nREADY=1" + "x" * 1000), "WATCHDOG=1")
        first, second = listener.recv(65_536).decode("utf-8").split("\n")
    assert first.startswith("STATUS=training: häßlich")
    assert len(first) < 250
    assert second == "WATCHDOG=1"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "3000000"}, 3.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
    ],
)
def test_the_watchdog_s_patience_is_read_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: float | None
) -> None:
    for name in ("WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert sd_notify.watchdog_seconds() == expected


def test_systemd_is_told_when_it_is_ready_alive_and_stopping(make_root: Callable[..., Root], tmp_path: Path) -> None:
    root = make_root(behaviour={})
    address = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(address))
        listener.settimeout(30)
        daemon = subprocess.Popen(
            [*DROPFORGE, "--root", str(root.path), "run"],
            env={**environment(), "NOTIFY_SOCKET": str(address)},
            stderr=subprocess.DEVNULL,
        )
        try:
            heard: list[str] = []

            def hears(line: str) -> Callable[[], bool]:
                def heard_it() -> bool:
                    heard.extend(listener.recv(4096).decode().splitlines())
                    return line in heard

                return heard_it

            wait_until(hears("READY=1"))
            # Ready means that the inbox is watched and recovery is done.
            assert any(event["event"] == "daemon.started" for event in root.log())
            wait_until(hears("WATCHDOG=1"))
            daemon.send_signal(signal.SIGTERM)
            wait_until(hears("STOPPING=1"))
            assert daemon.wait(30) == 0
        finally:
            daemon.kill()
            daemon.wait()
    assert os.environ.get("NOTIFY_SOCKET") is None
