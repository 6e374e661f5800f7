"""The picture of `dropforge versions --matrix -o FILE`, drawn by matplotlib, which is an extra."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from daemon.cli.plot_file import load_matplotlib, write_figure
from daemon.evaluation.matrix import Matrix, MatrixSummary
from daemon.text import escape

MOST_SHOWN = 50  # versions, and datasets; of more, the latest
CELL_INCHES = (0.95, 0.4)
LEAST_RANGE = 0.1  # nats a token: smaller changes stay pale


def write_matrix(path: Path, matrix: Matrix, summary: MatrixSummary | None) -> Path:
    """Draw what each version scored on each dataset into a file; returns its path. Raises ConfigError, DropforgeError."""
    return write_figure(path, lambda: figure(matrix, summary), example="dropforge versions --matrix -o matrix.svg")


def changes(matrix: Matrix) -> dict[tuple[str, str], float]:
    """How much each loss has risen since its dataset was learned, by version and dataset; of those that were scored both times."""
    learned = {row.dataset: row.cells[row.dataset].loss for row in matrix.rows if row.dataset in row.cells}
    return {
        (row.version, digest): cell.loss - learned[digest]
        for row in matrix.rows
        for digest, cell in row.cells.items()
        if digest in learned
    }


def figure(matrix: Matrix, summary: MatrixSummary | None) -> Any:
    """Return the matplotlib figure: losses as numbers, coloured by their change since the dataset was learned.

    What was not scored is empty. Raises ConfigError where matplotlib is missing.
    """
    mpl, make = load_matplotlib(instead="without a file the matrix is printed in the terminal")
    rows, columns = matrix.rows[-MOST_SHOWN:], matrix.datasets[-MOST_SHOWN:]
    changed = changes(matrix)
    limit = max([LEAST_RANGE, *(abs(change) for change in changed.values())])
    grid = [
        [changed.get((row.version, digest), 0.0) if digest in row.cells else float("nan") for digest, _ in columns]
        for row in rows
    ]
    with mpl.rc_context({"font.size": 9, "svg.hashsalt": "dropforge", "axes.unicode_minus": False}):
        size = (max(8.0, 3 + CELL_INCHES[0] * len(columns)), max(4.0, 2.4 + CELL_INCHES[1] * len(rows)))
        drawn = make(figsize=size, layout="constrained")
        axes = drawn.add_subplot()
        image = axes.imshow(grid, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
        for at, row in enumerate(rows):
            for column, (digest, _) in enumerate(columns):
                if (cell := row.cells.get(digest)) is not None:
                    is_strong = abs(grid[at][column]) > 0.6 * limit
                    style = {"color": "white" if is_strong else "black", "ha": "center", "va": "center"}
                    axes.text(column, at, f"{cell.loss:.3f}", **style)
        current = summary.version if summary is not None else None
        names = [f"{row.version}{' *' if row.version == current else ' held' if row.held else ''}" for row in rows]
        axes.set_yticks(range(len(rows)), names)
        labels = [escape(name, most=24) for _, name in columns]
        axes.set_xticks(range(len(columns)), labels, rotation=40, ha="right", parse_math=False)
        axes.set_title(_title(summary), loc="left", fontsize=10)
        axes.tick_params(length=0)
        drawn.colorbar(image, label="change since it was learned (above 0: lost)")
    return drawn


def _title(summary: MatrixSummary | None) -> str:
    lines = ["loss over held-out rows, nats a trained token; empty: not scored"]
    if summary is not None and summary.backward_transfer is not None:
        lines.append(f"* current; backward transfer {summary.backward_transfer:+.3f} (below 0: lost)")
    return "\n".join(lines)
