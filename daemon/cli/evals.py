"""`dropforge evals`: the administrator's evals, whether they can be used, and how the current version did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from daemon import versions
from daemon.cli.app import MODEL, JsonFlag, app, out, print_json
from daemon.config import Settings
from daemon.evaluation.evals import read_evals, why_unused
from daemon.evaluation.matrix import read_matrix
from daemon.evaluation.statistics import MeasuredEval, describe_eval
from daemon.evaluation.values import EvalEvaluation, GateVerdict
from daemon.text import escape

FAULTY = 1  # exit code: a file cannot be used
MOST_FLIPS = 20  # rows of an eval that are shown; `--json` has all
SHOWN_CHARACTERS = 120  # of a prompt or an answer


@app.command("evals", rich_help_panel=MODEL)
def show_evals(context: typer.Context, as_json: JsonFlag = False) -> None:
    """Check what lies in evals/: questions that every version answers, and the gate judges by. 1 when a file is not used.

    Example: dropforge evals
    """
    settings: Settings = context.obj.settings
    found = read_evals(settings.evals_dir)
    current = versions.current_version(settings.model_dir)
    rows = read_matrix([{**current.record, "version": current.name}]).rows if current else ()
    passed = rows[0].evals if rows else {}
    facts: list[dict[str, Any]] = [
        {
            "name": one.name,
            "rows": len(one.rows),
            "checks": dict(Counter(str(row.check) for row in one.rows)),
            "passed": passed.get(one.name),
        }
        for one in found.usable
    ]
    unused = why_unused(settings.evaluation, settings.gate) if facts else ""
    if as_json:
        print_json({"folder": str(found.folder), "evals": facts, "problems": found.problems, "unused": unused})
    else:
        if facts:
            out.print(_table(facts, current.name if current else None))
        elif not found.problems:
            out.print(f"no evals: {escape(str(found.folder), most=1000)} has no .jsonl file")
        for line in (*found.problems, *([f"none is used: {unused}"] if unused else [])):
            out.print(Text(line, style="yellow"))
    if found.problems:
        raise typer.Exit(FAULTY)


def _table(facts: list[dict[str, Any]], current: str | None) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("eval")
    table.add_column("rows", justify="right")
    table.add_column("checks")
    table.add_column(f"version {current} passes" if current else "", justify="right")
    for one in facts:
        checks = ", ".join(f"{count} {name}" for name, count in one["checks"].items())
        passed = "" if one["passed"] is None else f"{one['passed']:.0%}"
        table.add_row(Text(escape(one["name"], most=60)), str(one["rows"]), checks, passed)
    return table


def flipped_answers(one: MeasuredEval) -> list[dict[str, Any]]:
    """The rows that pass under one version alone, with both answers; those that were lost come first."""
    flips = [
        {
            "line": after.line,
            "prompt": after.prompt,
            "before": before.answer,
            "after": after.answer,
            "lost": before.passed,
        }
        for before, after in ((one.before[key], one.after[key]) for key in one.before)
        if before.passed is not after.passed
    ]
    return sorted(flips, key=lambda flip: (not flip["lost"], flip["line"]))


def eval_comparison(
    judged: Sequence[EvalEvaluation], flipped: Mapping[str, list[dict[str, Any]]], *, before: str, after: str
) -> RenderableType:
    """Evals under two versions: how many rows pass, and the answers that made a difference side by side."""
    parts: list[RenderableType] = []
    for one in judged:
        style = "yellow" if one.verdict is GateVerdict.REGRESSED else ""
        parts.append(Text(f"eval {escape(one.name, most=60)}: {one.verdict}, {describe_eval(one)}", style=style))
        if not (flips := flipped[one.name]):
            continue
        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
        for name in ("line", "", "prompt", f"version {before}", f"version {after}"):
            table.add_column(name, overflow="fold")
        for flip in flips[:MOST_FLIPS]:
            texts = (escape(flip[name], most=SHOWN_CHARACTERS) for name in ("prompt", "before", "after"))
            table.add_row(str(flip["line"]), "lost" if flip["lost"] else "gained", *map(Text, texts))
        parts.append(table)
        if len(flips) > MOST_FLIPS:
            parts.append(Text(f"{MOST_FLIPS} of {len(flips)} rows that flipped; --json has all", style="dim"))
    return Group(*parts)
