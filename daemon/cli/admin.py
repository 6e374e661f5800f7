"""Commands for those who run the daemon: logs, doctor, service install, completion."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from daemon import config
from daemon.cli import completion, render
from daemon.cli.app import MACHINE, WATCH, JsonFlag, app, existing_store, out, print_json
from daemon.cli.systemd import install
from daemon.cli.systemd.units import DropIn
from daemon.config import Settings
from daemon.errors import ConfigError, NotFound
from daemon.observability import log_reader
from daemon.observability.status import read_status
from daemon.text import escape

FOLLOW_SECONDS = 0.25
BACKLOG = 200  # events shown first, of a log that may hold millions

service_app = typer.Typer(help="Run Dropforge under systemd.", no_args_is_help=True)
app.add_typer(service_app, name="service", rich_help_panel=MACHINE)


class Level(StrEnum):
    """Severity of an event."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    WARN = "warn"  # the same
    ERROR = "error"


class Shell(StrEnum):
    """A shell that completion is written for."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


@app.command(rich_help_panel=WATCH)
def logs(
    context: typer.Context,
    job: Annotated[
        str,
        typer.Argument(
            help="Only this job's events: the beginning or end of its id; `last` is the newest.",
            autocompletion=completion.any_job,
        ),
    ] = "",
    *,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is added, until Ctrl-C.")] = False,
    level: Annotated[Level, typer.Option(help="The least severe events shown.")] = Level.DEBUG,
    lines: Annotated[
        int | None,
        typer.Option("--lines", "-n", min=0, help=f"At most so many, the newest (default {BACKLOG}; of a job, all)."),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Every key of each event.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Show the log, oldest first, across rotated files: of each event what a person needs.

    Example: dropforge logs --follow --level warning
    """
    path = log_path(context.obj.settings)
    if not path.exists():
        raise context.obj.not_yet("read", path, "there is no log yet")
    if job == "last":
        with existing_store(context) as store:
            job = store.find(job).id
    selection = log_reader.EventFilter(job=job, level=(Level.WARNING if level is Level.WARN else level).value)
    most = lines if lines is not None else None if job else BACKLOG
    reader = log_reader.LogReader(path)
    colours = sys.stdout.isatty() and not out.no_color

    def print_event(raw: bytes, event: dict[str, object]) -> None:
        if as_json:
            text = raw.decode("ascii", "backslashreplace")
        else:
            shown, width = event if full else log_reader.brief(event), log_reader.terminal_width(sys.stdout)
            text = log_reader.format_line(shown, colours=colours, width=width)
        print(text, flush=follow)

    found = log_reader.newest(reader.read(), selection, most)
    is_known = not job
    for raw, event in found:
        print_event(raw, event)
        is_known = True
    if not is_known and not follow and level is Level.DEBUG:
        reader.close()
        raise NotFound(
            operation="find job", subject=escape(job), cause="no event of the log tells of it", hint="`dropforge jobs`"
        )
    try:
        while follow:
            for raw, event in reader.read():
                if selection(event):
                    print_event(raw, event)
            time.sleep(FOLLOW_SECONDS)
    except KeyboardInterrupt:
        return
    finally:
        reader.close()


def log_path(settings: Settings) -> Path:
    """Where the daemon of this root writes its log; under systemd the unit decides that, and the status file says it."""
    try:
        reported = (read_status(settings.status_path) or {}).get("log_path")
    except (OSError, ValueError):
        reported = None
    return Path(reported) if isinstance(reported, str) and reported and Path(reported).exists() else settings.log_path


@app.command("doctor", rich_help_panel=MACHINE)
def doctor_command(
    context: typer.Context,
    *,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Instead: read all versions, trained files and the base model, and compare with what was recorded.",
        ),
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Check what would bite: versions, GPU, disk, limits, permissions, model. Exit 1 when something fails.

    Example: dropforge doctor --verify
    """
    from daemon.cli import doctor

    found = doctor.examine(context.obj.root, verify=verify)
    if as_json:
        print_json({"findings": [finding.as_dict() for finding in found]})
    else:
        out.print(render.findings(found))
    raise typer.Exit(1 if any(finding.verdict is doctor.Severity.FAIL for finding in found) else 0)


@service_app.command("install")
def install_service(
    context: typer.Context,
    *,
    user: Annotated[bool, typer.Option("--user", help="A service of your own, without root.")] = False,
    instance: Annotated[str, typer.Option(help="One of several models on this machine: dropforge@NAME.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the files; write nothing.")] = False,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Do not look whether the service's account can run this interpreter.")
    ] = False,
    drop_in: Annotated[
        list[DropIn] | None,
        typer.Option(help="What to open (default: what the settings and this machine's devices call for)."),
    ] = None,
    directory: Annotated[
        Path | None, typer.Option(help="Where unit files go (default: where systemd looks first).")
    ] = None,
) -> None:
    """Write the systemd unit for this root, with this interpreter, and print the next commands.

    Where it was written before, it says what changed. A unit that could not start is refused.

    Example: dropforge --root /var/lib/dropforge service install
    """
    settings = config.load(context.obj.root)  # a folder that the printed commands may make
    planned = install.plan_install(
        settings,
        user=user,
        instance=instance,
        drop_ins=install.wanted_drop_ins(settings) if drop_in is None else drop_in,
        directory=directory,
    )
    found = None if no_check else install.obstacle(planned, settings)
    if found is not None and not dry_run:
        raise ConfigError(
            operation="install the service",
            cause=f"it would not start: {found.message}",
            hint=f"{found.hint}; --no-check writes it all the same",
        )
    if not dry_run:
        planned.execute()
    for line in install_report(planned, dry_run=dry_run):
        out.print(line, markup=False)
    if found is not None:
        out.print(f"\n# it would not start: {found.message}; {found.hint}", markup=False)


def install_report(planned: install.InstallPlan, *, dry_run: bool) -> Iterator[str]:
    """What was written, or would be, what changed in it, and what to type next; a line each."""
    for file in planned.planned:
        if dry_run:
            yield f"# {file.path}"
            yield file.text
        elif file.before == file.text:
            yield f"unchanged {file.path}"
        else:
            yield f"{'changed' if file.is_changed else 'wrote'} {file.path}"
            yield from (f"  {line}" for line in file.difference if file.is_changed)
    for path in planned.left:
        yield f"{'# ' if dry_run else ''}left {path}, which the settings call for no more: `rm {path}`"
    if planned.commands:
        yield "\n# next:" if dry_run else "\nnext:"
        yield from (f"  {command}" for command in planned.commands)
    else:
        yield "\nnothing changed: no restart is needed"


@app.command("completion", rich_help_panel=MACHINE)
def print_completion(shell: Annotated[Shell, typer.Argument(help="Which shell.")]) -> None:
    """Print a completion script: `dropforge completion bash > /etc/bash_completion.d/dropforge`.

    Example: dropforge completion bash
    """
    from typer.completion import get_completion_script  # type: ignore[attr-defined]  # not re-exported by its name

    print(get_completion_script(prog_name="dropforge", complete_var="_DROPFORGE_COMPLETE", shell=shell.value))
