"""Deletes the folders of jobs that were trained long ago, as `[inbox] keep_done_days` says; a slice at each tick."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from daemon.config import Settings
from daemon.errors import NotFound
from daemon.inbox import layout
from daemon.inbox.slices import go_on
from daemon.memory.forgetting import delete_file_memory
from daemon.store import JobStore
from daemon.text import escape
from guard.atomic import fsync_dir


class DonePurge:
    """The purge of one root's `done/`, which may hold very many jobs."""

    def __init__(self, settings: Settings, store: JobStore, log: Any) -> None:
        self.settings = settings
        self._store = store
        self._log = log
        self._work: Iterator[None] | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a purge has begun and is not at its end."""
        return self._work is not None

    def begin(self) -> None:
        """Begin to delete what finished more than `keep_done_days` ago; `go_on` does it."""
        if self.settings.inbox.keep_done_days and self._work is None:
            self._work = self._delete(self.settings.inbox.keep_done_days)

    def go_on(self) -> None:
        """Go on with a purge that has begun, for a moment."""
        if self._work is not None and go_on(self._work):
            self._work = None

    def _delete(self, days: float) -> Iterator[None]:
        """Delete each trained job's folder that is old enough, with a pause before each."""
        before = (datetime.now(UTC) - timedelta(days=days)).isoformat(timespec="milliseconds")
        done = self.settings.inbox_dir / layout.DONE
        try:
            names = sorted(os.listdir(done)) if done.is_dir() else []  # noqa: PTH208  very many: without Path objects
        except OSError as error:
            self._log.error("file.not_purged", job="", error=str(error))
            return
        for name in names:
            yield
            try:
                job = self._store.get(name)
            except NotFound:
                continue  # not ours: never deleted
            if not layout.is_trained(job) or job.finished_at is None or job.finished_at >= before:
                continue
            try:
                if job.dataset is not None and not self.settings.replay.keep_deleted:
                    delete_file_memory(self.settings.state_dir, job.dataset.digest)
                shutil.rmtree(done / name)
                fsync_dir(done)
            except OSError as error:
                self._log.error("file.not_purged", job=job.id, error=str(error))
            else:
                self._log.info("file.purged", job=job.id, file=escape(job.name), finished_at=job.finished_at)
