"""An Intake on a root of its own, driven as the service drives it, and what must hold of it at any time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from daemon.config import Settings
from daemon.in_hand import InHand
from daemon.inbox import layout
from daemon.inbox.archive import Archive
from daemon.inbox.intake import Intake
from daemon.job import FINAL_STATES, OPEN_STATES, Job, JobState
from daemon.left_alone import LeftAlone
from daemon.recovery import repair_inbox
from daemon.root_identity import establish
from daemon.store import JobStore

ROW = '{"text": "a row"}\n'
FAST = {"settle_seconds": 0.3, "rescan_seconds": 0.5, "poll_seconds": 0.2}


class Record:
    """A logger that remembers: (level, event, data)."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str, dict[str, Any]]] = []

    def _log(self, level: str) -> Callable[..., None]:
        return lambda event, **data: self.lines.append((level, event, data))

    def __getattr__(self, level: str) -> Callable[..., None]:
        return self._log(level)

    def events(self, name: str) -> list[dict[str, Any]]:
        """The data of each event of that name."""
        return [data for _, event, data in self.lines if event == name]


class Root:
    """A root folder with an open Intake."""

    def __init__(self, path: Path, **tables: Mapping[str, Any]) -> None:
        self.path = path
        self.settings = Settings(root=path, **{**tables, "inbox": {**FAST, **tables.get("inbox", {})}})
        self.wakeup = threading.Event()
        self.log = Record()
        self.opened = False

    def __enter__(self) -> Root:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self) -> None:
        """Start, as a new process of the daemon would."""
        self.store = JobStore(self.settings.store_path)
        self.archive = Archive(self.settings, self.store, self.log)
        self.intake = Intake(
            self.settings, self.store, self.archive, wakeup=self.wakeup, in_hand=InHand(), log=self.log
        )
        establish(self.settings)
        self.intake.open()
        self.intake.resume_claimed(
            repair_inbox(self.settings, self.store, self.archive, self.log, in_hand=InHand(), left_alone=LeftAlone())
        )
        self.opened = True

    def close(self) -> None:
        """Stop."""
        if self.opened:
            self.opened = False
            self.intake.close()
            self.store.close()

    @property
    def inbox(self) -> Path:
        return self.settings.inbox_dir

    def tick(self, *, accept: bool = True, wait: float = 0.2) -> None:
        """One round of the service."""
        self.wakeup.clear()
        self.intake.tick(accept=accept)
        due = self.intake.next_due_seconds()
        self.wakeup.wait(min(wait, wait if due is None else due))

    def pump(self, until: Callable[[], object], timeout: float = 60.0, *, accept: bool = True) -> None:
        """Tick until the condition holds."""
        end = time.monotonic() + timeout
        while not until():
            assert time.monotonic() < end, f"{self.intake.view()}\n{self.jobs()}\n{self.log.lines[-20:]}"
            self.tick(accept=accept)

    def jobs(self, *states: JobState) -> list[Job]:
        """Jobs in order of arrival."""
        return self.store.jobs(set(states) or None)

    def wait_for(self, count: int, *states: JobState, timeout: float = 60.0) -> list[Job]:
        """Tick until so many jobs are in these states (default: queued); returns them."""
        wanted = states or (JobState.QUEUED,)
        self.pump(lambda: len(self.jobs(*wanted)) >= count, timeout)
        return self.jobs(*wanted)

    def drop(self, name: str, text: str | bytes = ROW, *, folder: str = "") -> Path:
        """Rename a file in, from beside the inbox."""
        staged = self.path / f"staged-{time.monotonic_ns()}"
        staged.write_bytes(text.encode() if isinstance(text, str) else text)
        return staged.rename(self.inbox / folder / name)

    def finish(self, job: Job, state: JobState = JobState.SUCCEEDED, **fields: Any) -> Job:
        """Let a queued job run to an end, as the scheduler would."""
        running = self.store.transition(job.id, JobState.QUEUED, JobState.RUNNING, "attempt 1")
        return self.archive.finish(running, state, "ended", **fields)


def assert_sound(settings: Settings, store: JobStore) -> None:
    """Every job's file lies where its state says, once; nothing lies in processing/, done/ or failed/ unknown."""
    known = {job.id: job for job in store.jobs()}
    for place in (layout.PROCESSING, layout.DONE, layout.FAILED):
        for folder in (settings.inbox_dir / place).iterdir():
            assert folder.name in known, f"{folder} has no job"
    for job in known.values():
        places = [
            place
            for place in (layout.PROCESSING, layout.DONE, layout.FAILED)
            if (settings.inbox_dir / place / job.id).exists()
        ]
        if job.state in OPEN_STATES:
            assert places == [layout.PROCESSING], (job, places)
            assert (settings.inbox_dir / layout.PROCESSING / job.id / job.name).is_file(), job
        if job.state in FINAL_STATES:
            assert places == [layout.final_dir(settings, job).parent.name], (job, places)
            assert (layout.final_dir(settings, job) / "report.json").is_file(), job
