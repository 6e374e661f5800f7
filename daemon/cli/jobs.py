"""Commands about jobs and their queue: jobs, show, submit, check, cancel, retry, move, pause, resume."""

from __future__ import annotations

import codecs
import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from daemon import control
from daemon.cli import completion, render
from daemon.cli.app import DATA, QUEUE, WATCH, JsonFlag, app, complain, existing_store, out, print_json
from daemon.cli.estimates import format_duration, measure_pace, queue_etas
from daemon.config import Settings
from daemon.errors import ConfigError, NotFound, RejectedData, StoreError
from daemon.evaluation.values import GateAction
from daemon.job import FINAL_STATES, Job, JobState, Priority, to_json, utc_now
from daemon.observability.status import finished_job, may_be_alive, read_status
from daemon.store import JobStore, is_made, open_for_reading
from daemon.text import escape

JOB = "A job's id, or its beginning or end; `last` is the newest."


@app.command("jobs", rich_help_panel=WATCH)
def list_jobs(
    context: typer.Context,
    as_json: JsonFlag = False,
    state: Annotated[
        list[JobState] | None, typer.Option("--state", help="Only jobs in this state (repeatable).")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="At most so many, the newest.")] = 50,
) -> None:
    """List jobs, oldest first; those that wait with why, and about when they will be done.

    Example: dropforge jobs --state failed --limit 10
    """
    with existing_store(context) as store:
        found = list(reversed(store.jobs(state or None, limit=limit, newest=True)))
        etas = _etas(context.obj.settings, store)
    running = _running(context.obj.settings)
    if as_json:
        listed = [{**finished_job(job), "created_at": job.created_at, "eta_seconds": etas.get(job.id)} for job in found]
        print_json({"jobs": listed})
    elif found:
        shown = [
            replace(job, reason=f"{job.reason}; done in about {format_duration(etas[job.id])}")
            if job.id in etas
            else job
            for job in found
        ]
        out.print(render.job_list(shown, running=running))
    else:
        out.print(f"no jobs that are {' or '.join(state)}" if state else "no jobs yet")


def _etas(settings: Settings, store: JobStore) -> dict[str, float]:
    """Seconds to the end of the running and each queued job, as far as they can be told."""
    pace = measure_pace([job for job in store.recent(50) if job.state is JobState.SUCCEEDED])
    running = _running(settings)
    left = running.get("eta_seconds")
    if running.get("id") and left is None:  # it does not say so itself before its second step
        with suppress(NotFound):
            left = pace.seconds_left(store.get(running["id"]), utc_now()) if pace else None
        if left is None:
            return {}
    etas = queue_etas(store.queue(), pace, left)
    return {**etas, running["id"]: left} if left is not None else etas


def queue_seconds(settings: Settings) -> float | None:
    """Seconds until the last queued job is done; None where that cannot be told."""
    if not is_made(settings.store_path):
        return None
    try:
        store = open_for_reading(settings.store_path)
    except StoreError:
        return None  # the status is shown all the same
    try:
        return max(_etas(settings, store).values(), default=None)
    except StoreError:
        return None
    finally:
        store.close()


def _running(settings: Settings) -> dict[str, Any]:
    """The job that the status file says is trained; empty when there is none, or the daemon is gone."""
    try:
        status = read_status(settings.status_path) or {}
    except (OSError, ValueError):
        return {}
    return (status.get("job") or {}) if status and may_be_alive(status) else {}


@app.command("show", rich_help_panel=WATCH)
def show_job(
    context: typer.Context,
    job: Annotated[str, typer.Argument(help=JOB, autocompletion=completion.any_job)],
    as_json: JsonFlag = False,
) -> None:
    """Everything about one job: data, verdict, steps, losses, every move.

    Example: dropforge show last
    """
    with existing_store(context) as store:
        found = store.find(job)
        events = store.transitions(found.id)
        eta = None if found.state in FINAL_STATES else _etas(context.obj.settings, store).get(found.id)
    if as_json:
        print_json({**json.loads(to_json(found)), "eta_seconds": eta, "events": json.loads(to_json(events))})
    else:
        running = _running(context.obj.settings)
        is_running = found.state is JobState.RUNNING and running.get("id") == found.id
        shown = render.job(
            found, events, context.obj.settings, running=running if is_running else None, eta_seconds=eta
        )
        out.print(shown)


