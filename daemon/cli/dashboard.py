"""`dropforge status --watch`: the status file as a live screen.

What is drawn is a pure function of the snapshot and the width; the loop reads the file and draws. The screen is redrawn in
place on the terminal's other page, so that nothing flickers and the shell's own lines are back afterwards.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from daemon.cli import render
from daemon.cli.estimates import format_duration
from daemon.observability.status import read_status
from daemon.text import escape, printable

REDRAW_SECONDS = 0.5
BARS = "▁▂▃▄▅▆▇█"
RECENT, WAITING, WARNINGS = 8, 5, 3


def run_dashboard(path: Path, console: Console) -> None:
    """Draw until Ctrl-C. A file that is missing or torn away is said so; the next look may find it again."""
    with Live(console=console, screen=console.is_terminal, auto_refresh=False, transient=True) as live:
        try:
            while True:
                live.update(_look(path, console.width), refresh=True)
                time.sleep(REDRAW_SECONDS)
        except KeyboardInterrupt:
            return


def _look(path: Path, width: int) -> RenderableType:
    try:
        snapshot = read_status(path)
    except (OSError, ValueError) as error:
        return Text(escape(f"cannot read {path}: {error}"), style="red")
    if snapshot is None:
        return Text(escape(f"no daemon has run on this root yet: there is no {path}"))
    return screen(snapshot, width)


def screen(snapshot: Mapping[str, Any], width: int) -> RenderableType:
    """The whole screen, no line longer than `width`."""
    parts: list[RenderableType] = [_fit(render.headline(snapshot)), ""]
    job = snapshot.get("job")
    if job and snapshot.get("alive") is not False:
        parts += [*_job(job, width), ""]
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


def _job(job: Mapping[str, Any], width: int) -> list[RenderableType]:
    name = f"{printable(str(job['id']))}  {printable(str(job['dataset']))}  attempt {job['attempt']}"
    step, total = int(job.get("step") or 0), int(job.get("total_steps") or 0)
    eta = job.get("eta_seconds")
    tail = f" {step}/{total}  {step / total:4.0%}" if total else f" {escape(str(job.get('phase', '')))}"
    tail += f"  {format_duration(float(eta))} left" if eta is not None else ""
    room = max(10, width - len(tail) - 2)
    filled = round(room * step / total) if total else 0
    bar = Text.assemble((("━" * filled), "cyan"), (("━" * (room - filled)), "dim"), tail)
    lines: list[RenderableType] = [_fit(Text(name, style="bold")), _fit(bar)]
    losses = [loss for _, loss in job.get("losses") or ()]
    if losses:
        ends = f" {losses[0]:.3f} → {losses[-1]:.3f}"
        lines.append(_fit(Text.assemble("loss ", (spark(losses, max(8, width - len(ends) - 6)), "cyan"), ends)))
    return [*lines, _fit(Text(render.progress_line(job), style="dim"))]


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


def spark(values: Sequence[float], width: int) -> str:
    """A line of `width` bars at most, from the smallest value to the largest."""
    size = min(width, len(values))
    parts = [values[len(values) * number // size : len(values) * (number + 1) // size] for number in range(size)]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means), max(means)
    return "".join(BARS[round((value - low) / (high - low) * (len(BARS) - 1)) if high > low else 0] for value in means)


def _fit(text: Text) -> Text:
    text.no_wrap, text.overflow = True, "ellipsis"
    return text
