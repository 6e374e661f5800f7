"""Whether this process may open an endpoint, asked before a restart would have to."""

from __future__ import annotations

import errno
import socket

_FORBIDDEN = frozenset({errno.EAFNOSUPPORT, errno.EPERM, errno.EACCES})


def port_problem(port: int) -> str:
    """Say why metrics could not be served on this port; empty when they could."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(("127.0.0.1", port))
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        hint = (
            "its unit forbids that: `dropforge service install` adds the drop-in metrics.conf, which a restart applies"
            if error.errno in _FORBIDDEN
            else "choose another [metrics] port"
        )
        return f"this daemon cannot open [metrics] port {port} ({why}); {hint}"
    return ""