@app.command("submit", rich_help_panel=DATA)
def submit_file(
    context: typer.Context,
    files: Annotated[
        list[Path],
        typer.Argument(help="JSON lines, or .json, .csv, .tsv, .parquet to convert; each is copied, with its sidecar."),
    ],
    *,
    priority: Annotated[Priority, typer.Option(help="Order in the queue.")] = Priority.NORMAL,
    force: Annotated[
        bool, typer.Option("--force", help="Train it even if the same content was trained before.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the jobs; the exit code is their result.")] = False,
    no_check: Annotated[bool, typer.Option("--no-check", help="Drop them without `dropforge check`.")] = False,
    encoding: Annotated[
        str | None, typer.Option(help="Of a .json, .csv or .tsv file that is not UTF-8, as cp1252.")
    ] = None,
) -> None:
    """Check files and copy them into the inbox the safe way: written (or converted) beside, then renamed.

    One that is refused (exit 3) does not keep the others out.

    Example: dropforge submit monday.jsonl tuesday.csv --wait
    """
    from daemon.cli.submit import Submitted, no_daemon_note, submit, wait_for

    settings = context.obj.settings
    known = _known_encoding(encoding)
    codes: list[int] = []
    dropped: list[Submitted] = []
    for file in files:
        try:
            placed = submit(settings, file, priority=priority, force=force, encoding=known, checked=not no_check)
        except (RejectedData, NotFound) as error:
            codes.append(complain(str(error), error.exit_code))
            continue
        dropped.append(placed)
        if placed.converted is not None:
            notes = "".join(f"; {note}" for note in placed.converted.notes)
            rows = f"{placed.converted.rows:,} {'row' if placed.converted.rows == 1 else 'rows'}"
            out.print(f"converted {rows} of {escape(str(file))}{notes}", markup=False)
        out.print(f"dropped {escape(str(placed.path))}", markup=False)
    if wait:
        codes += [_tell_end(wait_for(settings, placed)) for placed in dropped]
    elif dropped and (note := no_daemon_note(settings)):
        out.print(note, markup=False)
    raise typer.Exit(next((code for code in codes if code), 0))


def _tell_end(job: Job) -> int:
    """Print how a job ended; returns the exit code that says it."""
    out.print(f"{job.id} {job.state}: {escape(job.reason)}", markup=False)
    if job.advice:
        out.print(f"hint: {escape(job.advice)}", markup=False)
    trained = job.state is JobState.SUCCEEDED or job.duplicate_of is not None
    if job.result is not None and job.result.evaluation and job.result.evaluation.action is GateAction.HELD:
        out.print(
            f"hint: `dropforge promote {job.version}` makes it current all the same, `discard` deletes it", markup=False
        )
        return 3
    return 0 if trained else 3 if job.state is JobState.REJECTED else 1


def _known_encoding(name: str | None) -> str | None:
    if name is None:
        return None
    try:
        known = codecs.lookup(name).name
        "".encode(known)  # not every codec is one of text
    except LookupError as error:
        raise ConfigError(
            operation="use --encoding",
            subject=escape(name),
            cause="no such encoding is known",
            hint="`iconv -l` lists them",
        ) from error
    return "utf-8-sig" if known == "utf-8" else known  # a byte order mark belongs to no text


