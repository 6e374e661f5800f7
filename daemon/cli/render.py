"""What people see: status, jobs, versions as rich renderables. Values in, renderables out."""

from __future__ import annotations

import json
import pwd
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from daemon.cli.estimates import format_duration
from daemon.cli.job_table import JobTable, owner_cells
from daemon.config import Settings
from daemon.evaluation.gate import held_reason
from daemon.evaluation.statistics import describe, describe_eval
from daemon.inbox import layout
from daemon.inbox.report import remarks
from daemon.job import (
    DUPLICATE,
    FINAL_STATES,
    Job,
    JobState,
    JobTransition,
    Priority,
    RunResult,
    seconds_between,
    utc_now,
)
from daemon.run_dir import LOG_NAME, run_dir_of
from daemon.text import HOLD_CHARACTERS, escape, printable
from daemon.versions import Version

if TYPE_CHECKING:  # what the doctor imports would be loaded by every command
    from daemon.cli.doctor import Finding

POINTS_SHOWN = 12  # evaluations during a run; `dropforge show --json` has up to 100
REASON = 300  # characters of a reason or a hint in a list; `dropforge show` has it whole
STATE_STYLES = {
    JobState.SUCCEEDED: "green",
    JobState.RUNNING: "cyan",
    JobState.QUEUED: "blue",
    JobState.CLAIMED: "blue",
    JobState.CANCELLED: "yellow",
    JobState.FAILED: "red",
    JobState.REJECTED: "red",
}


def status_view(snapshot: Mapping[str, Any], *, queue_seconds: float | None = None) -> RenderableType:
    """status.json for people; `queue_seconds` until the last queued job is done, where that can be told."""
    head = Table.grid()  # which breaks a long line between words
    head.add_column(overflow="fold")
    head.add_row(headline(snapshot))
    parts: list[RenderableType] = [head]
    grid = _grid()
    counts = {name: number for name, number in snapshot.get("queue", {}).items() if number}
    queue = ", ".join(f"{number} {printable(str(name))}" for name, number in counts.items()) or "empty"
    if counts.get(JobState.QUEUED) and queue_seconds is not None:
        queue += f"; all done in about {format_duration(queue_seconds)}"
    grid.add_row("queue", queue)
    model = snapshot.get("model")
    grid.add_row(
        "model",
        f"version {printable(str(model['version']))}, from {printable(str(model['dataset']))}"
        if model
        else "no version yet",
    )
    if held := [printable(str(name)) for name in snapshot.get("held") or ()]:
        told = f"{', '.join(held[-5:])}: lost something of earlier datasets; `dropforge promote` or `discard` decides"
        grid.add_row("held", Text(told, style="yellow"))
    alive = snapshot.get("alive") is not False
    if alive:
        grid.add_row("watching", printable(str(snapshot.get("watch_mode") or "not watching")))
    job = snapshot.get("job")
    if job and alive:
        grid.add_row("job", f"{printable(str(job['id']))}  {printable(str(job['dataset']))}  attempt {job['attempt']}")
        if (owner := user_name(job.get("owner"))) is not None:
            grid.add_row("", f"dropped by {owner}")
        grid.add_row("", progress_line(job))
    for name in ("waiting", "left_alone"):
        found = snapshot.get(name, ())
        for item in found[:10]:
            grid.add_row(name.replace("_", " "), f"{printable(str(item['file']))}: {printable(str(item['reason']))}")
        if len(found) > 10:
            grid.add_row("", f"and {len(found) - 10} more")
    for warning in snapshot.get("warnings", ())[:10] if alive else ():
        grid.add_row("warning", Text(printable(str(warning), most=400), style="yellow"))
    parts.append(grid)
    if snapshot.get("recent"):
        recent = snapshot["recent"][:10]
        parts += ["", recent_jobs(recent), *filter(None, map(_not_trained, recent))]
        parts += [_run_warnings(entry) for entry in recent if entry.get("warnings")]
    return Group(*parts)


