"""Curves as lines of characters: braille dots where the terminal has them, ASCII marks elsewhere.

Pure: series and a size in, lines out; what a terminal can show is decided by `uses_ascii`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from rich.text import Text

STYLES = ("cyan", "yellow", "magenta", "green", "blue", "red")
MARKS = "*o+x#@"
POINT = "o"  # no rounder character is one column wide everywhere
BRAILLE = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # bits of a cell by column, then row
PLAIN_TERMINALS = ("dumb", "linux")  # the second is the console of the kernel, whose font has no braille
LEAST_WIDTH = 8  # columns of a chart


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart; its points ascend by x."""

    name: str
    points: Sequence[tuple[float, float]]
    is_joined: bool = True  # False: a mark at each point, and nothing claimed between them


def uses_ascii(encoding: str, environment: Mapping[str, str]) -> bool:
    """Return whether a terminal of this encoding shows ASCII alone."""
    locale = next((environment[name] for name in ("LC_ALL", "LC_CTYPE", "LANG") if environment.get(name)), "")
    if environment.get("TERM") in PLAIN_TERMINALS or locale in ("C", "POSIX"):  # Python itself takes these for UTF-8
        return True
    try:
        "⣿│└─".encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return True
    return False


def line_chart(
    series: Sequence[Series],
    *,
    width: int,
    height: int,
    span: tuple[float, float] | None = None,
    ascii_only: bool = False,
) -> list[Text]:
    """Draw series over each other, `height` lines of at most `width` columns with an axis beside, and one below.

    `span` is what the x axis shows; without it, what the points cover. Empty where no series has a point.
    """
    drawn = [(number, one) for number, one in enumerate(series) if one.points]
    if not drawn:
        return []
    xs = span or [x for _, one in drawn for x, _ in one.points]
    ys = [y for _, one in drawn for _, y in one.points]
    low, high = min(ys), max(ys)
    labels = _labels(low, high, height)
    margin = max(map(len, labels.values()))
    columns = max(LEAST_WIDTH, width - margin - 1)
    wide, tall = (1, 1) if ascii_only else (2, 4)  # dots of a character
    dots: dict[tuple[int, int], dict[tuple[int, int], int]] = {}  # by cell: the dots in it, each of a series
    marks: dict[tuple[int, int], int] = {}  # by cell: of which series
    for number, one in drawn:
        places = [
            (_place(x, min(xs), max(xs), columns * wide), height * tall - 1 - _place(y, low, high, height * tall))
            for x, y in one.points
        ]
        if not one.is_joined:
            marks |= {(y // tall, x // wide): number for x, y in places}
            continue
        for x, y in _joined(places):
            dots.setdefault((y // tall, x // wide), {})[x % wide, y % tall] = number
    side, corner, floor = ("|", "+", "-") if ascii_only else ("│", "└", "─")
    lines = []
    for row in range(height):
        line = Text.assemble((f"{labels.get(row, ''):>{margin}}{side}", "dim"), no_wrap=True)
        cells = [_cell(marks.get((row, column)), dots.get((row, column), {}), ascii_only) for column in range(columns)]
        for style, run in groupby(cells, key=lambda cell: cell[1]):
            line.append("".join(character for character, _ in run), style)
        line.rstrip()
        lines.append(line)
    return [*lines, *_axis(min(xs), max(xs), margin=margin, columns=columns, corner=corner, floor=floor)]


def legend(series: Sequence[Series], *, ascii_only: bool = False) -> Text:
    """Name the series in their colours, with their marks where these are all that tells them apart."""
    shown = Text(no_wrap=True, overflow="ellipsis")
    for number, one in enumerate(series):
        mark = _mark(number) if ascii_only else "━━" if one.is_joined else POINT
        shown.append("   " if number else "").append(f"{mark} ", style=STYLES[number % len(STYLES)]).append(one.name)
    return shown


def short(value: float) -> str:
    """`3.21`, `0.00164`, `1.2e-05`, `12,300`: four digits at most that count."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _labels(low: float, high: float, height: int) -> dict[int, str]:
    """What stands beside which line: the largest value, one between, the smallest."""
    if high == low or height == 1:
        return {height - 1: short(low)}
    labels = {0: short(high), height - 1: short(low)}
    if height >= 5:
        middle = (height - 1) // 2
        labels[middle] = short(high - (high - low) * (middle + 0.5) / height)
    return labels


def _place(value: float, low: float, high: float, size: int) -> int:
    """Which of `size` dots a value falls on; the lowest where all values are equal."""
    return 0 if high <= low else min(size - 1, round((value - low) / (high - low) * (size - 1)))


def _joined(places: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The places, and those on a straight line from each to the next."""
    yield places[0]
    for (x, y), (next_x, next_y) in pairwise(places):
        steps = max(abs(next_x - x), abs(next_y - y))
        for step in range(1, steps + 1):
            yield x + round((next_x - x) * step / steps), y + round((next_y - y) * step / steps)


def _cell(mark: int | None, dots: Mapping[tuple[int, int], int], ascii_only: bool) -> tuple[str, str]:
    """The character of a cell and its colour: of the series whose mark is in it, or that was drawn last."""
    if mark is None and not dots:
        return " ", ""
    number = mark if mark is not None else list(dots.values())[-1]
    style = STYLES[number % len(STYLES)]
    if ascii_only:
        return _mark(number), style
    return POINT if mark is not None else chr(0x2800 + sum(BRAILLE[x][y] for x, y in dots)), style


def _mark(number: int) -> str:
    return MARKS[number % len(MARKS)]


def _axis(first: float, last: float, *, margin: int, columns: int, corner: str, floor: str) -> list[Text]:
    """The line below a chart, and the first and last step under it."""
    begin, end = f"{first:,.0f}", f"step {last:,.0f}"
    if len(begin) + 1 + len(end) > columns:
        begin, end = "", end[-columns:]
    gap = columns - len(begin) - len(end)
    return [
        Text(f"{'':>{margin}}{corner}{floor * columns}", style="dim", no_wrap=True),
        Text(f"{'':>{margin}} {begin}{'':>{gap}}{end}", style="dim", no_wrap=True),
    ]
