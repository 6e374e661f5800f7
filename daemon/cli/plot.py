"""`dropforge plot`: the curves of jobs, in the terminal or as a picture in a file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from daemon import versions
from daemon.cli import completion
from daemon.cli.app import WATCH, JsonFlag, app, existing_store, print_json
from daemon.cli.job_curves import JobCurves, is_plain, terminal_plot
from daemon.config import Settings
from daemon.curves import read_curves
from daemon.errors import ConfigError, NotFound
from daemon.job import Job
from daemon.run_dir import run_dir_of
from daemon.store import JobStore
from daemon.text import escape
from daemon.version_pruning import find_any_version

JOBS_LOOKED_AT = 100  # for the newest one with curves


@app.command("plot", rich_help_panel=WATCH)
def plot(
    context: typer.Context,
    jobs: Annotated[
        list[str] | None,
        typer.Argument(
            help="Ids of jobs or their ends, numbers of versions, `last`, `latest`; without any the newest with curves.",
            autocompletion=completion.plotted,
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A .png, .svg or .pdf file; it is replaced.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Draw losses, learning rate and tokens a second by step; several jobs over each other.

    Example: dropforge plot 0001 0002 -o curves.png
    """
    if output is not None and as_json:
        raise ConfigError(operation="plot", cause="--json and --output are two ways out", hint="leave one of them away")
    settings: Settings = context.obj.settings
    with existing_store(context) as store:
        found = list(_chosen(settings, store, jobs)) if jobs else _newest(settings, store)
    if as_json:
        print_json({"jobs": [as_object(one) for one in found]})
    elif output is not None:
        from daemon.cli.plot_file import write_plot

        print(f"wrote {escape(str(write_plot(output, found)), most=2000)}")
    else:
        console = Console(highlight=False, markup=False)
        console.print(terminal_plot(found, width=console.width, ascii_only=is_plain(console, found)))


def _chosen(settings: Settings, store: JobStore, names: Sequence[str]) -> Iterator[JobCurves]:
    """The named jobs with their curves, each once. Raises NotFound for one that is not there or has no curves."""
    by_id = {job.id: job for job in (_find(settings, store, name) for name in names)}
    for job in by_id.values():
        curves = read_curves(run_dir_of(settings.state_dir, job.id))
        if not curves:
            raise NotFound(
                operation="plot",
                subject=f"job {job.id}",
                cause=f"it is {job.state} and logged no step"
                if run_dir_of(settings.state_dir, job.id).is_dir()
                else f"it is {job.state} and has no run directory, so no step of it was logged or is kept",
                hint=f"`dropforge show {job.id}` says what became of it",
            )
        yield JobCurves(job=job, curves=curves)


def _find(settings: Settings, store: JobStore, name: str) -> Job:
    """The job that a name means: of a version's number, the one that trained it. Raises NotFound, DropforgeError."""
    if name == "latest":
        version = versions.current_version(settings.model_dir)
        if version is None:
            raise NotFound(operation="plot", subject="latest", cause="there is no version yet", hint="name a job")
    elif name.isdecimal() and len(name) < len("20261125"):  # a job's id begins with its day
        try:
            version = find_any_version(settings.model_dir, name)
        except NotFound:
            return store.find(name)
    else:
        return store.find(name)
    return store.get(str(version.record.get("job", "")))


def _newest(settings: Settings, store: JobStore) -> list[JobCurves]:
    """The newest job that has curves. Raises NotFound when none has."""
    for job in store.jobs(limit=JOBS_LOOKED_AT, newest=True):
        if curves := read_curves(run_dir_of(settings.state_dir, job.id)):
            return [JobCurves(job=job, curves=curves)]
    raise NotFound(
        operation="plot", cause="no job has logged a step yet", hint="`dropforge status` says what the daemon does"
    )


def as_object(one: JobCurves) -> dict[str, Any]:
    """A job and its curves for JSON."""
    job = one.job
    head = {"id": job.id, "dataset": escape(job.name), "state": job.state.value, "version": job.version}
    curves: dict[str, Any] = json.loads(json.dumps(asdict(one.curves)))
    return {**head, **curves}
