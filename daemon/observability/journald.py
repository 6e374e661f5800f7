"""The journal's own protocol: one datagram an event, with its priority and each of its values as a field.

`journalctl -u dropforge DROPFORGE_JOB=...` then finds a job's events without reading text. Lines on stderr would be cut
at 48 KiB and know a priority alone.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import sys
from collections.abc import MutableMapping
from typing import Any

from daemon.observability import log_reader
from daemon.text import finite

SOCKET = "/run/systemd/journal/socket"
IDENTIFIER = "dropforge"
FIELD_CHARACTERS = 4000  # of one value; the file has all of it, and a datagram has to fit the socket's buffer
PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}


def is_stderr() -> bool:
    """Return whether stderr leads to the journal: JOURNAL_STREAM names its device and inode, as in systemd.exec(5)."""
    try:
        device, inode = os.environ.get("JOURNAL_STREAM", "").split(":")
        stderr = os.fstat(2)
        return (stderr.st_dev, stderr.st_ino) == (int(device), int(inode)) and os.path.exists(SOCKET)  # noqa: PTH110  a socket
    except (ValueError, OSError):
        return False


class JournalHandler(logging.Handler):
    """Sends what `render` made; an event that the journal does not take goes to stderr, which leads there as well."""

    def __init__(self, address: str = SOCKET) -> None:
        super().__init__()
        self._address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)

    def emit(self, record: logging.LogRecord) -> None:
        """Send one event."""
        try:
            self._socket.sendto(self.format(record).encode("latin-1"), self._address)
        except Exception as error:  # a log that fails must not end the daemon
            print(f"<4>not in the journal ({error}): {record.getMessage()!a:.2000}", file=sys.stderr)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
        super().close()


def render(logger: Any, name: str, event: MutableMapping[str, Any]) -> str:
    """Return the event as a datagram: MESSAGE for people, PRIORITY, and DROPFORGE_* fields.

    Each character is one byte of it: formatters speak in texts.
    """
    event.pop("timestamp", None)  # the journal has its own
    level = str(event.get("level", "info"))
    fields = {
        "MESSAGE": log_reader.format_data(finite(event), most=FIELD_CHARACTERS),
        "PRIORITY": str(PRIORITIES.get(level, 6)),
        "SYSLOG_IDENTIFIER": IDENTIFIER,
    }
    for key, value in finite(event).items():
        field = "DROPFORGE_" + re.sub(r"[^A-Z0-9_]", "_", str(key).upper())[:50]
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        fields[field] = text[:FIELD_CHARACTERS]
    return b"".join(_field(key, value) for key, value in fields.items()).decode("latin-1")


def _field(key: str, value: str) -> bytes:
    """`KEY=value`, or with its length when it has line ends, so that no value can begin a field of its own."""
    data = value.encode("utf-8", "backslashreplace")
    if b"\n" not in data:
        return key.encode() + b"=" + data + b"\n"
    return key.encode() + b"\n" + len(data).to_bytes(8, "little") + data + b"\n"
