"""The processes that the inbox benchmarks compare; run by them, one at a time.

    python -m benchmarks.inbox_watchers KIND ROOT OUT [max_queued]

KIND is one of WATCHERS. Files appear in ROOT/inbox; what is seen is written to OUT when SIGTERM comes, one line each:
`what name monotonic_nanoseconds`.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

WATCHERS = ("dropforge", "watchdog", "watchfiles", "poller")


class Seen:
    """What was seen first, and when; written out at the end."""

    def __init__(self, out: str) -> None:
        self.out = out
        self.lines: dict[tuple[str, str], int] = {}
        self.stop = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: self.stop.set())

    def add(self, what: str, name: str) -> None:
        """Note it, unless it is known."""
        self.lines.setdefault((what, name), time.monotonic_ns())

    def write(self, **facts: object) -> None:
        """End."""
        lines = [f"{what} {name} {at}" for (what, name), at in self.lines.items()]
        lines += [f"# {key} {value}" for key, value in facts.items()]
        Path(self.out).write_text("\n".join(lines) + "\n")


def dropforge(root: Path, seen: Seen, max_queued: int) -> None:
    """The real Intake, driven as the service drives it."""
    from daemon.config import Settings
    from daemon.in_hand import InHand
    from daemon.inbox.archive import Archive
    from daemon.inbox.candidates import CandidateTracker
    from daemon.inbox.intake import Intake
    from daemon.left_alone import LeftAlone
    from daemon.recovery import repair_inbox
    from daemon.root_identity import establish
    from daemon.store import JobStore
    from daemon.wakeup import Wakeup  # type: ignore[import-not-found,unused-ignore]

    names: dict[str, str] = {}

    class Log:
        def __getattr__(self, level: str) -> Any:
            return self.log

        def log(self, event: str, **data: Any) -> None:
            if event == "file.claimed":
                names[data["job"]] = data["file"]
                seen.add("claimed", data["file"])
            elif event == "job.queued":
                seen.add("queued", names[data["job"]])

    real = CandidateTracker.add_events

    def add_events(self: CandidateTracker, batch: Any, now: float) -> None:
        for _, name in batch.names:
            seen.add("noticed", name)
        real(self, batch, now)

    CandidateTracker.add_events = add_events  # type: ignore[method-assign]
    settings = Settings(root=root, inbox={"max_queued": max_queued}, limits={"max_queued": max_queued})
    store, wakeup = JobStore(settings.store_path), Wakeup()
    archive = Archive(settings, store, Log())
    intake = Intake(settings, store, archive, wakeup=wakeup, in_hand=InHand(), log=Log())
    establish(settings)
    intake.open()
    intake.resume_claimed(repair_inbox(settings, store, archive, Log(), in_hand=InHand(), left_alone=LeftAlone()))
    print("ready", flush=True)
    while not seen.stop.is_set():
        wakeup.clear()
        intake.tick()
        due = intake.next_due_seconds()
        wakeup.wait(min(1.0, 1.0 if due is None else due))
    view = intake.view()
    seen.write(deferred=view.deferred, overflows=view.overflows, jobs=sum(store.counts().values()))
    intake.close()


def watchdog(root: Path, seen: Seen) -> None:
    """Handlers, flat, filtered to arrivals, as its documentation has them."""
    from watchdog.events import (
        FileClosedEvent,
        FileCreatedEvent,
        FileMovedEvent,
        FileSystemEvent,
        FileSystemEventHandler,
    )
    from watchdog.observers import Observer

    class Handler(FileSystemEventHandler):
        def on_any_event(self, event: FileSystemEvent) -> None:
            seen.add("noticed", Path(os.fsdecode(event.dest_path or event.src_path)).name)

    observer = Observer()
    arrivals = [FileClosedEvent, FileCreatedEvent, FileMovedEvent]
    observer.schedule(Handler(), str(root / "inbox"), event_filter=arrivals)
    observer.start()
    print("ready", flush=True)
    seen.stop.wait()
    seen.write()


def watchfiles(root: Path, seen: Seen) -> None:
    """Its defaults."""
    from watchfiles import watch  # type: ignore[import-not-found,unused-ignore]

    print("ready", flush=True)
    for changes in watch(root / "inbox", recursive=False, stop_event=seen.stop, rust_timeout=500):
        for _, path in changes:
            seen.add("noticed", Path(path).name)
    seen.write()


def poller(root: Path, seen: Seen) -> None:
    """A listing and a stat of each entry, once a second."""
    print("ready", flush=True)
    while not seen.stop.wait(1.0):
        for entry in os.scandir(root / "inbox"):
            entry.stat()
            seen.add("noticed", entry.name)
    seen.write()


def main() -> None:
    """See the module."""
    kind, root, out, *rest = sys.argv[1:]
    seen = Seen(out)
    if kind == "dropforge":
        dropforge(Path(root), seen, int(rest[0]) if rest else 10**6)
    else:
        {"watchdog": watchdog, "watchfiles": watchfiles, "poller": poller}[kind](Path(root), seen)
    os._exit(0)  # their threads and children end with the process


if __name__ == "__main__":
    main()
