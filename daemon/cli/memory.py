"""Commands about what is kept of trained datasets: memory, memory forget."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from daemon import control, versions
from daemon.cli.account import require_own_account
from daemon.cli.app import MODEL, JsonFlag, app, out, print_json
from daemon.config import Settings
from daemon.memory.forgetting import find_memories
from daemon.memory.store import (
    HELD_OUT_NAME,
    RETIRED_INDEX,
    ROWS_NAME,
    DatasetMemory,
    Discarded,
    list_memories,
    memory_dir_of,
)
from daemon.store import JobStore
from daemon.text import escape, format_bytes

memory_app = typer.Typer(help="Show what is kept of trained datasets, to rehearse and to measure.")
app.add_typer(memory_app, name="memory", rich_help_panel=MODEL)


@memory_app.callback(invoke_without_command=True)
def show_memory(context: typer.Context, as_json: JsonFlag = False) -> None:
    """Show what is kept of trained datasets: rows to rehearse beside later ones, and rows held out to measure."""
    if context.invoked_subcommand is not None:
        return
    settings: Settings = context.obj.settings
    memories, problems = list_memories(memory_dir_of(settings.state_dir))
    line, _ = versions.line_of(versions.current_version(settings.model_dir))
    current = {str(record.get("dataset_digest")) for record in line}
    facts = [_facts(settings, memory, is_current=memory.meta.digest in current) for memory in memories]
    if as_json:
        print_json({"datasets": facts, "problems": problems})
        return
    out.print(_table(facts) if facts else "nothing is kept yet: no dataset has been trained to its end")
    for problem in problems:
        out.print(Text(problem, style="yellow"))


@memory_app.command("forget")
def forget_dataset(
    context: typer.Context,
    dataset: Annotated[str, typer.Argument(help="The dataset's file name, or the beginning of its digest.")],
) -> None:
    """Delete the kept and held-out rows of a dataset. Open jobs that rehearse it start over; weights do not change.

    Example: dropforge memory forget monday.jsonl
    """
    settings: Settings = context.obj.settings
    require_own_account(settings)
    found = find_memories(settings.state_dir, dataset)
    store = JobStore(settings.store_path) if settings.store_path.exists() else None
    try:
        for memory in found:
            for sentence in control.forget(settings, store, memory):
                out.print(sentence, markup=False)
    finally:
        if store is not None:
            store.close()


def _facts(settings: Settings, memory: DatasetMemory, *, is_current: bool) -> dict[str, Any]:
    meta = memory.meta
    return {
        "name": meta.name,
        "digest": meta.digest,
        "job": meta.job,
        "created_at": meta.created_at,
        "trained_rows": meta.trained_rows,
        "trained_tokens": meta.trained_tokens,
        "kept_rows": meta.mark(ROWS_NAME).rows,
        "kept_bytes": meta.mark(ROWS_NAME).size_bytes,
        "held_out_rows": meta.mark(HELD_OUT_NAME).rows,
        "replaces_rows": meta.mark(RETIRED_INDEX).rows,
        "discarded": meta.discarded.value,
        "discarded_at": meta.discarded_at,
        "versions": versions.learned_by(settings.model_dir, meta.digest),
        "rehearsed": is_current and memory.is_kept,
        "path": str(memory.path),
    }


_STATES: Mapping[str, str] = {
    Discarded.FORGOTTEN: "forgotten",
    Discarded.DELETED: "not kept: its file was deleted",
}


def _table(facts: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("dataset", "digest", "trained", "kept", "held out", "size", "learned by", ""):
        table.add_column(
            name,
            overflow="fold",
            no_wrap=name in ("digest", "size", "learned by"),
            justify="right" if name in ("trained", "kept", "held out", "size") else "left",
        )
    for found in facts:
        learned = found["versions"]
        state = _STATES.get(found["discarded"], "rehearsed" if found["rehearsed"] else "not in the current line")
        table.add_row(
            Text(escape(found["name"], most=60)),
            found["digest"][:12],
            f"{found['trained_rows']:,}",
            f"{found['kept_rows']:,}",
            f"{found['held_out_rows']:,}",
            format_bytes(found["kept_bytes"]),
            f"{learned[0]}-{learned[-1]}" if len(learned) > 1 else "".join(learned) or "no version",
            state,
        )
    return table