def headline(snapshot: Mapping[str, Any]) -> Text:
    """What the daemon does, or that it is dead, whatever the file claims."""
    liveness = snapshot.get("liveness")
    what = str(snapshot["status"]) if liveness in ("alive", "stopped") else str(liveness)
    style = STATUS_STYLES.get(what, "blue")
    head = Text.assemble((what, style))
    if liveness == "alive":
        if snapshot.get("reason"):
            head.append(f"  {printable(str(snapshot['reason']), most=HOLD_CHARACTERS)}")
        head.append(f"  pid {snapshot['pid']}, heartbeat {snapshot['age_seconds']:.0f} s ago", style="dim")
    elif liveness == "stopped":
        head.append(f"  since {escape(clock(str(snapshot['timestamp'])))}", style="dim")
    elif liveness == "hung":
        head.append(f"  pid {snapshot['pid']} is there, but its last heartbeat was {snapshot['age_seconds']:.0f} s ago")
    elif liveness == "dead":
        head.append(
            f"  the daemon (pid {snapshot['pid']}) is gone; its last heartbeat was at {escape(clock(str(snapshot['timestamp'])))}"
        )
    elif liveness == "unknown":
        last = f"its last heartbeat was at {escape(clock(str(snapshot['timestamp'])))}"
        head.append(f"  this account sees neither the daemon (pid {snapshot['pid']}) nor the root's lock; {last}")
    return head


STATUS_STYLES = {
    "training": "bold cyan",
    "idle": "green",
    "waiting": "blue",
    "paused": "yellow",
    "stopped": "yellow",
    "dead": "bold red",
    "hung": "bold red",
    "unknown": "yellow",
}


def clock(timestamp: str) -> str:
    """`2026-11-23 04:41 UTC` from the ISO 8601 in UTC that everything is written in."""
    return f"{timestamp[:16].replace('T', ' ')} UTC" if timestamp else ""


def progress_line(job: Mapping[str, Any]) -> str:
    """`training 12/90  loss 3.21  lr 1.0e-03  2,310 tok/s  40 s left`, as far as it is known."""
    line = str(job.get("phase", ""))
    if job.get("total_steps"):
        line += f" {job.get('step', 0)}/{job['total_steps']}"
    for key, form in (
        ("loss", "  loss {:.4f}"),
        ("learning_rate", "  lr {:.1e}"),
        ("tokens_per_second", "  {:,.0f} tok/s"),
    ):
        if job.get(key) is not None:
            line += form.format(job[key])
    if job.get("held_out_losses"):
        line += f"  held out {job['held_out_losses'][-1][1]:.4f}"
    if job.get("eta_seconds") is not None:
        line += f"  {format_duration(float(job['eta_seconds']))} left"
    return line


def job_list(
    found: Sequence[Job], *, now: str | None = None, running: Mapping[str, Any] | None = None
) -> RenderableType:
    """One line a job; below the table, why those that did not succeed are where they are.

    `running` is the status file's job, whose steps the store does not have yet.
    """
    at = now or utc_now()
    rows = []
    for item, owner in zip(found, owner_cells([item.owner for item in found]), strict=True):
        result = item.result
        seconds = _seconds_of(item, at)
        rows.append(
            (
                Text(item.id),
                Text(escape(item.name, most=60)),
                owner,
                state_text(item.state, item.duplicate_of),
                Text(format_duration(seconds) if seconds is not None else ""),
                Text(_steps_of(item, running or {})),
                _loss_change(result.held_out_before, result.held_out_after) if result else Text(),
                Text(item.version or ""),
            )
        )
    table = JobTable(rows=rows)
    grid = _grid()
    for item in found:
        if item.state is not JobState.SUCCEEDED and item.reason:
            grid.add_row(item.id, Text(_told(escape(item.reason, most=REASON), escape(item.advice, most=REASON))))
    return Group(table, "", grid) if grid.row_count else table


def _steps_of(item: Job, running: Mapping[str, Any]) -> str:
    """`12/90`: of a finished run its own, of the running one where it is; empty where neither is known."""
    if item.state is JobState.RUNNING:
        is_planned = running.get("id") == item.id and running.get("total_steps")
        return f"{running.get('step') or 0}/{running['total_steps']}" if is_planned else ""
    result = item.result
    return f"{result.steps_run}/{result.steps_planned}" if result and result.steps_planned else ""


