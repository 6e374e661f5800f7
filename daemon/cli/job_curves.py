"""A job's curves as panels of a terminal: values in, renderables out."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.text import Text

from daemon.cli.chart import Series, legend, line_chart, uses_ascii
from daemon.curves import Curves
from daemon.job import Job
from daemon.text import escape

NAME_CHARACTERS = 40
HEIGHTS: Mapping[str, int] = {"loss": 10, "held-out loss": 6, "learning rate": 5, "tokens/s": 5}  # lines of a panel
INCOMPARABLE = "Held-out losses are each of that dataset's own rows: compare within a job, not between jobs."


@dataclass(frozen=True, kw_only=True)
class JobCurves:
    """A job and its curves."""

    job: Job
    curves: Curves

    @property
    def label(self) -> str:
        """Its version, or its id while it has none, and its dataset: safe to print."""
        return f"{self.job.version or self.job.id} {escape(self.job.name, most=NAME_CHARACTERS)}"


def terminal_plot(
    found: Sequence[JobCurves], *, width: int, ascii_only: bool = False, only: Collection[str] = HEIGHTS
) -> RenderableType:
    """A panel for each curve that any job has, or for those that are named.

    Of one job, the held-out losses stand in the panel of the losses.
    """
    shown = Text(no_wrap=True, overflow="ellipsis")
    if len(found) == 1:
        shown.append(f"{found[0].label}, {found[0].job.state}", style="bold")
    else:
        shown = legend([Series(name=one.label, points=()) for one in found], ascii_only=ascii_only)
    parts: list[RenderableType] = [shown]
    last = max(step for one in found for points in one.curves.all() for step, _ in points)
    for title, series in panels(found):
        if title not in only:
            continue
        chart = line_chart(series, width=width, height=HEIGHTS[title], span=(0, last), ascii_only=ascii_only)
        if chart:
            parts += [
                "",
                Text(title, style="bold") if len(found) > 1 else legend(series, ascii_only=ascii_only),
                *chart,
            ]
    if len({one.job.dataset.digest for one in found if one.job.dataset}) > 1:
        parts += ["", Text(INCOMPARABLE, style="dim")]
    return Group(*parts)


def is_plain(console: Console, found: Sequence[JobCurves]) -> bool:
    """Whether to draw with ASCII marks: for the terminal's sake, or where only marks tell several jobs apart."""
    has_one_colour = console.color_system is None or console.no_color
    return uses_ascii(console.encoding, os.environ) or (len(found) > 1 and has_one_colour)


def panels(found: Sequence[JobCurves]) -> list[tuple[str, list[Series]]]:
    """The panels of a plot: their titles and series, of which some may have no point."""
    losses = [Series(name="loss", points=one.curves.loss) for one in found]
    held_out = [Series(name="held-out loss", points=one.curves.held_out_loss, is_joined=False) for one in found]
    return [
        *([("loss", [*losses, *held_out])] if len(found) == 1 else [("loss", losses), ("held-out loss", held_out)]),
        ("learning rate", [Series(name="learning rate", points=one.curves.learning_rate) for one in found]),
        ("tokens/s", [Series(name="tokens/s", points=one.curves.tokens_per_second) for one in found]),
    ]
