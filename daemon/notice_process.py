"""`python -m daemon.notice_process`: send one notice through Apprise, in a process of its own.

It reads one JSON object from stdin, `{"urls", "title", "body"}`: addresses hold passwords and are on no command line. It prints one,
`{"refused": [...], "said": [...]}`: the services that did not take it, without secrets, and what Apprise said meanwhile, which
may hold some and is for the administrator's own terminal.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any
from urllib.parse import urlsplit

from daemon.processes import die_with_parent

TRIES = 3
PAUSE_SECONDS = 2.0  # between two tries; services drop a connection now and then
MOST_SAID = 20


class _Said(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines = [*self.lines, record.getMessage()][-MOST_SAID:]


def main() -> None:
    """Send what stdin says. Returns exit code 0 where every service took it, else 1."""
    die_with_parent()
    asked = json.load(sys.stdin)
    from apprise import Apprise, NotifyFormat

    said = _Said()
    logging.getLogger("apprise").addHandler(said)
    refused = []
    for number, url in enumerate(asked["urls"], 1):
        service = Apprise.instantiate(url, suppress_exceptions=True)
        if service is None:
            refused.append(f"address {number}, which is none that Apprise knows")
        elif not _send(service, asked["title"], asked["body"], NotifyFormat.TEXT):
            refused.append(f"address {number}, {service.service_name}{_host(service, url)}")
    print(json.dumps({"refused": refused, "said": said.lines}))
    raise SystemExit(1 if refused else 0)


def _send(service: Any, title: str, body: str, form: Any) -> bool:
    for number in range(TRIES):
        if number:
            time.sleep(PAUSE_SECONDS)
        if service.notify(body=body, title=title, body_format=form):
            return True
    return False


def _host(service: Any, url: str) -> str:
    """Where it goes, when that is a machine's name and no secret: of many services that part of the address is a token."""
    is_plain = urlsplit(url).scheme in (
        "json",
        "jsons",
        "xml",
        "xmls",
        "form",
        "forms",
        "mailto",
        "mailtos",
        "ntfy",
        "ntfys",
    )
    host = getattr(service, "smtp_host", None) or getattr(service, "host", None)
    return f" at {host}" if is_plain and host else ""


if __name__ == "__main__":
    main()
