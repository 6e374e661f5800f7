"""A real sshd on the loopback, for the tools that copy and mount through it."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.root import wait_until

SERVER = """\
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
Subsystem sftp internal-sftp
"""
CLIENT = """\
Host there
    HostName 127.0.0.1
    Port {port}
    User {user}
    IdentityFile {folder}/user_key
    IdentitiesOnly yes
    StrictHostKeyChecking no
    UserKnownHostsFile {folder}/known_hosts
    LogLevel ERROR
"""


@contextmanager
def ssh_server(folder: Path) -> Iterator[Path]:
    """Yields a client configuration that knows the host `there`; skips where no server can run."""
    server = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")
    if server is None or shutil.which("ssh-keygen") is None:
        pytest.skip("openssh-server is not installed")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # what its unit makes: it drops its privileges there
    folder.mkdir()
    for name in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    facts = {"port": port, "folder": folder, "user": getpass.getuser()}
    (folder / "server").write_text(SERVER.format(**facts))
    (folder / "client").write_text(CLIENT.format(**facts))
    with (folder / "server.log").open("wb") as log:
        daemon = subprocess.Popen([server, "-D", "-e", "-f", folder / "server"], stderr=log)
    try:

        def answers() -> bool:
            assert daemon.poll() is None, (folder / "server.log").read_text()
            with socket.socket() as client:
                return client.connect_ex(("127.0.0.1", port)) == 0

        wait_until(answers, 20, "sshd to listen")
        yield folder / "client"
    finally:
        daemon.terminate()
        daemon.wait(20)
