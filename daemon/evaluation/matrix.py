"""The performance matrix: what each version scored on each dataset's held-out rows, and what was lost or won on the way.

R[i][j] is the loss, nats a trained token, of version i on dataset j. Backward transfer is the mean, over the datasets that
the last version did not itself learn, of the loss when a dataset was learned minus the loss now: below zero, something was
lost. What was not scored is empty, never carried over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One version's score on one dataset."""

    loss: float
    exact: float | None
    rows: int


@dataclass(frozen=True, kw_only=True)
class MatrixRow:
    """One version."""

    version: str
    parent: str | None
    dataset: str  # digest of the one that it learned
    verdict: str
    held: bool
    cells: Mapping[str, Cell]  # by dataset
    evals: Mapping[str, float] = field(default_factory=dict)  # by name: share of the answered rows that pass


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """Versions, oldest first, by datasets, in the order in which they were learned."""

    datasets: tuple[tuple[str, str], ...]  # digest and name
    rows: tuple[MatrixRow, ...]

    def line(self, version: str | None) -> list[MatrixRow]:
        """A version and what it goes back to, oldest first, as far as it is known."""
        by_name = {row.version: row for row in self.rows}
        line: list[MatrixRow] = []
        while version is not None and (row := by_name.pop(version, None)) is not None:
            line.append(row)
            version = row.parent
        return line[::-1]


@dataclass(frozen=True, kw_only=True)
class KnownLoss:
    """What a version scored on a dataset that it has learned."""

    digest: str
    loss: float
    change: float | None  # since it was learned: above zero, something was lost


@dataclass(frozen=True, kw_only=True)
class MatrixSummary:
    """What became of all that a version has learned."""

    version: str
    verdict: str
    learned: int  # datasets
    measured: int  # of them, those that this version was scored on
    average_loss: float | None  # over those
    backward_transfer: float | None  # None: no earlier dataset was scored both times
    transferred: int  # earlier datasets that it is the mean over
    losses: tuple[KnownLoss, ...]  # of the datasets that were measured
    evals: Mapping[str, float]  # by name: share of rows that pass
    worst: tuple[str, float] | None  # digest of the earlier dataset that lost most, and how much: above zero is a loss


def read_matrix(records: Sequence[Mapping[str, Any]], held: Sequence[str] = ()) -> Matrix:
    """Return the matrix of versions' records, oldest first; `held` are versions that are not part of any line yet."""
    names: dict[str, str] = {}
    rows = []
    for record in records:
        own = str(record.get("dataset_digest") or "")
        if own:
            names.setdefault(own, str(record.get("dataset") or "?"))
        evaluation = record.get("evaluation")
        found = evaluation if isinstance(evaluation, Mapping) else {}
        rows.append(
            MatrixRow(
                version=str(record.get("version") or "?"),
                parent=record.get("parent"),
                dataset=own,
                verdict=str(found.get("verdict") or ""),
                held=record.get("version") in held,
                cells=_cells(own, record, found),
                evals=_evals(found),
            )
        )
    for record in records:
        for entry in _entries(record):
            names.setdefault(str(entry.get("digest")), str(entry.get("name") or "?"))
    return Matrix(datasets=tuple(names.items()), rows=tuple(rows))


def summarise(matrix: Matrix, version: str | None) -> MatrixSummary | None:
    """What a version has kept of its line; None where nothing is known of it."""
    line = matrix.line(version)
    if not line:
        return None
    last, learned = line[-1], {row.dataset: row for row in line if row.dataset}
    measured = {digest: last.cells[digest].loss for digest in learned if digest in last.cells}
    lost = {
        digest: loss - learned[digest].cells[digest].loss
        for digest, loss in measured.items()
        if digest != last.dataset and digest in learned[digest].cells
    }
    worst = max(lost.items(), key=lambda one: one[1], default=None)
    return MatrixSummary(
        version=last.version,
        verdict=last.verdict,
        learned=len(learned),
        measured=len(measured),
        average_loss=sum(measured.values()) / len(measured) if measured else None,
        backward_transfer=-sum(lost.values()) / len(lost) if lost else None,
        transferred=len(lost),
        losses=tuple(KnownLoss(digest=digest, loss=loss, change=lost.get(digest)) for digest, loss in measured.items()),
        evals=last.evals,
        worst=worst,
    )


def _cells(own: str, record: Mapping[str, Any], evaluation: Mapping[str, Any]) -> dict[str, Cell]:
    cells = {
        str(entry["digest"]): Cell(loss=entry["loss_after"], exact=entry.get("exact_after"), rows=int(entry["rows"]))
        for entry in _entries(record)
        if isinstance(entry.get("loss_after"), int | float) and "digest" in entry and "rows" in entry
    }
    scored, after = evaluation.get("own"), record.get("held_out_after")
    if own and isinstance(scored, Mapping) and isinstance(scored.get("loss"), int | float):
        cells[own] = Cell(loss=scored["loss"], exact=scored.get("exact"), rows=int(scored.get("rows") or 0))
    elif own and isinstance(after, int | float):  # of before rows were scored one by one
        cells[own] = Cell(loss=after, exact=None, rows=0)
    return cells


def _entries(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    evaluation = record.get("evaluation")
    entries = evaluation.get("datasets") if isinstance(evaluation, Mapping) else None
    return [entry for entry in entries or () if isinstance(entry, Mapping)]


def _evals(evaluation: Mapping[str, Any]) -> dict[str, float]:
    entries = evaluation.get("evals")
    return {
        str(entry.get("name")): entry["passed"]
        for entry in entries or ()
        if isinstance(entry, Mapping) and isinstance(entry.get("passed"), int | float)
    }
