"""Notices on their way: the real daemon, Apprise, an HTTP server of people's notices and an SMTP server."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.controller import Controller

from tests.support.root import Root, wait_until

pytest.importorskip("apprise", reason="apprise (extra notify) is not installed")


@contextmanager
def serving(port: int = 0, status: int = 200) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """A server that takes JSON, as ntfy does; yields its port and what it was given."""
    taken: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if status == 200:
                taken.append(content)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *values: Any) -> None:
            """Nothing on stderr."""

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1], taken
    finally:
        server.shutdown()
        server.server_close()


def test_people_are_told_in_summaries_of_what_failed_and_of_holds_and_their_end(make_root: Callable[..., Root]) -> None:
    with serving() as (port, taken):
        notify = {"urls": [f"json://localhost:{port}"], "held_seconds": 0, "summary_seconds": 0.2}
        root = make_root(behaviour={}, tables={"notify": notify})
        root.start()
        for number in range(40):
            root.drop(f"bad-{number}\n\x1b[31m.jsonl", b"no row\n")
        told = wait_until(
            lambda: sum(_rejected(notice) for notice in list(taken)) == 40 and list(taken), what="notices"
        )
        assert isinstance(told, list)
        assert len(told) < 20
        assert all("\x1b" not in notice["message"] for notice in told)
        assert root.run("pause").returncode == 0
        root.drop("good.jsonl", [{"text": "a row"}])
        wait_until(lambda: any("1 held" in notice["title"] for notice in taken), what="the hold")
        assert root.run("resume").returncode == 0
        wait_until(lambda: any("1 recovered" in notice["title"] for notice in taken), what="its end")


def _rejected(notice: dict[str, Any]) -> int:
    words = notice["title"].removeprefix("Dropforge: ").split(", ")
    return next((int(word.split()[0]) for word in words if word.endswith("rejected")), 0)


def test_a_notice_that_nobody_takes_is_told_in_the_status_and_kept(make_root: Callable[..., Root]) -> None:
    with serving(status=500) as (port, _):
        root = make_root(behaviour={}, tables={"notify": {"urls": [f"json://user:secret@localhost:{port}"]}})
        root.start()
        root.drop("bad.jsonl", b"no row\n")
        status = wait_until(lambda: (now := root.status()) and now["warnings"] and now, what="the warning")
        assert status
        assert "was not taken by address 1, JSON at localhost" in status["warnings"][0]
        assert "secret" not in status["warnings"][0]
        shown = root.run("config")
        assert "secret" not in shown.stdout
        assert "not shown" in shown.stdout


def test_mail_arrives_and_a_test_names_what_did_not(make_root: Callable[..., Root], tmp_path: Path) -> None:
    arrived: list[Any] = []

    class Handler:
        async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:  # noqa: N802
            arrived.append(message_from_bytes(envelope.content))
            return "250 taken"

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    controller = Controller(Handler(), hostname="127.0.0.1", port=port)
    controller.start()
    try:
        root = make_root(behaviour={})
        secrets = root.path / "addresses"
        secrets.write_text(f"mailto://localhost:{port}?from=forge@example.org&to=ada@example.org&mode=insecure\n")
        secrets.chmod(0o600)
        root.configure(notify={"urls_file": "addresses"})
        tested = root.run("notify", "test")
        assert (tested.returncode, tested.stdout) == (0, "taken by 1 of 1 addresses\n"), tested
        assert arrived[0]["To"] == "ada@example.org"
        assert arrived[0]["Subject"] == "Dropforge: a test"
        assert str(root.path) in arrived[0].get_payload(decode=True).decode()
        with secrets.open("a") as file:
            file.write("nonsense://x\n")
        tested = root.run("notify", "test")
        assert tested.returncode == 1
        assert "not taken by address 2, which is none that Apprise knows" in tested.stdout
    finally:
        controller.stop()
    root.configure(notify={"urls_file": "", "urls": []})
    assert root.run("notify", "test").returncode == 2
