"""Commands about what versions have kept: promote, discard, compare; and the matrix of `dropforge versions`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

import guard
from daemon import held_versions, versions
from daemon.cli import completion
from daemon.cli.app import MODEL, JsonFlag, app, out, print_json
from daemon.cli.evals import eval_comparison, flipped_answers
from daemon.cli.flipped import flipped_rows, flips_table
from daemon.config import Settings
from daemon.errors import DropforgeError, NotFound, TryLater
from daemon.evaluation.matrix import Matrix, MatrixSummary, read_matrix, summarise
from daemon.evaluation.scores import AdapterScores, read_any_scores
from daemon.evaluation.statistics import Measured, MeasuredEval, judge, judge_evals
from daemon.evaluation.values import DatasetEvaluation
from daemon.job import JobState
from daemon.lineage import read_lineage
from daemon.memory.store import memory_dir_of
from daemon.store import is_made, open_for_reading
from daemon.text import escape
from daemon.versions import Version

WAIT_SECONDS = 0.05  # between two attempts; a promotion is followed by seconds of a trainer's start
MOST_COLUMNS = 12  # datasets that a matrix shows; `--json` has all

T = TypeVar("T")
HeldVersion = Annotated[str, typer.Argument(help="A held version's number.", autocompletion=completion.version)]
AnyVersion = Annotated[str, typer.Argument(help="A version's number.", autocompletion=completion.version)]


def change_version(settings: Settings, operation: str, change: Callable[[], T], *, after_job: bool) -> T:
    """Do something to the versions under the model lock, while no job runs. Raises TryLater, what `change` raises."""
    has_waited = False
    while True:
        running = running_job(settings)
        if not running:
            try:
                with guard.ModelLock(settings.model_dir, owner=operation):
                    return change()
            except guard.ModelLocked as error:
                running = error.cause
        if not after_job:
            raise TryLater(
                operation=operation, cause=running, hint="--after-job waits for its end; `dropforge cancel` ends it"
            )
        if not has_waited:
            out.print(f"waiting: {running}", markup=False)
            has_waited = True
        time.sleep(WAIT_SECONDS)


def running_job(settings: Settings) -> str:
    """Which job runs, or was running when its daemon died: its promotion may be half done."""
    if not is_made(settings.store_path):
        return ""
    store = open_for_reading(settings.store_path)
    try:
        running = store.jobs({JobState.RUNNING}, limit=1)
    finally:
        store.close()
    return f"job {running[0].id} is running" if running else ""


@app.command("promote", rich_help_panel=MODEL)
def promote_version(
    context: typer.Context,
    version: HeldVersion,
    *,
    force: Annotated[bool, typer.Option("--force", help="Also when it does not continue the current version.")] = False,
    after_job: Annotated[bool, typer.Option("--after-job", help="Wait until the running job has ended.")] = False,
) -> None:
    """Make a version current that the gate holds. The next dataset continues from it.

    Example: dropforge promote 4
    """
    settings: Settings = context.obj.settings
    versions.find_version(settings.model_dir, version)  # before any waiting
    done = change_version(
        settings,
        "promote",
        lambda: held_versions.promote_held(settings.model_dir, version, force=force),
        after_job=after_job,
    )
    out.print(f"version {done.name} is current now: {escape(str(done.record.get('dataset', '')))}", markup=False)


@app.command("discard", rich_help_panel=MODEL)
def discard_version(
    context: typer.Context,
    version: HeldVersion,
    after_job: Annotated[bool, typer.Option("--after-job", help="Wait until the running job has ended.")] = False,
) -> None:
    """Delete a version that the gate holds, and what is kept of its dataset. Its number is not used again.

    Example: dropforge discard 4
    """
    settings: Settings = context.obj.settings
    record = change_version(
        settings,
        "discard",
        lambda: held_versions.discard_held(settings.model_dir, settings.state_dir, version),
        after_job=after_job,
    )
    dataset = escape(str(record.get("dataset", "")))
    out.print(
        f"version {record['version']} is discarded; `dropforge submit --force` trains {dataset} again", markup=False
    )


@app.command("compare", rich_help_panel=MODEL)
def compare_versions(context: typer.Context, before: AnyVersion, after: AnyVersion, as_json: JsonFlag = False) -> None:
    """Compare two versions on all held-out rows that both have been scored on, with bounds and the rows that flipped.

    Example: dropforge compare 3 4
    """
    settings: Settings = context.obj.settings
    one, other = (versions.find_version(settings.model_dir, name) for name in (before, after))
    scores = [_scores_of(settings, version) for version in (one, other)]
    names = dict(_matrix(settings).datasets)
    same = scores[0].environment == scores[1].environment
    measured = [
        Measured(name=names.get(digest, digest[:12]), digest=digest, before=first, after=second)
        for digest in scores[0].datasets
        if same and digest in scores[1].datasets
        for first, second in [_both(scores[0].rows(digest), scores[1].rows(digest))]
        if first
    ]
    evals = [
        MeasuredEval(name=name, rows=len(first), before=first, after=second)
        for name in scores[0].evals
        if same and name in scores[1].evals
        for first, second in [_both(scores[0].answers(name), scores[1].answers(name))]
        if first
    ]
    if not measured and not evals:
        raise DropforgeError(
            operation="compare",
            subject=f"versions {one.name} and {other.name}",
            cause="no held-out row and no eval's row was scored under both, on the same device and libraries",
            hint="`dropforge versions --matrix` shows what was scored",
        )
    judged = judge(measured, settings.gate, evals=len(evals))
    judged_evals = judge_evals(evals, settings.gate, datasets=len(measured))
    flips = {found.digest: _flips(found) for found in measured}
    rows = {found.digest: flipped_rows(settings, found) for found in measured}
    flipped = {found.name: flipped_answers(found) for found in evals}
    if as_json:
        print_json(
            {
                "before": one.name,
                "after": other.name,
                "confidence": settings.gate.confidence,
                "datasets": [
                    {**asdict(found), "flips": flips[found.digest], "flipped_rows": rows[found.digest]}
                    for found in judged
                ],
                "evals": [{**asdict(found), "flips": flipped[found.name]} for found in judged_evals],
            }
        )
        return
    if judged:
        out.print(
            _comparison(judged, flips), *(flips_table(one.name, rows[one.digest]) for one in judged if rows[one.digest])
        )
    if judged_evals:
        out.print(*([""] if judged else []), eval_comparison(judged_evals, flipped, before=one.name, after=other.name))


def show_matrix(settings: Settings, *, as_json: bool, output: Path | None = None) -> None:
    """Print what each version scored on each dataset, or draw it into a file. Raises DropforgeError."""
    matrix = _matrix(settings)
    current = versions.current_version(settings.model_dir)
    summary = summarise(matrix, current.name if current else None)
    if as_json:
        print_json({**asdict(matrix), "summary": None if summary is None else asdict(summary)})
    elif output is not None and matrix.datasets:
        from daemon.cli.matrix_file import write_matrix

        out.print(
            f"wrote {escape(str(write_matrix(output, matrix, summary)), most=2000)}", markup=False, soft_wrap=True
        )
    elif output is not None:
        raise NotFound(
            operation="draw the matrix",
            cause="there is no version that has learned a dataset yet",
            hint="`dropforge status` says what the daemon does",
        )
    elif matrix.rows:
        out.print(_matrix_table(matrix, summary))
    else:
        out.print("no versions yet: nothing has been trained to its end")


def _matrix(settings: Settings) -> Matrix:
    found = versions.list_versions(settings.model_dir)
    lineage = read_lineage(settings.model_dir)
    gone = lineage.discarded()
    records = [{**version.record, "version": version.name} for version in found if version.name not in gone]
    return read_matrix(records, lineage.held())


def _scores_of(settings: Settings, version: Version) -> AdapterScores:
    adapter = str(version.record.get("adapter_digest") or "")
    return read_any_scores(memory_dir_of(settings.state_dir), adapter)


def _both(before: Mapping[str, T], after: Mapping[str, T]) -> tuple[dict[str, T], dict[str, T]]:
    keys = [key for key in before if key in after]
    return {key: before[key] for key in keys}, {key: after[key] for key in keys}


def _flips(one: Measured) -> dict[str, list[str]]:
    """The rows that are exact under one version alone, by the digests of their tokens."""
    return {
        "lost": [key for key in one.before if one.before[key].exact and not one.after[key].exact],
        "gained": [key for key in one.before if one.after[key].exact and not one.before[key].exact],
    }


def _comparison(judged: tuple[DatasetEvaluation, ...], flips: Mapping[str, Mapping[str, list[str]]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in ("dataset", "rows", "loss", "change, low to high", "exact", "lost", "gained", ""):
        table.add_column(name, no_wrap=name != "dataset")
    for one in judged:
        lost, gained = (len(flips[one.digest][name]) for name in ("lost", "gained"))
        table.add_row(
            Text(escape(one.name, most=40)),
            str(one.rows),
            f"{one.loss_before:.3f} -> {one.loss_after:.3f}",
            f"{one.loss.measured:+.3f}, {one.loss.low:+.3f} to {one.loss.high:+.3f}",
            f"{one.exact_before:.0%} -> {one.exact_after:.0%}",
            str(lost),
            str(gained),
            Text(one.verdict, style="yellow" if one.verdict == "regressed" else ""),
        )
    return table


def _matrix_table(matrix: Matrix, summary: MatrixSummary | None) -> RenderableType:
    shown = matrix.datasets[-MOST_COLUMNS:]
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("version", no_wrap=True)
    for _, name in shown:
        table.add_column(Text(escape(name, most=16)), justify="right", no_wrap=True)
    evals = sorted({name for row in matrix.rows for name in row.evals})[:MOST_COLUMNS]
    for name in evals:
        table.add_column(Text(f"eval {escape(name, most=16)}"), justify="right", no_wrap=True)
    table.add_column("")
    worst = summary.worst[0] if summary is not None and summary.worst and summary.worst[1] > 0 else None
    for row in matrix.rows:
        is_current = summary is not None and row.version == summary.version
        cells: list[Text] = []
        for digest, _ in shown:
            cell = row.cells.get(digest)
            marked = is_current and digest == worst
            cells.append(Text("" if cell is None else f"{cell.loss:.3f}{' !' if marked else ''}"))
            if marked:
                cells[-1].stylize("yellow")
        cells += [Text(f"{row.evals[name]:.0%}" if name in row.evals else "") for name in evals]
        name = f"{row.version} *" if is_current else row.version
        table.add_row(Text(name, style="bold green" if is_current else ""), *cells, "held" if row.held else "")
    notes = ["nats a trained token over held-out rows; an empty cell was not scored"]
    if evals:
        notes.append("evals: share of the answered rows that pass")
    if len(matrix.datasets) > len(shown):
        notes.append(f"the latest {len(shown)} of {len(matrix.datasets)} datasets; --json has all")
    return Group(table, "", *(Text(note, style="dim") for note in (*notes, *_summary_lines(matrix, summary))))


def _summary_lines(matrix: Matrix, summary: MatrixSummary | None) -> list[str]:
    """The foot of the matrix."""
    if summary is None:
        return []
    lines = [f"* current: {summary.measured} of {summary.learned} datasets that it has learned were scored"]
    if summary.average_loss is not None:
        lines.append(f"average loss {summary.average_loss:.3f}")
    if summary.backward_transfer is not None and summary.worst is not None:
        names: dict[str, Any] = dict(matrix.datasets)
        lines.append(
            f"backward transfer {summary.backward_transfer:+.3f} over {summary.transferred} earlier datasets (below 0:"
            f" lost); the worst is {escape(names[summary.worst[0]])}, {summary.worst[1]:+.3f}"
        )
    return lines
