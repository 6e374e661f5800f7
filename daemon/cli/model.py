"""Commands about the model directory: versions, rollback, guard."""

from __future__ import annotations

import time
from typing import Annotated

import typer

import guard
from daemon import show, versions
from daemon.cli.common import JsonFlag, app, out, print_json
from daemon.config import Settings
from daemon.errors import TryLater
from daemon.job import JobState
from daemon.store import JobStore
from daemon.text import escape

WAIT_SECONDS = 0.05  # between two attempts; a promotion is followed by seconds of a trainer's start


@app.command("versions")
def list_versions(context: typer.Context, as_json: JsonFlag = False) -> None:
    """Show finished adapters as a tree: which continued which, and their held-out losses before and after."""
    model_dir = context.obj.settings.model_dir
    found = versions.list_versions(model_dir)
    current = versions.current_version(model_dir)
    if as_json:
        print_json(
            [
                {**version.record, "version": version.name, "path": str(version.path), "current": version == current}
                for version in found
            ]
        )
    elif found:
        out.print(show.versions(found, current))
    else:
        out.print("no versions yet: nothing has been trained to its end")


@app.command()
def rollback(
    context: typer.Context,
    version: Annotated[str, typer.Argument(help="An earlier version: 0003, or 3.")],
    after_job: Annotated[bool, typer.Option("--after-job", help="Wait until the running job has ended.")] = False,
) -> None:
    """Make an earlier version the current one. The next dataset continues from it; nothing is deleted."""
    settings: Settings = context.obj.settings
    versions.find_version(settings.model_dir, version)  # before any waiting
    told = False
    while True:
        running = _running(settings)
        if not running:
            try:
                with guard.ModelLock(settings.model_dir, owner="rollback"):
                    done = versions.rollback(settings.model_dir, version)
                break
            except guard.ModelLocked as error:
                running = error.cause
        if not after_job:
            raise TryLater(
                operation="roll back",
                cause=running,
                hint="--after-job waits for its end; `dropforge cancel` ends it",
            )
        if not told:
            out.print(f"waiting: {running}", markup=False)
            told = True
        time.sleep(WAIT_SECONDS)
    out.print(f"version {done.name} is current now: {escape(str(done.record.get('dataset', '')))}", markup=False)


def _running(settings: Settings) -> str:
    """Which job runs, or was running when its daemon died: its promotion may be half done."""
    if not settings.store_path.exists():
        return ""
    store = JobStore(settings.store_path)
    try:
        running = store.jobs({JobState.RUNNING}, limit=1)
    finally:
        store.close()
    return f"job {running[0].id} is running" if running else ""


@app.command(
    "guard",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def guard_command(context: typer.Context) -> None:
    """Fingerprints, verdicts, seals and clearing by hand: fingerprint | check | verify | clear | seal."""
    from guard.cli import main as guard_main

    raise typer.Exit(guard_main(context.args))
