"""`python -m daemon.trainer.check FILE FORMAT RECIPE_JSON [STATE_DIR [force]]`: a run's verdict on a dataset, as JSON.

For `dropforge check`: the rows become samples as in a run, by the same functions and in as many processes, and what a run
would refuse or warn of is said. No weights are loaded.
"""

from __future__ import annotations

import json
import sys
from bisect import bisect_left
from pathlib import Path
from typing import Any

from daemon.dataset.rows import Format, RowReader
from daemon.memory.store import held_out_registry, list_memories, memory_dir_of
from daemon.recipe import Recipe
from daemon.trainer.base_model import load_tokenizer, resolve_base
from daemon.trainer.capacity import capacity_of, refuse_what_does_not_fit
from daemon.trainer.collate import plan
from daemon.trainer.errors import RunFailure
from daemon.trainer.summary import data_warnings
from daemon.trainer.tokenise import require_trainable, tokenise, worker_processes

# Upper bounds of the histogram's bins, in tokens; a sample longer than the last is counted in one more bin.
BINS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
BYTES_A_ROW = 256  # guessed from the file's size: it decides how many processes help, and nothing else
LISTED_LINES = 1000


def verdict(
    path: Path, format_: str, recipe: Recipe, *, state_dir: Path | None = None, force: bool = False
) -> dict[str, Any]:
    """Say what a run would make of a dataset, and refuse as it would; every line at fault is listed, up to LISTED_LINES.

    `state_dir`: of the root, whose earlier datasets' held-out rows are not trained.

    Returns `tokens` and `trained_tokens` (before truncation, and after it), `samples`, `lengths` (a histogram of samples
    before truncation), `steps` and `run_tokens` (of a run over these rows, what it rehearses aside), `rows_over_max_length`, `truncated_lines`, `unlearned_lines`, `refused` ({line, reason, hint}),
    `warnings`, and `failure` ({message, hint}, or None). Raises RunFailure where the base model cannot be read, which says
    nothing about the rows.
    """
    base = resolve_base(recipe.model)
    tokenizer, capacity = load_tokenizer(base), capacity_of(base)
    reader = RowReader(path, Format(format_), recipe.data)
    processes = worker_processes(path.stat().st_size // BYTES_A_ROW)
    held_out, problems = held_out_registry(list_memories(memory_dir_of(state_dir))[0]) if state_dir else ({}, [])
    try:
        examples = tokenise(
            reader.lines(),
            tokenizer,
            recipe.data,
            read=reader.row,
            processes=processes,
            held_out_before=held_out,
            force=force,
            keep_refused=True,
        )
    except RunFailure as failure:  # the tokenizer lacks what these rows need
        return {"failure": {"message": failure.message, "hint": failure.hint}}
    failed: RunFailure | None = None
    try:
        require_trainable(examples, recipe.data)
        refuse_what_does_not_fit(examples, tokenizer, capacity)
    except RunFailure as failure:
        failed = failure
    counts = [0] * (len(BINS) + 1)
    for size in examples.whole_sizes:
        counts[bisect_left(BINS, size)] += 1
    planned = plan(examples, recipe.training)
    return {
        "tokens": sum(examples.whole_sizes),
        "trained_tokens": sum(example.trained_tokens for example in (*examples.train, *examples.held_out)),
        "samples": len(examples.whole_sizes),
        "steps": planned.total_steps,
        "run_tokens": planned.tokens,
        "rows_over_max_length": examples.truncated_rows,
        "lengths": [{"up_to": bound, "rows": rows} for bound, rows in zip((*BINS, None), counts, strict=True) if rows],
        "truncated_lines": examples.truncated_lines[:LISTED_LINES],
        "unlearned_lines": examples.dropped_lines[:LISTED_LINES],
        "refused": [
            {"line": row.line, "reason": row.reason, "hint": row.hint} for row in examples.refused[:LISTED_LINES]
        ],
        "refused_rows": len(examples.refused),
        "warnings": (*data_warnings(examples, planned, capacity), *problems) if examples.train else (),
        "failure": {"message": failed.message, "hint": failed.hint} if failed else None,
    }


if __name__ == "__main__":
    try:
        recipe = Recipe.model_validate_json(sys.argv[3])
        state_dir = Path(sys.argv[4]) if len(sys.argv) > 4 else None
        force = sys.argv[5:6] == ["force"]
        print(json.dumps(verdict(Path(sys.argv[1]), sys.argv[2], recipe, state_dir=state_dir, force=force)))
    except RunFailure as failure:
        print(json.dumps({"error": failure.message, "hint": failure.hint}))
        sys.exit(1)
