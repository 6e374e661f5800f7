"""`python -m daemon.trainer.token_stats FILE FORMAT RECIPE_JSON`: how long a dataset's rows are, in tokens, as JSON.

For `dropforge check`: the same encoding as a run's, without a model and without torch's start-up being paid twice.
"""

from __future__ import annotations

import json
import sys
from bisect import bisect_left
from pathlib import Path
from typing import Any

from daemon.dataset.rows import iter_rows
from daemon.recipe import Recipe
from daemon.trainer.base_model import load_tokenizer, resolve_base
from daemon.trainer.encode import Encoder, RefusedRow, chunks, trained_tokens
from daemon.trainer.errors import RunFailure

# Upper bounds of the histogram's bins, in tokens; a row longer than the last is counted in one more bin.
BINS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


def measure(path: Path, format_: str, recipe: Recipe) -> dict[str, Any]:
    """Tokens and trained tokens over all rows, before truncation, and a histogram of lengths. Raises RunFailure."""
    encoder = Encoder(load_tokenizer(resolve_base(recipe.model)), recipe.data)
    counts = [0] * (len(BINS) + 1)
    tokens = trained = cut = 0
    for chunk in chunks(iter_rows(path, format_, recipe.data)):
        for row in encoder.encode(chunk):
            if isinstance(row, RefusedRow):
                raise row.failure()
            lengths = [len(sample.ids) for sample in row.samples]
            tokens += sum(lengths)
            trained += sum(trained_tokens(sample.learned) for sample in row.samples)
            cut += max(lengths) > recipe.data.max_length
            for length in lengths:
                counts[bisect_left(BINS, length)] += 1
    return {
        "tokens": tokens,
        "trained_tokens": trained,
        "rows_over_max_length": cut,
        "lengths": [{"up_to": bound, "rows": rows} for bound, rows in zip((*BINS, None), counts, strict=True) if rows],
    }


if __name__ == "__main__":
    try:
        print(json.dumps(measure(Path(sys.argv[1]), sys.argv[2], Recipe.model_validate_json(sys.argv[3]))))
    except RunFailure as failure:
        print(json.dumps({"error": failure.message, "hint": failure.hint}))
        sys.exit(1)
