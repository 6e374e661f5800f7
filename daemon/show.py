"""What people see: status, jobs, versions as rich renderables. Values in, renderables out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from daemon.config import Settings
from daemon.job import Event, Job, JobState, run_dir
from daemon.text import escape
from daemon.versions import Version

STATE_STYLES = {
    JobState.SUCCEEDED: "green",
    JobState.RUNNING: "cyan",
    JobState.QUEUED: "blue",
    JobState.CLAIMED: "blue",
    JobState.CANCELLED: "yellow",
    JobState.FAILED: "red",
    JobState.REJECTED: "red",
}


def status(snapshot: Mapping[str, Any]) -> RenderableType:
    """status.json for people."""
    alive = bool(snapshot.get("alive"))
    said = snapshot["status"] if alive or snapshot["status"] == "stopped" else "dead"
    style = {"training": "cyan", "idle": "green", "dead": "bold red", "stopped": "yellow"}.get(said, "blue")
    head = Text.assemble(
        (said, style),
        f"  {escape(str(snapshot['reason']))}" if snapshot.get("reason") and alive else "",
        f"  pid {snapshot['pid']}, heartbeat {snapshot['age_seconds']:.0f} s ago" if alive else "",
    )
    if said == "dead":
        head.append(f"  the daemon (pid {snapshot['pid']}) is gone; its last heartbeat was at {snapshot['timestamp']}")
    parts: list[RenderableType] = [head]
    grid = _grid()
    counts = {name: number for name, number in snapshot.get("queue", {}).items() if number}
    grid.add_row("queue", ", ".join(f"{number} {name}" for name, number in counts.items()) or "empty")
    model = snapshot.get("model")
    grid.add_row(
        "model", f"version {model['version']}, from {escape(str(model['dataset']))}" if model else "no version yet"
    )
    grid.add_row("watching", str(snapshot.get("watch_mode") or "not watching"))
    job = snapshot.get("job")
    if job and alive:
        grid.add_row("job", f"{job['id']}  {job['dataset']}  attempt {job['attempt']}")
        grid.add_row("", progress_line(job))
    for item in snapshot.get("waiting", ())[:10]:
        grid.add_row("waiting", f"{escape(str(item['file']))}: {escape(str(item['reason']))}")
    for item in snapshot.get("left_alone", ())[:10]:
        grid.add_row("left alone", f"{escape(str(item['file']))}: {escape(str(item['reason']))}")
    for warning in snapshot.get("warnings", ()):
        grid.add_row("warning", Text(escape(str(warning)), style="yellow"))
    parts.append(grid)
    if snapshot.get("recent"):
        parts.append(_recent(snapshot["recent"][:10]))
    return Group(*parts)


def progress_line(job: Mapping[str, Any]) -> str:
    """`training 12/90  loss 3.21  lr 1.0e-03  2,310 tok/s  40 s left`, as far as it is known."""
    line = str(job.get("phase", ""))
    if job.get("total_steps"):
        line += f" {job.get('step', 0)}/{job['total_steps']}"
    for key, form in (
        ("loss", "  loss {:.4f}"),
        ("learning_rate", "  lr {:.1e}"),
        ("tokens_per_second", "  {:,.0f} tok/s"),
        ("eta_seconds", "  {:.0f} s left"),
    ):
        if job.get(key) is not None:
            line += form.format(job[key])
    return line


def jobs(found: Sequence[Job]) -> Table:
    """One line a job."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("job", no_wrap=True)
    for name in ("dataset", "state", "rows", "steps", "held-out loss", "version", "reason"):
        table.add_column(name, overflow="fold")
    for item in found:
        result = item.result
        table.add_row(
            item.id,
            Text(escape(item.name, most=60)),
            Text(item.state.value, style=STATE_STYLES[item.state]),
            str(item.dataset.rows) if item.dataset else "",
            f"{result.steps_run}/{result.steps_planned}" if result and result.steps_planned else "",
            losses(result.held_out_before, result.held_out_after) if result else "",
            item.version or "",
            Text(escape(item.reason, most=120)),
        )
    return table


def job(item: Job, events: Sequence[Event], settings: Settings) -> RenderableType:
    """Everything about one job."""
    grid = _grid()
    rows: list[tuple[str, Any]] = [
        ("job", item.id),
        ("dataset", escape(item.name)),
        ("state", Text(item.state.value, style=STATE_STYLES[item.state])),
        ("reason", escape(item.reason, most=2000)),
        ("failure", item.failure),
        ("attempt", item.attempt or None),
        ("version", item.version),
    ]
    if item.dataset:
        rows += [
            ("rows", f"{item.dataset.rows} ({item.dataset.format}), {item.dataset.size_bytes:,} bytes"),
            ("BLAKE3", item.dataset.digest),
        ]
    if item.result:
        result = item.result
        rows += [
            ("verdict", f"{result.verdict}{': ' + '; '.join(result.reasons) if result.reasons else ''}"),
            ("cleared", f"{result.cleared} checkpoints" if result.cleared else None),
            ("resumed from", result.resumed_from),
            ("steps", f"{result.steps_run} of {result.steps_planned} planned"),
            ("held-out loss", losses(result.held_out_before, result.held_out_after) or None),
            ("tokens/s", f"{result.tokens_per_second:,.0f}" if result.tokens_per_second else None),
            *(("warning", Text(escape(warning), style="yellow")) for warning in result.warnings),
            ("hint", escape(result.hint) or None),
        ]
    rows.append(("run directory", str(run_dir(settings.state_dir, item.id))))
    for name, value in rows:
        if value is not None:
            grid.add_row(name, value if isinstance(value, Text) else str(value))
    moves = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("at", "from", "to", "reason"):
        moves.add_column(name, overflow="fold")
    for event in events:
        moves.add_row(event.at, event.old or "", event.new, Text(escape(event.reason)))
    return Group(grid, "", moves)


def versions(found: Sequence[Version], current: Version | None) -> Table:
    """One line a version."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("version", "from", "dataset", "rows", "steps", "held-out loss", "created"):
        table.add_column(name, overflow="fold")
    for item in found:
        record = item.record
        table.add_row(
            f"{item.name} *" if current and item.name == current.name else item.name,
            str(record.get("parent") or "base"),
            Text(escape(str(record.get("dataset", "")), most=60)),
            str(record.get("rows", "")),
            str(record.get("steps", "")),
            losses(record.get("held_out_before"), record.get("held_out_after")),
            str(record.get("created_at", "")),
        )
    return table


def losses(before: float | None, after: float | None) -> str:
    """`3.210 -> 2.914`, as far as they are known."""
    if before is None or after is None:
        return ""
    return f"{before:.3f} -> {after:.3f}"


def _recent(entries: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", title="recent", title_justify="left")
    table.add_column("job", no_wrap=True)
    for name in ("dataset", "state", "steps", "held-out loss", "version"):
        table.add_column(name, overflow="fold")
    for entry in entries:
        table.add_row(
            entry["id"],
            Text(str(entry["dataset"])),
            Text(entry["state"], style=STATE_STYLES[JobState(entry["state"])]),
            str(entry["steps"] or ""),
            losses(entry.get("held_out_before"), entry.get("held_out_after")),
            entry["version"] or "",
        )
    return table


def _grid() -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    return grid