def held_out_losses(result: RunResult) -> str | None:
    """`step 10 1.2345, 20 1.1987, ...; best at 20, whose weights were kept`; None without evaluations during the run."""
    points = result.held_out_losses
    if not points:
        return None
    shown = (
        points if len(points) <= POINTS_SHOWN else (*points[: POINTS_SHOWN // 2], None, *points[-POINTS_SHOWN // 2 :])
    )
    text = ", ".join("..." if point is None else f"{point.step} {point.loss:.4f}" for point in shown)
    kept = f", kept: {result.kept_step}" if result.kept_step is not None else ""
    early = "; stopped early" if result.stopped_early else ""
    return f"step {text}; best: {result.best_step}{kept}{early}"


def _seconds_of(item: Job, now: str) -> float | None:
    """How long a job's last attempt took or has run, or how long it has waited; None for one that never ran."""
    if item.state in FINAL_STATES:
        return seconds_between(item.started_at, item.finished_at)
    since = seconds_between(item.started_at if item.state is JobState.RUNNING else item.created_at, now)
    return None if since is None else max(0.0, since)


def state_text(state: str, duplicate_of: str | None) -> Text:
    """A job's state, coloured; `duplicate` for one whose content was trained before."""
    if state == JobState.CANCELLED and duplicate_of:
        return Text(DUPLICATE, style=STATE_STYLES[JobState.CANCELLED])
    return Text(escape(state), style=STATE_STYLES[JobState(state)] if state in set(JobState) else "")


def _told(reason: str, advice: str) -> str:
    return "; ".join(filter(None, (reason, advice)))


def job(
    item: Job,
    events: Sequence[JobTransition],
    settings: Settings,
    *,
    running: Mapping[str, Any] | None = None,
    eta_seconds: float | None = None,
) -> RenderableType:
    """Everything about one job; `running` is the status file's job, when that is this one, `eta_seconds` until it is done."""
    grid = _grid()
    rows: list[tuple[str, Any]] = [
        ("job", item.id),
        ("dataset", escape(item.name)),
        ("state", state_text(item.state, item.duplicate_of)),
        ("progress", progress_line(running) if running else None),
        ("done", f"in about {format_duration(eta_seconds)}" if eta_seconds is not None and not running else None),
        ("reason", escape(item.reason, most=2000)),
        ("hint", escape(item.advice, most=2000) or None),
        ("failure", item.failure),
        ("owner", user_name(item.owner)),
        ("attempt", item.attempt or None),
        ("priority", item.priority if item.priority is not Priority.NORMAL else None),
        *_lines("sidecar", setting_lines(item.overrides)),
        (
            "continues",
            f"job {item.continues}, whose file was written to after it had been taken" if item.continues else None,
        ),
        ("version", item.version),
        (
            "first run",
            f"version {item.first_run.version}, {escape(held_reason(item.first_run.result), most=1000)}"
            if item.first_run
            else None,
        ),
        *(("warning", Text(escape(note), style="yellow")) for note in item.notes),
    ]
    if item.dataset:
        rows += [
            ("rows", f"{item.dataset.rows} ({item.dataset.format}), {item.dataset.size_bytes:,} bytes"),
            ("BLAKE3", item.dataset.digest),
            *remarks(item.dataset),
        ]
    if item.result:
        result = item.result
        rows += [
            ("base model", escape(str((result.base or {}).get("name", "")), most=1000) or None),
            *_lines("verdict", (result.verdict, *(escape(reason, most=1000) for reason in result.reasons))),
            ("cleared", counted(result.cleared, "checkpoint") if result.cleared else None),
            ("resumed from", result.resumed_from),
            ("steps", f"{result.steps_run} of {result.steps_planned} planned"),
            (
                "held-out loss",
                _loss_change(result.held_out_before, result.held_out_after, unmeasured=result.unmeasured)
                if result.unmeasured or None not in (result.held_out_before, result.held_out_after)
                else None,
            ),
            ("during the run", held_out_losses(result)),
            *_lines("replayed", replayed(result)),
            *_lines("earlier datasets", evaluated(result)),
            (
                "withheld",
                f"{counted(result.withheld_rows, 'row')}, held out of earlier datasets"
                if result.withheld_rows
                else None,
            ),
            ("tokens/s", f"{result.tokens_per_second:,.0f}" if result.tokens_per_second else None),
            ("took", format_duration(result.wall_seconds) if result.wall_seconds else None),
            *(("warning", Text(escape(warning), style="yellow")) for warning in result.warnings),
        ]
    directory = run_dir_of(settings.state_dir, item.id)
    rows.append(("file", _located(settings, item)))
    rows.append(("run directory", str(directory) if directory.is_dir() else None))
    rows.append(("log", str(directory / LOG_NAME) if (directory / LOG_NAME).is_file() else None))
    for name, value in rows:
        if value is not None:
            grid.add_row(name, value if isinstance(value, Text) else Text(str(value)))
    moves = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("at", "from", "to", "reason"):
        moves.add_column(name, overflow="fold")
    for event in events:
        moves.add_row(event.at, event.old or "", event.new, Text(escape(event.reason)))
    return Group(grid, "", moves)


def replayed(result: RunResult) -> list[str]:
    """Which rows of earlier datasets were trained again: their sum, then each dataset; empty when none was."""
    if not result.replayed:
        return []
    rows, tokens = (sum(getattr(dataset, name) for dataset in result.replayed) for name in ("rows", "tokens"))
    total = f"{counted(rows, 'row')} of earlier datasets, {counted(tokens, 'trained token')} an epoch"
    return [total, *(f"{dataset.rows:,} of {escape(dataset.name)}" for dataset in result.replayed)]


def evaluated(result: RunResult) -> list[str]:
    """What was kept of earlier datasets: the verdict and its cost, then each dataset; empty when none was known."""
    evaluation = result.evaluation
    if evaluation is None or not (
        evaluation.datasets or evaluation.unscored or evaluation.unmeasured or evaluation.evals
    ):
        return []
    blend = "" if evaluation.alpha is None else f", blended with the parent at {evaluation.alpha:g}"
    total = f"{evaluation.verdict}, {evaluation.action}{blend}; {evaluation.scored_tokens:,} tokens scored in {evaluation.seconds:.1f} s"
    lines = [total, *(f"{escape(one.name)}: {one.verdict}, {describe(one)}" for one in evaluation.datasets)]
    lines += [f"eval {escape(one.name)}: {one.verdict}, {describe_eval(one)}" for one in evaluation.evals]
    if evaluation.tried and evaluation.alpha is None:
        lines.append("no blend with the parent loses little enough and keeps the gain on the new dataset")
    if evaluation.unscored:
        lines.append(f"not scored this time: {', '.join(map(escape, evaluation.unscored))}")
    if evaluation.unmeasured:
        lines.append(f"without held-out rows: {', '.join(map(escape, evaluation.unmeasured))}")
    return lines


def setting_lines(tables: Mapping[str, Any]) -> list[str]:
    """Settings as they are written in a file, one a line: `[training] learning_rate = 0.001`."""
    return [
        escape(f"[{table}] {key} = {json.dumps(value, ensure_ascii=False)}", most=400)
        for table, settings in tables.items()
        for key, value in settings.items()
    ]


def counted(number: int, noun: str) -> str:
    """`1 row`, `1,200 rows`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _lines(name: str, lines: Sequence[str]) -> list[tuple[str, str]]:
    """Rows of a grid: the name beside the first line alone."""
    return [("" if number else name, line) for number, line in enumerate(lines)]


def user_name(owner: int | None) -> str | None:
    """`alice (1001)`; the number alone where it has no name, None where it is not known."""
    if owner is None:
        return None
    try:
        return f"{escape(pwd.getpwuid(owner).pw_name)} ({owner})"
    except (KeyError, OverflowError):
        return str(owner)


def _located(settings: Settings, item: Job) -> str:
    try:
        path = layout.locate(settings, item)
    except OSError as error:
        return f"cannot be found: {escape(str(error), most=2000)}"
    return escape(str(path), most=2000) if path else "no longer in the inbox"


def version_list(
    found: Sequence[Version], current: Version | None, held: Sequence[str] = (), history: Sequence[str] = ()
) -> RenderableType:
    """One line a version, oldest first; what it continued where that is not the line above. `history` stands below."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    origins = _origins(found)
    for name in ("version", "from", "dataset", "steps", "held-out loss", "trained (UTC)"):
        if name == "from" and not any(origins):
            continue  # each continued the one above
        table.add_column(name, no_wrap=name != "dataset", justify="right" if name == "steps" else "left")
    for item, origin in zip(found, origins, strict=True):
        record = item.record
        is_current = current is not None and item.name == current.name
        dataset = Text(escape(str(record.get("dataset", "")), most=60), no_wrap=True, overflow="ellipsis")
        table.add_row(
            Text(
                f"{item.name} *" if is_current else f"{item.name} held" if item.name in held else item.name,
                style="bold green" if is_current else "yellow" if item.name in held else "",
            ),
            *((Text(escape(origin, most=20)),) if any(origins) else ()),
            dataset,
            Text(str(record.get("steps", "?"))),
            _loss_change(record.get("held_out_before"), record.get("held_out_after"), unmeasured="not measured"),
            Text(clock(str(record.get("created_at", ""))).removesuffix(" UTC"), style="dim"),
        )
    notes = []
    if current is not None:
        notes.append("* the current version, which the next run continues and `latest` names")
    notes += history
    if held:
        notes.append("held: it has lost something of earlier datasets; `dropforge promote` or `discard` decides")
    measured = {record.get("dataset_digest") for record in (item.record for item in found) if _is_measured(record)}
    if len(measured) > 1:
        notes.append("Each held-out loss is of that dataset's own rows: compare within a line, not between lines.")
    return Group(table, *([""] if notes else []), *(Text(note, style="dim") for note in notes))


def _origins(found: Sequence[Version]) -> list[str]:
    """What each version continued; empty where that is the one before it, or the base model for the first."""
    before: str | None = None
    origins = []
    for item in found:
        parent = item.record.get("parent", "unknown")
        origins.append("" if parent == before else "base model" if parent is None else str(parent))
        before = item.name
    return origins


def _is_measured(record: Mapping[str, Any]) -> bool:
    return record.get("held_out_before") is not None and record.get("held_out_after") is not None


def _loss_change(before: float | None, after: float | None, *, unmeasured: str = "") -> Text:
    """`3.210 -> 2.914`, marked where training made it worse; `unmeasured` where it is not known."""
    if before is None or after is None:
        return Text(unmeasured, style="dim")
    shown = Text(f"{before:.3f} -> {after:.3f}")
    return shown.append(" worse", style="yellow") if after > before else shown


def findings(found: Sequence[Finding]) -> RenderableType:
    """The doctor's findings, one a line."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    styles = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    for item in found:
        message = Text(escape(item.message, most=400))
        if item.hint:
            message.append(f"\n-> {escape(item.hint, most=400)}", style="dim")
        grid.add_row(Text(item.verdict.value, style=styles[item.verdict.value]), item.name, message)
    return grid


def recent_jobs(entries: Sequence[Mapping[str, Any]], *, now: str | None = None) -> RenderableType:
    """The last jobs of a status file."""
    at = now or utc_now()
    rows = []
    for entry, owner in zip(entries, owner_cells([entry.get("owner") for entry in entries]), strict=True):
        age = seconds_between(str(entry.get("updated_at", "")), at)
        rows.append(
            (
                Text(printable(str(entry["id"]))),
                Text(printable(str(entry["dataset"]), most=60)),
                owner,
                state_text(str(entry["state"]), entry.get("duplicate_of")),
                Text(format_duration(max(0.0, age)) if age is not None else ""),
                Text(str(entry.get("steps") or "")),
                _loss_change(entry.get("held_out_before"), entry.get("held_out_after")),
                Text(printable(str(entry.get("version") or ""))),
            )
        )
    return JobTable(rows=rows, time="ago")


def _not_trained(entry: Mapping[str, Any]) -> Text | None:
    """Why a job was refused or failed, and what to do; None for one that was not."""
    if entry["state"] not in (JobState.REJECTED, JobState.FAILED) or not entry.get("reason"):
        return None
    reason, advice = (printable(str(entry.get(key) or ""), most=REASON) for key in ("reason", "hint"))
    return Text(f"{printable(str(entry['dataset']), most=60)}: {_told(reason, advice)}", style="red")


def _run_warnings(entry: Mapping[str, Any]) -> Text:
    """What the run of a finished job warned of first, and where the rest stands."""
    first, *more = entry["warnings"]
    rest = f"; {len(more)} more in `dropforge show {printable(str(entry['id']))}`" if more else ""
    return Text(f"{printable(str(entry['dataset']), most=60)}: {printable(str(first), most=300)}{rest}", style="yellow")


def _grid() -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    return grid
