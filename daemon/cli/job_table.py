"""The table of jobs that `jobs`, `status` and `watch` print."""

from __future__ import annotations

import pwd
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from daemon.text import escape


@dataclass(frozen=True, kw_only=True)
class JobTable:
    """A table for 80 columns: a column without a value is left out, the dataset's name gives way, and nothing wraps.

    The owner is left out as well where there is no room for it.
    """

    rows: Sequence[tuple[Text, ...]]
    time: str = "time"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        names = ("job", "dataset", "owner", "state", self.time, "steps", "held-out loss", "version")
        always = ("job", "dataset", "state")
        widths = {name: max((row[at].cell_len for row in self.rows), default=0) for at, name in enumerate(names)}
        shown = [at for at, name in enumerate(names) if name in always or widths[name]]
        least = (
            sum(max(len(name), 0 if name == "dataset" else widths[name]) + 1 for name in map(names.__getitem__, shown))
            - 1
        )
        if least > options.max_width:
            shown = [at for at in shown if names[at] != "owner"]
        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
        for name in (names[at] for at in shown):
            # Columns that may wrap give way first; the cell's own text then refuses to.
            justify: Literal["left", "right"] = "right" if name in (self.time, "steps") else "left"
            table.add_column(name, no_wrap=name != "dataset", justify=justify, min_width=len(name))
        for row in self.rows:
            row[1].no_wrap, row[1].overflow = True, "ellipsis"
            table.add_row(*(row[at] for at in shown))
        yield table


def owner_cells(owners: Sequence[int | None]) -> list[Text]:
    """A cell for each job: whose it is, where jobs of several users stand in one table; else empty."""
    several = len(set(owners) - {None}) > 1
    return [Text(_short_name(owner) if several and owner is not None else "") for owner in owners]


def _short_name(owner: int) -> str:
    """A user's name, or number where there is none, cut so that a table stays narrow."""
    try:
        return escape(pwd.getpwuid(owner).pw_name, most=12)
    except (KeyError, OverflowError):
        return str(owner)
