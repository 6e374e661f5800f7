"""Held-out rows that are exact under one version alone, as `dropforge compare` shows them: what they ask and what is right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from daemon.cli.evals import MOST_FLIPS, SHOWN_CHARACTERS
from daemon.config import Settings
from daemon.evaluation.statistics import Measured
from daemon.memory.store import MemoryDamaged, dataset_dir, decode_row, memory_dir_of, read_memory
from daemon.text import escape

if TYPE_CHECKING:
    from daemon.dataset.rows import RowContent


def flipped_rows(settings: Settings, one: Measured) -> list[dict[str, Any]]:
    """A dataset's rows that flipped; those that were lost come first. Prompt and answer are None where the row is not kept."""
    flipped = [key for key in one.before if one.before[key].exact is not one.after[key].exact]
    kept = _held_out(settings, one.digest) if flipped else {}
    found = []
    for key in flipped:
        row = kept.get(one.after[key].row or one.before[key].row)
        prompt, answer = asked(decode_row(row)) if row is not None else (None, None)
        found.append({"row": key, "lost": one.before[key].exact, "prompt": prompt, "answer": answer})
    return sorted(found, key=lambda flip: not flip["lost"])


def asked(row: RowContent) -> tuple[str, str]:
    """What a row asks last and the answer that it has; of running text only the latter."""
    if row.messages is not None:
        answers = [at for at, message in enumerate(row.messages) if message.get("role") == "assistant"]
        last = answers[-1] if answers else len(row.messages) - 1
        return _said(row.messages[last - 1 : last]), _said(row.messages[last : last + 1])
    if row.completion is not None:
        return _said(row.prompt), _said(row.completion)
    return "", row.text or ""


def flips_table(name: str, flips: Sequence[Mapping[str, Any]]) -> RenderableType:
    """The rows of one dataset that are known by their text, at most 20 of them."""
    known = [flip for flip in flips if flip["answer"] is not None]
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in ("", "prompt", "right answer"):
        table.add_column(column, overflow="fold")
    for flip in known[:MOST_FLIPS]:
        texts = (Text(escape(flip[part], most=SHOWN_CHARACTERS)) for part in ("prompt", "answer"))
        table.add_row("lost" if flip["lost"] else "gained", *texts)
    notes = []
    if len(known) > MOST_FLIPS:
        notes.append(f"{MOST_FLIPS} of {len(known)} rows that flipped; --json has all")
    if len(known) < len(flips):
        notes.append(
            f"{len(flips) - len(known)} of {len(flips)} rows that flipped are not kept any more, or were scored by an earlier release"
        )
    title = Text(f"rows of {escape(name, most=60)} that only one version has exactly right", style="bold")
    return Group("", title, *([table] if known else []), *(Text(note, style="dim") for note in notes))


def _held_out(settings: Settings, dataset: str) -> dict[str, bytes]:
    """A dataset's held-out rows as lines, by their digests, as far as they are kept and can be read."""
    try:
        memory = read_memory(dataset_dir(memory_dir_of(settings.state_dir), dataset))
        return {row.digest: row.line for row in memory.held_out()} if memory is not None and memory.is_kept else {}
    except (MemoryDamaged, ValueError, OSError):
        return {}


def _said(content: Any) -> str:
    """The text of a prompt or answer, which may be turns: the last one's, or the calls that it makes."""
    if not isinstance(content, list):
        return str(content or "")
    last = content[-1] if content else {}
    return str(last.get("content") or last.get("tool_calls") or "")
