"""Held-out rows that flipped between two versions, told by what they ask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from daemon.cli.flipped import asked, flipped_rows, flips_table
from daemon.config import Settings
from daemon.dataset.rows import Row as DatasetRow
from daemon.dataset.rows import RowContent
from daemon.evaluation.statistics import Measured
from daemon.evaluation.values import RowScore
from daemon.memory.store import DatasetMeta, dataset_dir, encode_row, memory_dir_of, write_memory

DIGEST = "d" * 64


def scored(exact: bool, row: str) -> RowScore:
    return RowScore(loss=1.0, tokens=4, exact=exact, row=row)


def test_rows_that_flipped_are_told_by_their_text_where_they_are_kept(tmp_path: Path) -> None:
    """Also the number of those that are not; and what was lost comes first."""
    settings = Settings(root=tmp_path)
    held_out = [
        DatasetRow(line=n, content_digest=f"{n:032x}", kind="prompt_completion", prompt=f"Q{n}?", completion=f"A{n}")
        for n in range(3)
    ]
    meta = DatasetMeta(
        name="a.jsonl", digest=DIGEST, job="j", trained_rows=2, trained_tokens=9, train_on="auto", created_at="2026"
    )
    folder = dataset_dir(memory_dir_of(settings.state_dir), DIGEST)
    write_memory(folder, meta, held_out=[(row.content_digest, encode_row(row)) for row in held_out])
    rows = {f"k{n}": f"{n:032x}" for n in range(3)} | {"older": ""}
    before = {key: scored(key in ("k1", "older"), row) for key, row in rows.items()}
    after = {key: scored(key == "k0", row) for key, row in rows.items()}
    found = flipped_rows(settings, Measured(name="a.jsonl", digest=DIGEST, before=before, after=after))
    assert found == [
        {"row": "k1", "lost": True, "prompt": "Q1?", "answer": "A1"},
        {"row": "older", "lost": True, "prompt": None, "answer": None},
        {"row": "k0", "lost": False, "prompt": "Q0?", "answer": "A0"},
    ]
    console = Console(width=100, record=True, file=(tmp_path / "out").open("w"))
    console.print(flips_table("a.jsonl", found))
    told = console.export_text()
    assert "lost" in told
    assert "Q1?" in told
    assert "1 of 3 rows that flipped are not kept any more" in told
    (folder / "held_out.jsonl").write_bytes(b"damaged")
    lost = flipped_rows(settings, Measured(name="a.jsonl", digest=DIGEST, before=before, after=after))
    assert [flip["answer"] for flip in lost] == [None] * 3


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"kind": "text", "text": "running text"}, ("", "running text")),
        ({"kind": "prompt_completion", "prompt": "Q", "completion": "A"}, ("Q", "A")),
        (
            {
                "kind": "prompt_completion",
                "prompt": [{"role": "user", "content": "Q"}],
                "completion": [{"role": "assistant", "content": "A"}],
            },
            ("Q", "A"),
        ),
        (
            {
                "kind": "messages",
                "messages": [
                    {"role": "system", "content": "S"},
                    {"role": "user", "content": "Q"},
                    {"role": "assistant", "content": "A"},
                ],
            },
            ("Q", "A"),
        ),
        ({"kind": "messages", "messages": [{"role": "assistant", "content": "A"}]}, ("", "A")),
        (
            {
                "kind": "messages",
                "messages": [{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}],
            },
            ("", "[{'name': 'f'}]"),
        ),
    ],
)
def test_what_a_row_asks_last_and_its_answer(content: dict[str, Any], expected: tuple[str, str]) -> None:
    assert asked(RowContent(**content)) == expected
