"""The words of a row's line that get a loss, from the line to the tokens: every spelling of the table of keys."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from daemon.dataset.rows import Row, Rules, check_row, detect_format
from daemon.recipe import DataSettings
from tests.support.tokens import learned, samples
from tests.unit.test_rows_keys import LEARNED, transcript

# Shows all that a row can hold, in the form of `transcript`.
TEMPLATE = (
    "{% for tool in tools or [] %}{{ '[tool] ' + tool['function']['name'] + '\\n' }}{% endfor %}"
    "{% for m in messages %}{{ '[' + m['role'] + ']' }}"
    "{% if m['reasoning_content'] %}{{ ' <' + m['reasoning_content'] + '>' }}{% endif %}"
    "{% if m['content'] %}{{ ' ' + m['content'] }}{% endif %}"
    "{% for c in m['tool_calls'] or [] %}{{ ' ' + c['function']['name'] + '(' + c['function']['arguments'] | tojson + ')' }}"
    "{% endfor %}{{ eos_token + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Any:
    made = copy.deepcopy(AutoTokenizer.from_pretrained(tiny_base))
    made.chat_template = TEMPLATE
    return made


@pytest.mark.parametrize("line", [row for row, _ in LEARNED.values()], ids=LEARNED)
def test_exactly_the_starred_turns_of_the_table_are_learned(line: dict[str, Any], tokenizer: Any) -> None:
    """Each to its end; whatever else the row holds is context."""
    rules = Rules()
    format_ = detect_format(line, rules.columns)
    assert format_ is not None
    content = check_row(json.dumps(line).encode(), format_, rules)
    turns = [turn.partition(":") for turn in transcript(content)]
    starred = [said.strip() for role, _, said in turns if role.endswith("*")]
    row = Row(line=1, content_digest="00" * 16, **vars(content))
    found = [learned(ids, labels, tokenizer) for ids, labels in samples(row, tokenizer, DataSettings())]
    pieces = [piece.strip() for text in found for piece in text.split(tokenizer.eos_token) if piece.strip()]
    assert pieces == starred
