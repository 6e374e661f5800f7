"""Pictures in files, drawn by matplotlib, which is an extra; and that of `dropforge plot -o FILE`."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from daemon.cli.chart import short
from daemon.cli.job_curves import INCOMPARABLE, JobCurves
from daemon.errors import ConfigError, DropforgeError
from guard.atomic import write_atomic

# Told apart by people who see fewer colours as well (Okabe and Ito), and black first on white paper.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
KINDS = (".png", ".svg", ".pdf")
INCHES = (11.0, 6.2)
DOTS_PER_INCH = 150


def write_plot(path: Path, found: Sequence[JobCurves]) -> Path:
    """Draw the curves into a file; returns its path. Raises ConfigError, DropforgeError."""
    return write_figure(path, lambda: figure(found), example="dropforge plot last -o curves.png")


def load_matplotlib(*, instead: str) -> tuple[Any, Any]:
    """Return matplotlib and its figures' class. Raises ConfigError, with what there is `instead`, where it is missing."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            operation="plot into a file",
            cause="it needs matplotlib, which is not installed",
            hint=f"`pip install 'dropforge[plot]'`; {instead}",
        ) from error
    return mpl, Figure


def write_figure(path: Path, draw: Callable[[], Any], *, example: str) -> Path:
    """Write what `draw` returns into a file; returns its path. Its name says which kind.

    Raises ConfigError for a kind that is not known or where matplotlib is missing, DropforgeError where it cannot be written.
    """
    kind = path.suffix.lower()
    if kind not in KINDS:
        raise ConfigError(
            operation="plot into",
            subject=path,
            cause=f"its name ends in none of {', '.join(KINDS)}",
            hint=f"for example `{example}`",
        )
    picture = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that its font has not: they are drawn as boxes
        drawn = draw()
        # Without a date the same numbers are the same file.
        drawn.savefig(
            picture, format=kind[1:], dpi=DOTS_PER_INCH, metadata=None if kind == ".png" else {_DATES[kind]: None}
        )
    try:
        write_atomic(path, picture.getvalue())
    except OSError as error:
        raise DropforgeError(
            operation="write",
            subject=path,
            cause=error.strerror or str(error),
            hint="name a file in a folder that you may write to",
        ) from error
    return path


_DATES = {".svg": "Date", ".pdf": "CreationDate"}


def figure(found: Sequence[JobCurves]) -> Any:
    """Return the matplotlib figure: losses at the left, learning rate and speed at the right. Raises ConfigError."""
    mpl, make = load_matplotlib(instead="without a file the curves are drawn in the terminal")
    with mpl.rc_context({"font.size": 10, "svg.hashsalt": "dropforge", "axes.unicode_minus": False}):
        drawn = make(figsize=INCHES, layout="constrained")
        grid = drawn.add_gridspec(2, 2, width_ratios=(3, 2))
        losses = drawn.add_subplot(grid[:, 0])
        rates, speeds = (drawn.add_subplot(grid[row, 1], sharex=losses) for row in (0, 1))
        for number, one in enumerate(found):
            colour = COLOURS[number % len(COLOURS)]
            _draw_losses(losses, one, colour)
            _draw(rates, one.curves.learning_rate, color=colour)
            _draw(speeds, one.curves.tokens_per_second, color=colour)
        for axes, title in ((losses, "loss"), (rates, "learning rate"), (speeds, "tokens a second")):
            _dress(axes, title, is_drawn=bool(axes.lines))
        speeds.set_ylim(bottom=0)
        _add_legend(losses)
        if len({one.job.dataset.digest for one in found if one.job.dataset}) > 1:
            drawn.supxlabel(INCOMPARABLE, fontsize=8, color="0.35")
    return drawn


def _draw_losses(axes: Any, one: JobCurves, colour: str) -> None:
    curves = one.curves
    _draw(axes, curves.loss, color=colour, label=one.label, alpha=0.9)
    if curves.held_out_loss:
        before, after = curves.held_out_loss[0][1], curves.held_out_loss[-1][1]
        label = f"held out: {before:.3f} to {after:.3f}" if len(curves.held_out_loss) > 1 else f"held out: {before:.3f}"
        # Two points, before and after, say nothing of the way between.
        line = ":" if len(curves.held_out_loss) > 2 else ""
        marks = {"linestyle": line, "marker": "o", "markersize": 6, "markerfacecolor": "white"}
        axes.plot(*zip(*curves.held_out_loss, strict=True), color=colour, label=label, **marks)


def _draw(axes: Any, points: Sequence[tuple[int, float]], **style: Any) -> None:
    """A line through the points; of a single one, its mark."""
    if points:
        axes.plot(*zip(*points, strict=True), marker="." if len(points) < 3 else "", linewidth=1.6, **style)


def _dress(axes: Any, title: str, *, is_drawn: bool) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("step")
    axes.margins(y=0.08)
    axes.yaxis.set_major_formatter(lambda value, _: short(value))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if not is_drawn:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", va="center", color="0.5")


def _add_legend(axes: Any) -> None:
    """Name the curves. A dataset's name is no formula, whatever dollar signs it has."""
    if axes.lines:
        for text in axes.legend(loc="best", fontsize=9, frameon=False).get_texts():
            text.set_parse_math(False)