@app.command(rich_help_panel=DATA)
def check(
    context: typer.Context,
    files: Annotated[list[Path], typer.Argument(help="Files to check; nothing is moved or queued.")],
    as_json: JsonFlag = False,
) -> None:
    """Say what the daemon would say of these files: format, rows, digest, bad lines. Exit 3 when one is refused.

    Example: dropforge check monday.jsonl
    """
    from daemon.cli.check import check_files, render_text

    settings = context.obj.settings
    store = open_for_reading(settings.store_path) if is_made(settings.store_path) else None
    try:
        reports = check_files(files, settings, store)
    finally:
        if store is not None:
            store.close()
    if as_json:
        print_json({"files": [report.to_dict() for report in reports]})
    else:
        for report in reports:
            out.print(render_text(report), markup=False)
    raise typer.Exit(0 if all(report.accepted for report in reports) else 3)


@app.command(rich_help_panel=DATA)
def preview(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="A file that could be dropped; nothing is moved or queued.")],
    rows: Annotated[int, typer.Option("-n", "--rows", min=1, help="How many rows to show.")] = 3,
    row: Annotated[int | None, typer.Option("--row", min=1, help="Show the row on this line alone.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Show rows exactly as the trainer would see them, with what is learned in colour. Exit 3 when one is refused.

    Example: dropforge preview chats.jsonl -n 2
    """
    from daemon.cli.preview import preview as show_rows
    from daemon.cli.preview import render as render_rows

    shown = show_rows(file, context.obj.settings, rows=rows, line=row)
    if as_json:
        print_json(shown)
    else:
        out.print(render_rows(shown, colour=out.color_system is not None), soft_wrap=True)
    raise typer.Exit(3 if shown["refused"] else 0)


@app.command("cancel", rich_help_panel=QUEUE)
def cancel_job(
    context: typer.Context,
    job: Annotated[str, typer.Argument(help=JOB, autocompletion=completion.open_job)],
    hand_back: Annotated[
        bool, typer.Option("--return", help="Put its file back into the inbox instead of failed/.")
    ] = False,
) -> None:
    """Cancel a job that waits or runs; a running one seals a checkpoint first.

    Example: dropforge cancel last --return
    """
    with existing_store(context) as store:
        out.print(control.cancel(context.obj.settings, store, store.find(job), hand_back=hand_back), markup=False)


@app.command("retry", rich_help_panel=QUEUE)
def retry_job(
    context: typer.Context,
    job: Annotated[str, typer.Argument(help=JOB, autocompletion=completion.unsuccessful_job)],
) -> None:
    """Put a failed, rejected or cancelled job back into the queue, under the settings of now.

    Example: dropforge retry last
    """
    with existing_store(context) as store:
        out.print(control.retry(context.obj.settings, store, store.find(job)), markup=False)


@app.command("move", rich_help_panel=QUEUE)
def move_job(
    context: typer.Context,
    job: Annotated[str, typer.Argument(help=JOB, autocompletion=completion.queued_job)],
    first: Annotated[bool, typer.Option("--first", help="Before all others of its priority.")] = False,
    priority: Annotated[Priority | None, typer.Option(help="Its new priority.")] = None,
) -> None:
    """Change a queued job's place.

    Example: dropforge move last --first
    """
    if not first and priority is None:
        raise ConfigError(operation="move job", subject=job, cause="no place was named", hint="--first or --priority")
    with existing_store(context) as store:
        out.print(control.move(store, store.find(job), first=first, priority=priority), markup=False)


@app.command("pause", rich_help_panel=QUEUE)
def pause_queue(
    context: typer.Context,
    after_job: Annotated[bool, typer.Option("--after-job", help="Let the running job come to its end.")] = False,
    reason: Annotated[str, typer.Option(help="Shown in status.")] = "",
) -> None:
    """Hold the queue, also over restarts: the running job seals a checkpoint and is queued again.

    Example: dropforge pause --after-job --reason 'the GPU is needed'
    """
    with existing_store(context) as store:
        out.print(control.pause(store, after_job=after_job, reason=reason), markup=False)


@app.command("resume", rich_help_panel=QUEUE)
def resume_queue(context: typer.Context) -> None:
    """Let a paused queue go on.

    Example: dropforge resume
    """
    with existing_store(context) as store:
        out.print(control.resume(store), markup=False)
