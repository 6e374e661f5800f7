"""Sends notices to people: what is not sent yet lives in the store, each notice in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from daemon.config import NotifySettings, Settings
from daemon.errors import ConfigError
from daemon.holds import Hold, HoldKind
from daemon.job import to_json
from daemon.notices import GIVE_UP_SECONDS, Notice, Summary, send_at, summary_from
from daemon.observability.endpoint import forbidden, is_cut_off
from daemon.processes import child_environment
from daemon.store import JobStore
from daemon.text import escape
from guard.json_text import parse_json

NOTICES_KEY = "notices"  # of the store's controls: what is not sent yet, when something was, which hold was told
CLOSING_SECONDS = 2.0
PROCESS_SECONDS = 120.0  # of several services that do not answer
LINE_CHARACTERS = 300
MOST_URLS_BYTES = 64 * 2**10
MISSING = "notices cannot be sent: Apprise is not installed (`pip install 'dropforge[notify]'`)"


@dataclass(frozen=True, kw_only=True)
class Sent:
    """What became of one notice."""

    refused: tuple[str, ...]  # services that did not take it
    said: tuple[str, ...] = ()  # by Apprise; may hold secrets
    any_took: bool = False


def read_urls(settings: Settings) -> tuple[str, ...]:
    """Return the addresses of `[notify]`, those of its file included. Raises ConfigError with what keeps the file from being used."""
    notify = settings.notify
    if notify.urls_file is None:
        return notify.urls
    path = settings.root / notify.urls_file
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read(MOST_URLS_BYTES).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            operation="read", subject=path, cause=str(error), hint="mend urls_file under [notify]"
        ) from error
    if not stat.S_ISREG(mode) or mode & stat.S_IRWXO:
        raise ConfigError(
            operation="use",
            subject=path,
            cause="every account can read it, and it holds secrets" if stat.S_ISREG(mode) else "it is no file",
            hint=f"`chmod o= {path}`",
        )
    lines = (line.strip() for line in content.splitlines())
    return (*notify.urls, *(line for line in lines if line and not line.startswith("#")))


def start(urls: Sequence[str], notice: Notice) -> subprocess.Popen[bytes]:
    """Start the process that sends a notice. Raises OSError."""
    stdin = os.memfd_create("dropforge-notice")
    try:
        os.write(stdin, to_json({"urls": list(urls), "title": notice.title, "body": notice.body}).encode("ascii"))
        os.lseek(stdin, 0, os.SEEK_SET)
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "daemon.notice_process"],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env=child_environment(),
        )
    finally:
        os.close(stdin)


def outcome(process: subprocess.Popen[bytes], urls: Sequence[str]) -> Sent:
    """Read what a process said, which is killed unless it has ended."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    content, _ = process.communicate()
    try:
        found = parse_json(content)
        refused, said = tuple(map(str, found["refused"])), tuple(map(str, found["said"]))
    except (ValueError, KeyError, TypeError):
        return Sent(refused=(f"the process that sends ended with code {process.returncode}",))
    return Sent(refused=refused, said=said, any_took=len(refused) < len(urls))


