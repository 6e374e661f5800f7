"""The matrix of versions as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from daemon.cli.matrix_file import changes, figure, write_matrix
from daemon.errors import ConfigError
from daemon.evaluation.matrix import read_matrix, summarise

A, B = "a" * 64, "b" * 64


def record(version: str, parent: str | None, digest: str, name: str, own: float, **others: float) -> dict[str, Any]:
    scored = [{"digest": A, "name": "a$x$.jsonl", "loss_after": loss, "rows": 40} for loss in others.values()]
    return {
        "version": version,
        "parent": parent,
        "dataset": name,
        "dataset_digest": digest,
        "evaluation": {"verdict": "kept", "own": {"loss": own, "exact": 0.5, "rows": 40}, "datasets": scored},
    }


MATRIX = read_matrix([record("0001", None, A, "a$x$.jsonl", 1.0), record("0002", "0001", B, "b.jsonl", 2.0, a=1.5)])


def test_a_cell_is_coloured_by_what_was_lost_since_its_dataset_was_learned() -> None:
    assert changes(MATRIX) == {("0001", A): 0.0, ("0002", A): 0.5, ("0002", B): 0.0}


def test_the_picture_has_the_numbers_and_leaves_empty_what_was_not_scored() -> None:
    pytest.importorskip("matplotlib")
    axes = figure(MATRIX, summarise(MATRIX, "0002")).axes[0]
    assert [text.get_text() for text in axes.texts] == ["1.000", "1.500", "2.000"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0001", "0002 *"]
    names = axes.get_xticklabels()
    assert [name.get_text() for name in names] == ["a$x$.jsonl", "b.jsonl"]
    assert not any(name.get_parse_math() for name in names)


@pytest.mark.parametrize(("kind", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_the_file_is_of_the_kind_that_its_name_says(tmp_path: Path, kind: str, magic: bytes) -> None:
    pytest.importorskip("matplotlib")
    path = write_matrix(tmp_path / f"matrix.{kind}", MATRIX, None)
    assert path.read_bytes().startswith(magic)


def test_another_kind_of_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ends in none of") as stop:
        write_matrix(tmp_path / "matrix.txt", MATRIX, None)
    assert "versions --matrix -o" in stop.value.hint
