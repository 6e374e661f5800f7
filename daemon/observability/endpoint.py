"""Whether this process may open an endpoint, or reach one, asked before a restart would have to."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

_FORBIDDEN = frozenset({errno.EAFNOSUPPORT, errno.EPERM, errno.EACCES})
_NETWORK = Path("/proc/self/net")


def port_problem(port: int) -> str:
    """Say why metrics could not be served on this port; empty when they could."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(("127.0.0.1", port))
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        hint = forbidden("metrics.conf") if error.errno in _FORBIDDEN else "choose another [metrics] port"
        return f"this daemon cannot open [metrics] port {port} ({why}); {hint}"
    if has_private_network():
        what = f"nobody can reach [metrics] port {port}: this daemon has a network of its own (PrivateNetwork=)"
        return f"{what}; {forbidden('metrics.conf')}"
    return ""


def forbidden(drop_in: str) -> str:
    """Return what to do about a unit that keeps its service from the network."""
    return f"its unit forbids that: `dropforge service install` adds the drop-in {drop_in}, which a restart applies"


def is_cut_off() -> bool:
    """Whether the unit of this process keeps it from the network, as far as can be seen."""
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM).close()
    except OSError as error:
        return error.errno in _FORBIDDEN
    return has_private_network()


def has_private_network() -> bool:
    """Whether this process has nothing but a loopback interface that its service manager does not share.

    The manager's socket is listed in the manager's own network alone; a container has other interfaces as well.
    """
    manager = os.environ.get("NOTIFY_SOCKET", "")
    try:
        interfaces = (_NETWORK / "dev").read_text(encoding="ascii", errors="replace").splitlines()[2:]
        sockets = (_NETWORK / "unix").read_bytes().splitlines()
    except OSError:
        return False
    if not manager.startswith("/") or any(line.split(":")[0].strip() != "lo" for line in interfaces):
        return False
    return not any(line.endswith(b" " + os.fsencode(manager)) for line in sockets)
