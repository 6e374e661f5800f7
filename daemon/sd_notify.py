"""systemd's notification protocol: datagrams to the socket named by NOTIFY_SOCKET; without one, nothing happens."""

from __future__ import annotations

import os
import socket
import time

STATUS_CHARACTERS = 200


def notify(*lines: str) -> bool:
    """Send `KEY=VALUE` lines in one datagram; returns whether a supervisor took it."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    # A newline within a value would begin a message of its own; systemd drops what is not UTF-8.
    text = "\n".join(" ".join(line.splitlines()) for line in lines)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        try:
            sender.sendto(text.encode("utf-8", "backslashreplace"), address)
        except OSError:
            return False  # a supervisor that went away must not take the service with it
    return True


def status_line(status: str, reason: str = "") -> str:
    """Return `STATUS=` for `systemctl status`: one line of bounded length."""
    text = f"{status}: {reason}" if reason else status
    return f"STATUS={text if len(text) <= STATUS_CHARACTERS else text[: STATUS_CHARACTERS - 1] + '…'}"


def reloading() -> tuple[str, str]:
    """Return the lines that announce a reload to Type=notify-reload; READY=1 ends it."""
    return "RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}"


def extend_timeout(seconds: float) -> str:
    """Ask systemd for so much more time to start or stop, counted from now."""
    return f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}"


def watchdog_seconds() -> float | None:
    """Return how often at least WATCHDOG=1 has to come, in seconds; None without a watchdog."""
    try:
        limit = int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6
        pid = int(os.environ.get("WATCHDOG_PID") or os.getpid())
    except ValueError:
        return None
    return limit if limit > 0 and pid == os.getpid() else None
