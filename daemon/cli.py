"""The `dropforge` command. Each command is thin: it reads settings, calls the room that does the work, and prints."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

import guard
from daemon import config, show, versions
from daemon.errors import DropforgeError, NotFound
from daemon.job import JobState, Priority, to_json
from daemon.status import finished_job, read_status
from daemon.store import JobStore
from daemon.text import escape

app = typer.Typer(
    name="dropforge",
    help="Drop a dataset, forge a model: continuous LoRA training of every .jsonl file that is dropped into a folder.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Which root a command works on."""

    root: Path

    @property
    def settings(self) -> config.Settings:
        """The root's settings, read when a command needs them."""
        return config.load(self.root)


JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def main() -> NoReturn:
    """Run the command line; every foreseeable error is one sentence, a hint and the exit code of its class."""
    code = 1
    try:
        code = int(app(standalone_mode=False) or 0)
    except DropforgeError as error:
        code = complain(str(error), error.exit_code)
    except guard.GuardError as error:
        code = complain(str(error), error.exit_code)
    except typer.Exit as stop:
        code = stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except BrokenPipeError:  # `dropforge jobs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:  # click's usage errors, which know how to show themselves
        if not hasattr(error, "exit_code") or not hasattr(error, "show"):
            raise
        error.show()
        code = int(error.exit_code)
    sys.exit(code)


def complain(text: str, code: int) -> int:
    """Print an error to stderr; returns its exit code."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)
    return code


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        out.print(f"dropforge {version('dropforge')}")
        raise typer.Exit


@app.callback()
def root_options(
    context: typer.Context,
    root: Annotated[
        Path | None, typer.Option("--root", help="Folder with dropforge.toml (DROPFORGE_ROOT; default: here).")
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options that every command shares."""
    context.obj = Place(root=config.find_root(root))


@app.command()
def init(
    context: typer.Context,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="With a tiny base model, built on the spot, for a first try.")
    ] = False,
) -> None:
    """Make this folder a root: inbox, model directory, state and a dropforge.toml with every key explained."""
    from daemon.init import init as initialise

    place: Place = context.obj
    settings = initialise(place.root, tiny=tiny)
    out.print(f"initialised {escape(str(place.root))}", markup=False)
    if not tiny:
        out.print(f"next: set model_name_or_path under [model] in {place.root / config.CONFIG_NAME}", markup=False)
    out.print(f"then: dropforge run, and drop .jsonl files into {settings.inbox_dir}", markup=False)


@app.command()
def run(
    context: typer.Context,
    once: Annotated[bool, typer.Option("--once", help="Leave when inbox and queue are empty.")] = False,
) -> None:
    """Watch the inbox and train what is dropped there. Ctrl-C seals a checkpoint and leaves; twice: at once."""
    from daemon import logs
    from daemon.service import Service

    settings = context.obj.settings
    try:
        log = logs.configure(settings)
    except OSError as error:
        raise DropforgeError(
            operation="open the log", subject=settings.log_path, cause=str(error), hint="may this user write there?"
        ) from error
    raise typer.Exit(Service(settings, log=log).run(once=once))


@app.command()
def demo(
    folder: Annotated[
        Path | None, typer.Argument(help="A new folder to show it in (default: a temporary one).")
    ] = None,
) -> None:
    """Show the main job on a tiny model and real data: two datasets, a killed trainer, a replaced dataset."""
    from daemon.demo import run_demo

    raise typer.Exit(run_demo(folder))


@app.command()
def status(context: typer.Context, as_json: JsonFlag = False) -> None:
    """Is it alive, what does it do, what waits and why."""
    settings = context.obj.settings
    try:
        snapshot = read_status(settings.status_path)
    except ValueError as error:
        raise DropforgeError(
            operation="read", subject=settings.status_path, cause=str(error), hint="the daemon replaces it when it runs"
        ) from error
    if snapshot is None:
        raise NotFound(
            operation="read",
            subject=settings.status_path,
            cause="no daemon has run on this root yet",
            hint="`dropforge run` starts one",
        )
    if as_json:
        print_json(snapshot)
    else:
        out.print(show.status(snapshot))


@app.command()
def jobs(
    context: typer.Context,
    as_json: JsonFlag = False,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="At most so many, the newest.")] = 50,
) -> None:
    """List jobs, oldest first."""
    with _store(context) as store:
        found = list(reversed(store.jobs(limit=limit, newest=True)))
    if as_json:
        print_json([{**finished_job(job), "created_at": job.created_at} for job in found])
    elif found:
        out.print(show.jobs(found))
    else:
        out.print("no jobs yet")


@app.command("show")
def show_job(context: typer.Context, job: str, as_json: JsonFlag = False) -> None:
    """Everything about one job: data, verdict, steps, losses, every move. JOB may be the beginning or end of its id."""
    with _store(context) as store:
        found = store.find(job)
        events = store.events(found.id)
    if as_json:
        print_json({**json.loads(to_json(found)), "events": json.loads(to_json(events))})
    else:
        out.print(show.job(found, events, context.obj.settings))


@app.command()
def submit(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="A .jsonl file; it is copied, not moved.")],
    priority: Annotated[Priority, typer.Option(help="Order in the queue.")] = Priority.NORMAL,
    force: Annotated[
        bool, typer.Option("--force", help="Train it even if the same content was trained before.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the job; the exit code is its result.")] = False,
) -> None:
    """Copy a file into the inbox the safe way: written beside, then renamed."""
    from daemon.submit import submit as copy_in
    from daemon.submit import wait_for

    settings = context.obj.settings
    placed = copy_in(settings, file, priority=priority, force=force)
    out.print(f"dropped {escape(str(placed.path))}", markup=False)
    if not wait:
        return
    job = wait_for(settings, placed)
    out.print(f"{job.id} {job.state}: {escape(job.reason)}", markup=False)
    raise typer.Exit({JobState.SUCCEEDED: 0, JobState.REJECTED: 3}.get(job.state, 1))


@app.command()
def check(
    context: typer.Context,
    files: Annotated[list[Path], typer.Argument(help="Files to check; nothing is moved or queued.")],
    as_json: JsonFlag = False,
) -> None:
    """Say what the daemon would say of these files: format, rows, digest, bad lines. Exit 3 when one is refused."""
    from daemon.check import check_files, render_text

    settings = context.obj.settings
    store = JobStore(settings.store_path) if settings.store_path.exists() else None
    try:
        reports = check_files(files, settings, store)
    finally:
        if store is not None:
            store.close()
    if as_json:
        print_json([report.to_dict() for report in reports])
    else:
        for report in reports:
            out.print(render_text(report), markup=False)
    raise typer.Exit(0 if all(report.accepted for report in reports) else 3)


@app.command("versions")
def list_versions(context: typer.Context, as_json: JsonFlag = False) -> None:
    """List finished adapters, oldest first; the current one is marked."""
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


@app.command(
    "guard",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def guard_command(context: typer.Context) -> None:
    """Fingerprints, verdicts, seals and clearing by hand: fingerprint | check | verify | clear | seal."""
    from guard.cli import main as guard_main

    raise typer.Exit(guard_main(context.args))


def _store(context: typer.Context) -> Any:
    from contextlib import closing

    path = context.obj.settings.store_path
    if not path.exists():
        raise NotFound(
            operation="open", subject=path, cause="there is no queue on this root yet", hint="`dropforge run` makes one"
        )
    return closing(JobStore(path))


def print_json(value: object) -> None:
    """Plain JSON to stdout, never coloured or wrapped."""
    print(json.dumps(value, indent=1, ensure_ascii=True))
