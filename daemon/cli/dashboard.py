"""`dropforge status --watch`: the status file as a live screen.

What is drawn is a pure function of the snapshot and the width; the loop reads the file and draws. The screen is redrawn in
place on the terminal's other page, so that nothing flickers and the shell's own lines are back afterwards.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from daemon.cli import render
from daemon.cli.chart import Series, legend, line_chart, uses_ascii
from daemon.cli.estimates import format_duration
from daemon.observability.status import read_status
from daemon.text import escape, printable

REDRAW_SECONDS = 0.5
CHART_LINES = 6
RECENT, WAITING, WARNINGS = 8, 5, 3


def run_dashboard(path: Path, console: Console) -> None:
    """Draw until Ctrl-C. A file that is missing or torn away is said so; the next look may find it again."""
    ascii_only = uses_ascii(console.encoding, os.environ)
    with Live(console=console, screen=console.is_terminal, auto_refresh=False, transient=True) as live:
        try:
            while True:
                live.update(_look(path, console.width, ascii_only=ascii_only), refresh=True)
                time.sleep(REDRAW_SECONDS)
        except KeyboardInterrupt:
            return


def _look(path: Path, width: int, *, ascii_only: bool) -> RenderableType:
    try:
        snapshot = read_status(path)
    except (OSError, ValueError) as error:
        return Text(escape(f"cannot read {path}: {error}"), style="red")
    if snapshot is None:
        return Text(escape(f"no daemon has run on this root yet: there is no {path}"))
    return screen(snapshot, width, ascii_only=ascii_only)


def screen(snapshot: Mapping[str, Any], width: int, *, ascii_only: bool = False) -> RenderableType:
    """The whole screen, no line longer than `width`."""
    parts: list[RenderableType] = [_fit(render.headline(snapshot)), ""]
    job = snapshot.get("job")
    if job and snapshot.get("alive") is not False:
        parts += [*running_job(job, width, ascii_only=ascii_only), ""]
    parts += [_facts(snapshot), ""]
    for title, key, most in (("waiting", "waiting", WAITING), ("left alone", "left_alone", WAITING)):
        found = snapshot.get(key, ())
        if found:
            parts.append(Text(f"{title} ({len(found)})", style="bold"))
            parts += [
                _fit(Text(f"  {printable(str(item['file']))}: {printable(str(item['reason']))}"))
                for item in found[:most]
            ]
    for warning in snapshot.get("warnings", ())[:WARNINGS]:
        parts.append(_fit(Text(f"warning: {printable(str(warning))}", style="yellow")))
    if snapshot.get("recent"):
        parts += ["", render.recent_jobs(snapshot["recent"][:RECENT])]
    parts += ["", Text("Ctrl-C leaves", style="dim")]
    return Group(*parts)


def running_job(
    job: Mapping[str, Any], width: int, *, chart_lines: int = CHART_LINES, ascii_only: bool = False
) -> list[RenderableType]:
    """The status file's `job`: its name, its progress, its losses so far with a chart of so many lines, its numbers."""
    name = f"{printable(str(job['id']))}  {printable(str(job['dataset']))}  attempt {job['attempt']}"
    lines: list[RenderableType] = [_fit(Text(name, style="bold")), _fit(_bar(job, width, ascii_only=ascii_only))]
    losses, held_out = ([(step, loss) for step, loss in job.get(key) or ()] for key in ("losses", "held_out_losses"))
    if losses:
        series = [Series(name=_from_to("loss", losses), points=losses)]
        if held_out:
            series.append(Series(name=_from_to("held out", held_out), points=held_out, is_joined=False))
        lines.append(_fit(legend(series, ascii_only=ascii_only)))
        if chart_lines:
            lines += line_chart(series, width=width, height=chart_lines, ascii_only=ascii_only)
    return [*lines, _fit(Text(render.progress_line(job), style="dim"))]


def _from_to(name: str, points: Sequence[tuple[float, float]]) -> str:
    return f"{name} {points[0][1]:.3f} -> {points[-1][1]:.3f}"


def _bar(job: Mapping[str, Any], width: int, *, ascii_only: bool) -> Text:
    """How far a run is, over the whole width: a bar, step of steps, and the time left."""
    step, total = int(job.get("step") or 0), int(job.get("total_steps") or 0)
    eta = job.get("eta_seconds")
    tail = f" {step}/{total}  {step / total:4.0%}" if total else f" {escape(str(job.get('phase', '')))}"
    tail += f"  {format_duration(float(eta))} left" if eta is not None else ""
    room = max(10, width - len(tail) - 2)
    filled = min(room, round(room * step / total)) if total else 0
    done, rest = ("#", "-") if ascii_only else ("━", "━")
    return Text.assemble((done * filled, "cyan"), (rest * (room - filled), "dim"), tail)


def _facts(snapshot: Mapping[str, Any]) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(no_wrap=True, overflow="ellipsis")
    counts = {name: number for name, number in snapshot.get("queue", {}).items() if number}
    grid.add_row("queue", ", ".join(f"{number} {printable(str(name))}" for name, number in counts.items()) or "empty")
    model = snapshot.get("model")
    current = (
        f"version {printable(str(model['version']))}, from {printable(str(model['dataset']))}"
        if model
        else "no version yet"
    )
    grid.add_row("model", current)
    for device in snapshot.get("gpu") or ():
        used, size = float(device["used_bytes"]) / 2**30, float(device["total_bytes"]) / 2**30
        grid.add_row("gpu", f"{escape(str(device['name']))}  {used:.1f} of {size:.1f} GiB")
    grid.add_row("watching", printable(str(snapshot.get("watch_mode") or "not watching")))
    return grid


def _fit(text: Text) -> Text:
    text.no_wrap, text.overflow = True, "ellipsis"
    return text