class NoticeSender:
    """Collects what happened and sends it. One thread calls everything; nothing here waits for a service."""

    def __init__(self, settings: Settings, store: JobStore, log: Any) -> None:
        self.settings = settings
        self._store = store
        self._log = log
        kept = store.control(NOTICES_KEY) or {}
        self._summary: Summary = summary_from(kept.get("summary"))
        self._sent_at = float(kept.get("sent_at") or 0.0)
        self._told_hold: list[str] = list(kept.get("held") or ())  # kind and reason of a hold that people were told of
        self._hold_since: float | None = None  # monotonic
        self._held_kind: HoldKind | None = None
        self._failures = 0  # in a row
        self._problem = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._sending: tuple[Summary, Sequence[str], float] = (Summary(), (), 0.0)  # what, where to, monotonic deadline

    @property
    def warnings(self) -> tuple[str, ...]:
        """Why people are not told, for the status."""
        return (self._problem,) if self._problem else ()

    @property
    def _is_on(self) -> bool:
        return bool(self.settings.notify.urls) or self.settings.notify.urls_file is not None

    def tell(self, event: str, line: str) -> None:
        """Note something that happened, if it is to be told. `line` is text of a dropper's: it is made safe here."""
        notify: NotifySettings = self.settings.notify
        if self._is_on and event in notify.events:
            self._summary = self._summary.add(event, escape(line, most=LINE_CHARACTERS), time.time())
            self._keep()

    def watch_hold(self, hold: Hold | None) -> None:
        """Look at why the queue is held: told when that has lasted, and when it is over. The windows of [schedule] are not."""
        if hold is None or hold.kind is HoldKind.SCHEDULE:
            self._hold_since = None
            if self._told_hold:
                _, reason = self._told_hold
                self._told_hold = []
                self.tell("recovered", f"the queue goes on, it was held: {reason}")
                self._keep()
            return
        now = time.monotonic()
        if self._hold_since is None or self._held_kind is not hold.kind:
            self._hold_since, self._held_kind = now, hold.kind
        is_told = bool(self._told_hold) and self._told_hold[0] == hold.kind.value
        if self._is_on and not is_told and now - self._hold_since >= self.settings.notify.held_seconds:
            self._told_hold = [hold.kind.value, escape(hold.reason, most=LINE_CHARACTERS)]
            self.tell("held", f"the queue is held: {hold.reason}")
            self._keep()

    def poll(self) -> None:
        """Send what is due, and look what became of the last notice."""
        if self._process is not None:
            self._collect(self._process)
        if self._process is None and self._summary and self._is_on and time.time() >= self._send_at():
            self._send()

    def close(self) -> None:
        """Wait a moment for a notice on its way; what is not sent by then is left to the next start."""
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(CLOSING_SECONDS)
            self._collect(self._process)

    def _send_at(self) -> float:
        notify = self.settings.notify
        return send_at(
            self._summary,
            sent_at=self._sent_at,
            failures=self._failures,
            summary_seconds=notify.summary_seconds,
            quiet_hours=notify.quiet_hours,
            now=time.time(),
        )

    def _send(self) -> None:
        summary, self._summary = self._summary, Summary()
        if importlib.util.find_spec("apprise") is None:
            self._failed(summary, MISSING)
            return
        try:
            urls = read_urls(self.settings)
            self._process = start(urls, summary.compose(self.settings.root))
            self._sending = (summary, urls, time.monotonic() + PROCESS_SECONDS)
        except (ConfigError, OSError) as error:
            self._failed(summary, str(error).splitlines()[0])

    def _collect(self, process: subprocess.Popen[bytes]) -> None:
        summary, urls, deadline = self._sending
        if process.poll() is None and time.monotonic() < deadline:
            return
        sent = outcome(process, urls)
        self._process = None
        if sent.refused and not sent.any_took:
            self._failed(summary, _not_taken(sent))
            return
        self._failures, self._sent_at = 0, time.time()
        self._problem = ""
        if sent.refused:
            self._problem = _not_taken(sent)
            self._log.error("notice.failed", error=self._problem)
        else:
            self._log.info("notice.sent", events=dict(summary.counts), services=len(urls))
        self._keep()

    def _failed(self, summary: Summary, problem: str) -> None:
        """Try it again later, with what came meanwhile; after a day it is given up."""
        self._failures += 1
        self._sent_at = time.time()
        if problem != self._problem:
            self._log.error("notice.failed", error=problem)
        self._problem = problem
        if time.time() - summary.since > GIVE_UP_SECONDS:
            self._log.error("notice.lost", events=dict(summary.counts), lines=list(summary.lines))
        else:
            self._summary = summary.merge(self._summary)
        self._keep()

    def _keep(self) -> None:
        """Write down what is not known to be sent: a crash tells it again, never less than once."""
        sending = self._sending[0] if self._process is not None else Summary()
        self._store.set_control(
            NOTICES_KEY,
            {"summary": asdict(sending.merge(self._summary)), "sent_at": self._sent_at, "held": self._told_hold},
        )


def _not_taken(sent: Sent) -> str:
    """The sentence about a notice that services did not take; where this daemon is kept from the net, a test by hand is not."""
    hint = forbidden("notices.conf") if is_cut_off() else "`dropforge notify test` says more"
    return f"a notice was not taken by {'; '.join(sent.refused)}; {hint}"


def send_now(urls: Sequence[str], notice: Notice) -> Sent:
    """Send a notice and wait for what becomes of it. Raises OSError."""
    process = start(urls, notice)
    with suppress(subprocess.TimeoutExpired):
        process.wait(PROCESS_SECONDS)
    return outcome(process, urls)
