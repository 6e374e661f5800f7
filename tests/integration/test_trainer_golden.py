"""Token ids and labels as they were when they were compared with TRL's; needs no TRL."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from transformers import AutoTokenizer

from daemon.dataset.rows import iter_rows
from daemon.recipe import ColumnSettings, DataSettings
from daemon.trainer.collate import IGNORE
from tests.support.tokens import encode_cut

DATA = Path(__file__).parents[1] / "data" / "trainer"
FILES = {
    "gsm8k_pairs.jsonl": "columns",
    "alpaca.jsonl": "alpaca",
    "conversation_pairs.jsonl": "prompt_completion",
    "messages.jsonl": "messages",
    "prompt_completion.jsonl": "prompt_completion",
    "sharegpt.jsonl": "sharegpt",
    "text.jsonl": "text",
}
# The tokenizer's own template has generation markers; this one has none, so turns are told apart by their prefixes.
UNMARKED = (
    "{% if tools %}{{ '<|tool|>\\n' + tools | tojson + '<|end|>\\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + (m['content'] or '') }}"
    "{% for call in m['tool_calls'] or [] %}{{ call['function'] | tojson }}{% endfor %}{{ '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
WAYS = ("auto", "unmarked", "last_turn", "all")


def tokenised(name: str, way: str) -> list[dict[str, Any]]:
    tokenizer = AutoTokenizer.from_pretrained(DATA / "tokenizer")
    if way == "unmarked":
        tokenizer.chat_template = UNMARKED
    data = DataSettings(
        max_length=384,
        train_on="auto" if way == "unmarked" else way,  # type: ignore[arg-type]
        columns=ColumnSettings(prompt="question", completion="answer")
        if FILES[name] == "columns"
        else ColumnSettings(),
    )
    found = []
    for row in iter_rows(DATA / name, FILES[name], data):
        ids, labels = encode_cut(row, tokenizer, data)
        assert all(label in (IGNORE, token) for token, label in zip(ids, labels, strict=True))
        found.append(
            {
                "tokens": len(ids),
                "ids": blake3(json.dumps(list(ids)).encode()).hexdigest(length=8),
                "learned": ranges([label != IGNORE for label in labels]),
            }
        )
    return found


def ranges(learned: list[bool]) -> list[list[int]]:
    """Where runs of learned tokens begin and end."""
    runs = [(yes, [at for at, _ in group]) for yes, group in groupby(enumerate(learned), lambda item: item[1])]
    return [[run[0], run[-1] + 1] for yes, run in runs if yes]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FILES)
def test_ids_and_learned_ranges_are_what_they_were(name: str, way: str) -> None:
    golden = json.loads((DATA / "golden.json").read_text())
    assert tokenised(name, way) == golden[name][way]


if __name__ == "__main__":
    everything = {name: {way: tokenised(name, way) for way in WAYS} for name in FILES}
    (DATA / "golden.json").write_text(json.dumps(everything, separators=(",", ":")).replace("]},{", "]},\n{") + "\n")
