"""What each adapter scored on each row, `state/memory/scores/ADAPTER.json`: measured once, and compared many times.

A row is known by its tokens and which of them are trained, so that another template, tokenizer or length makes it another
row, and nothing is taken for measured that was not. Scores of another environment (precision, kernel, libraries, device)
are not used. A file that is missing or damaged costs a scoring anew, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from daemon.evaluation.statistics import Rows, mean_loss
from daemon.evaluation.values import EvalAnswer, RowScore
from daemon.job import from_json, to_json
from guard.atomic import make_folder_durable, write_atomic

SCORES_NAME = "scores"
NAME_DIGITS = 32  # of an adapter's digest


@dataclass(frozen=True, kw_only=True)
class AdapterScores:
    """One adapter's scores."""

    environment: str
    datasets: Mapping[str, Mapping[str, RowScore]] = field(default_factory=dict)  # by dataset, then by row
    evals: Mapping[str, Mapping[str, EvalAnswer]] = field(default_factory=dict)  # by eval, then by row

    def rows(self, dataset: str) -> Rows:
        """The rows of a dataset that it scored."""
        return self.datasets.get(dataset, {})

    def answers(self, name: str) -> Mapping[str, EvalAnswer]:
        """The rows of an eval that it answered."""
        return self.evals.get(name, {})


def scores_path(memory_dir: Path, adapter: str) -> Path:
    """Return where an adapter's scores lie."""
    return memory_dir / SCORES_NAME / f"{adapter[:NAME_DIGITS]}.json"


def read_scores(memory_dir: Path, adapter: str, environment: str) -> AdapterScores:
    """Return what an adapter scored in an environment; empty where nothing of that can be read."""
    found = read_any_scores(memory_dir, adapter)
    return found if found.environment == environment else AdapterScores(environment=environment)


def read_any_scores(memory_dir: Path, adapter: str) -> AdapterScores:
    """Return what an adapter scored, in whichever environment; empty where nothing of that can be read."""
    try:
        return from_json(scores_path(memory_dir, adapter).read_bytes(), AdapterScores)
    except (OSError, ValueError):
        return AdapterScores(environment="")


def write_scores(memory_dir: Path, adapter: str, scores: AdapterScores) -> None:
    """Write what an adapter scored, with what it had scored before in the same environment. Raises OSError."""
    before = read_scores(memory_dir, adapter, scores.environment)
    both = AdapterScores(
        environment=scores.environment,
        datasets={
            digest: {**before.rows(digest), **scores.rows(digest)} for digest in (*before.datasets, *scores.datasets)
        },
        # Answers to what an eval no longer asks are not kept: an eval may be changed as often as its author likes.
        evals={**before.evals, **scores.evals},
    )
    path = scores_path(memory_dir, adapter)
    make_folder_durable(path.parent, mode=0o700)
    write_atomic(path, to_json(both), mode=0o600)


def sweep_scores(memory_dir: Path, adapters: Iterable[str]) -> None:
    """Delete the scores of adapters that are no version's. Raises OSError."""
    known = {scores_path(memory_dir, adapter).name for adapter in adapters}
    folder = memory_dir / SCORES_NAME
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name not in known:
            path.unlink(missing_ok=True)


def best_of_line(
    line: Sequence[tuple[str, AdapterScores]], dataset: str, rows: Iterable[str]
) -> tuple[str, Rows] | None:
    """Return the version, and its scores, with the lowest loss over `rows` among those that scored all of them."""
    keys = list(rows)
    found = []
    for version, scores in line:
        of = scores.rows(dataset)
        if keys and all(key in of for key in keys):
            found.append((version, {key: of[key] for key in keys}))
    return min(found, key=lambda one: mean_loss(list(one[1].values())), default=None)
