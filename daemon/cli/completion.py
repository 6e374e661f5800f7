"""What a shell offers after TAB: ids of jobs, numbers of versions, as they are at this moment.

Nothing is said when something is wrong: a message would land in the line that a person is typing. Shells read what is
offered as their own code (zsh evaluates it), so that of a file's name only harmless characters are shown.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress

import typer

from daemon import config
from daemon.config import Settings
from daemon.job import FINAL_STATES, OPEN_STATES, Job, JobState
from daemon.store import is_made, open_for_reading
from daemon.versions import list_versions

Candidates = list[tuple[str, str]]  # what is offered, and what it is
MOST = 200  # of a history of any length, the newest
NAME_CHARACTERS = 40


def jobs_in(states: Collection[JobState]) -> Callable[[typer.Context, str], Candidates]:
    """Completion of a JOB argument: those in `states`, in the queue's order and then the newest first."""

    def complete(context: typer.Context, incomplete: str) -> Candidates:
        with suppress(Exception):  # whatever it is, the command itself will say it
            return [
                (job.id, f"{job.state} {harmless(job.name)}")
                for job in _jobs(_settings(context), states)
                if job.id.startswith(incomplete)
            ]
        return []

    return complete


any_job = jobs_in(frozenset(JobState))
open_job = jobs_in(OPEN_STATES)
queued_job = jobs_in({JobState.QUEUED})
unsuccessful_job = jobs_in(FINAL_STATES - {JobState.SUCCEEDED})


def version(context: typer.Context, incomplete: str) -> Candidates:
    """Completion of a VERSION argument, newest first."""
    with suppress(Exception):
        found = list_versions(_settings(context).model_dir)[: -MOST - 1 : -1]
        return [
            (item.name, f"from {harmless(str(item.record.get('dataset', '')))}")
            for item in found
            if item.name.startswith(incomplete)
        ]
    return []


def plotted(context: typer.Context, incomplete: str) -> Candidates:
    """Completion of what `plot` draws: jobs and versions."""
    return [*any_job(context, incomplete), *version(context, incomplete)]


def _settings(context: typer.Context) -> Settings:
    return config.load(config.find_root(context.find_root().params.get("root")))


def _jobs(settings: Settings, states: Collection[JobState]) -> Iterable[Job]:
    """Those that wait, then the newest of the others: what a person will hardly name is not looked for."""
    if not is_made(settings.store_path):
        return []
    store = open_for_reading(settings.store_path)
    try:
        found = {job.id: job for job in (*store.queue(limit=MOST), *store.jobs(limit=MOST, newest=True))}
    finally:
        store.close()
    return [job for job in found.values() if job.state in states]


def harmless(name: str) -> str:
    """A file's name with everything that a shell might act on as `?`."""
    return re.sub(r"[^A-Za-z0-9._ +-]", "?", name)[:NAME_CHARACTERS]
