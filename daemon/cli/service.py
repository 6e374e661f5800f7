"""Commands about the daemon itself: init, run, demo, status."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from daemon import config, root_identity
from daemon.cli import render
from daemon.cli.account import require_own_account, typed
from daemon.cli.app import BEGIN, WATCH, JsonFlag, RootContext, app, out, print_json
from daemon.cli.jobs import queue_seconds
from daemon.errors import ConfigError, DropforgeError
from daemon.job import JobState
from daemon.observability.status import Liveness, read_status
from daemon.text import escape


@app.command("init", rich_help_panel=BEGIN)
def init_root(
    context: typer.Context,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="With a tiny base model, built on the spot, for a first try.")
    ] = False,
) -> None:
    """Make this folder a root: inbox, model directory, state and a dropforge.toml with every key explained.

    Example: dropforge --root ~/forge init --tiny
    """
    from daemon.cli.init import init

    root_context: RootContext = context.obj
    require_own_account(config.load(root_context.root))
    settings = init(root_context.root, tiny=tiny)
    out.print(f"initialised {escape(str(root_context.root))}", markup=False)
    if not tiny:
        out.print(
            f"next: set model_name_or_path under [model] in {root_context.root / config.CONFIG_NAME}", markup=False
        )
    run_command = typed(root_context.root, "run")
    out.print(f"then: {run_command}, and drop .jsonl files into {settings.inbox_dir}", markup=False)


@app.command(rich_help_panel=BEGIN)
def run(
    context: typer.Context,
    once: Annotated[bool, typer.Option("--once", help="Leave when inbox and queue are empty.")] = False,
) -> None:
    """Watch the inbox and train what is dropped there. Ctrl-C seals a checkpoint and leaves; twice: at once.

    Example: dropforge --root ~/forge run
    """
    from daemon.cli.doctor import before_run
    from daemon.cli.run_screen import open_screen
    from daemon.observability import logs
    from daemon.service import Service, take_root

    settings = context.obj.settings
    root_identity.require_root(settings)
    lock = take_root(settings)  # before a log or a port is opened, which the daemon that holds it uses
    has_metrics = settings.metrics.port is not None or settings.metrics.textfile is not None
    if has_metrics:
        from daemon.observability.metrics import Metrics, MetricsPublisher

        metrics = Metrics()
    screen = open_screen()
    log = logs.configure(settings, screen=screen, listeners=[metrics.count] if has_metrics else [])
    reporter = MetricsPublisher(metrics, settings.metrics, settings.root, log) if has_metrics else None
    for finding in before_run(settings):
        log.warning("doctor.found", check=finding.name, reason=finding.message, hint=finding.hint)
    show = screen.show if screen else None
    try:
        code = Service(settings, log=log, metrics=reporter, show=show, lock=lock).run(once=once)
    finally:
        if screen is not None:
            screen.close()
    raise typer.Exit(code)


@app.command(rich_help_panel=BEGIN)
def demo(
    folder: Annotated[
        Path | None, typer.Argument(help="A new folder to show it in (default: a temporary one).")
    ] = None,
) -> None:
    """Show the main job on a tiny model and real data: two datasets, a killed trainer, a replaced dataset.

    Example: dropforge demo /tmp/forge-demo
    """
    from daemon.cli.demo import run_demo

    raise typer.Exit(run_demo(folder))


@app.command("status", rich_help_panel=WATCH)
def show_status(
    context: typer.Context,
    as_json: JsonFlag = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="A live screen, until Ctrl-C.")] = False,
) -> None:
    """Is it alive, what does it do, what waits and why. Exit 1 when the daemon died or hangs.

    Example: dropforge status --watch
    """
    settings = context.obj.settings
    if watch and as_json:
        raise ConfigError(
            operation="show",
            subject="status",
            cause="--watch is a screen and --json one object",
            hint="`dropforge status --json`, as often as you need it",
        )
    if watch:
        from daemon.cli.dashboard import run_dashboard

        run_dashboard(settings.status_path, Console(highlight=False, markup=False))
        return
    try:
        snapshot = read_status(settings.status_path)
    except (OSError, ValueError) as error:
        raise DropforgeError(
            operation="read", subject=settings.status_path, cause=str(error), hint="the daemon replaces it when it runs"
        ) from error
    if snapshot is None:
        raise context.obj.not_yet("read", settings.status_path, "no daemon has run on this root yet")
    is_queued = (snapshot.get("queue") or {}).get(JobState.QUEUED)
    seconds = queue_seconds(settings) if is_queued else None
    if as_json:
        print_json({**snapshot, "queue_eta_seconds": seconds})
    else:
        out.print(render.status_view(snapshot, queue_seconds=seconds))
    raise typer.Exit(0 if snapshot["liveness"] in (Liveness.ALIVE, Liveness.STOPPED) else 1)
