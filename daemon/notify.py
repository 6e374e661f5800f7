"""systemd's notification protocol: datagrams to the socket named by NOTIFY_SOCKET; without one, nothing happens."""

from __future__ import annotations

import os
import socket


def notify(*lines: str) -> bool:
    """Send `KEY=VALUE` lines in one datagram; True when there was somebody to tell."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        try:
            sender.sendto("\n".join(lines).encode("utf-8"), address)
        except OSError:
            return False  # a supervisor that went away must not take the service with it
    return True
