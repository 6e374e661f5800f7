"""A model that learned to stop is stopped: what its version and its merge tell a reader."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GenerationConfig

from daemon.recipe import ModelSettings
from daemon.trainer.generation import generation_config
from daemon.trainer.merge import merge
from tests.support.inprocess import rows, specify, train

SHORT = {"training": {"max_steps": 2}, "data": {"held_out_fraction": 0.0}}
THINKING = {"messages": [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "1"}] * 2}


@pytest.fixture
def other_eos(tiny_base: Path, tmp_path: Path) -> Path:
    """The tiny model, but its tokenizer's EOS is not what ends a turn."""
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = "<|pad|>"
    tokenizer.save_pretrained(folder)
    return folder


def ends_of(folder: Path) -> Any:
    return GenerationConfig.from_pretrained(folder).eos_token_id


def test_version_and_merge_name_the_end_of_turn_where_it_is_not_the_tokenizers_eos(
    other_eos: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(other_eos)
    result = train(specify(tmp_path / "run", rows(16), other_eos, SHORT))
    version = Path(result.candidate or "")
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert {end, tokenizer.eos_token_id} <= set(ends_of(version))
    merge(version, tmp_path / "merged", ModelSettings(model_name_or_path=str(other_eos)))
    assert ends_of(tmp_path / "merged") == ends_of(version)


def test_where_the_base_says_it_already_the_version_says_nothing(tiny_base: Path, tmp_path: Path) -> None:
    result = train(specify(tmp_path / "run", rows(16), tiny_base, SHORT))
    assert not (Path(result.candidate or "") / "generation_config.json").exists()


def test_ends_are_the_bases_the_parents_and_those_of_this_run(tmp_path: Path) -> None:
    base, parent = tmp_path / "base", tmp_path / "parent"
    for folder, config in ((base, {"eos_token_id": 7, "top_p": 0.9}), (parent, {"eos_token_id": [7, 9]})):
        folder.mkdir()
        (folder / "generation_config.json").write_text(json.dumps(config))
    assert generation_config(base, None, eos=7, learned=[7]) is None
    assert generation_config(base, None, eos=7, learned=[8]) == {"eos_token_id": [7, 8], "top_p": 0.9}
    assert generation_config(base, parent, eos=7, learned=[8]) == {"eos_token_id": [7, 9, 8], "top_p": 0.9}
    assert generation_config(tmp_path / "none", None, eos=None, learned=[3]) == {"eos_token_id": [3]}


def test_a_conversation_of_several_samples_is_told_as_such_by_run_and_card(tiny_base: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' and loop.last %}{{ '(new)' }}"
        "{% endif %}{{ m.content + '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    tokenizer.save_pretrained(base)
    tools = [{"type": "function", "function": {"name": "look"}}]
    result = train(specify(tmp_path / "run", [THINKING | {"tools": tools}] * 8, base, SHORT))
    assert (result.rows, result.samples) == (8, 16)
    [warning] = [text for text in result.warnings if "tool definitions" in text]
    assert warning.startswith(
        "rows that have tool definitions, of which the template leaves something out: 8 (lines 1, 2, 3"
    )
    card = (Path(result.candidate or "") / "README.md").read_text()
    assert "16 samples trained" in card
    assert warning in card
    events = (tmp_path / "run" / "run" / "events.jsonl").read_text()
    assert events.index("run.data_warned") < events.index("run.started")
