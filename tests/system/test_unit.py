"""The service unit, as systemd reads it, and the notifications that it relies on."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.root import DROPFORGE, REPOSITORY, Root, environment, wait_until


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_the_unit_is_accepted_without_a_word(tmp_path: Path) -> None:
    """`verify` exits 0 on unknown keys and bad values too, so its silence is what counts."""
    program = Path(sys.executable).with_name("dropforge")
    text = (REPOSITORY / "systemd" / "dropforge.service").read_text()
    assert "/opt/dropforge/.venv/bin/dropforge" in text
    unit = tmp_path / "dropforge.service"
    unit.write_text(text.replace("/opt/dropforge/.venv/bin/dropforge", str(program)))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    said = [line for line in (done.stdout + done.stderr).splitlines() if "dropforge" in line]
    assert (done.returncode, said) == (0, [])


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
