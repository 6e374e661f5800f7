"""The token ids and labels that TRL's SFTTrainer prepares from the same rows, with the same tokenizer and settings."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from daemon.config import ColumnSettings, DataSettings
from daemon.rows import Row, iter_rows
from daemon.trainer.chat import ChatTemplate
from daemon.trainer.encode import IGNORE
from tests.support.tokens import encode_cut

DATA = Path(__file__).parents[1] / "data" / "trainer"
MAX_LENGTH = 384
COLUMNS = ColumnSettings(prompt="question", completion="answer")
# Templates of well-known models, for which TRL keeps a copy with generation markers. Not among them: those that hide what
# was thought in earlier turns (Qwen3, Nemotron, DeepSeek, gpt-oss), and Phi-3's, which ends every beginning with EOS. Their
# beginnings do not nest, which is an error here, with last_turn as the way out; TRL changes the template instead, and so
# trains on another text than the model will see.
TEMPLATES = ("cohere", "cohere2", "gemma", "gemma3", "lfm2", "lfm2_v2", "llama3", "qwen2_5", "qwen2_5_vl")
TEMPLATES += ("qwen3_instruct_2507", "qwen3_vl")
FORMATS = {
    "gsm8k_pairs.jsonl": "columns",
    "alpaca_instruction.jsonl": "alpaca",
    "c4_text.jsonl": "text",
    "sharegpt_tools.jsonl": "sharegpt",
}


@pytest.fixture(scope="module")
def trl() -> Any:
    return pytest.importorskip("trl", reason="TRL is in the extra `bench`; the golden values below need none")


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_base)


def rows_of(name: str, **settings: Any) -> tuple[list[Row], DataSettings]:
    columns = COLUMNS if FORMATS[name] == "columns" else ColumnSettings()
    data = DataSettings(max_length=MAX_LENGTH, columns=columns, **settings)
    return list(iter_rows(DATA / name, FORMATS[name], data)), data


def ours(rows: list[Row], data: DataSettings, tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    encoded = (encode_cut(row, tokenizer, data) for row in rows)
    return [(list(ids), list(labels)) for ids, labels in encoded]


def theirs(
    trl: Any, rows: list[dict[str, Any]], tokenizer: Any, base: Path, folder: Path, **config: Any
) -> list[tuple[list[int], list[int]]]:
    """What SFTTrainer would train on. A stream, because a table of rows would give every tool every other's fields."""
    from datasets import IterableDataset

    def stream() -> Iterator[dict[str, Any]]:
        yield from copy.deepcopy(rows)

    trainer = trl.SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base),
        args=trl.SFTConfig(
            output_dir=str(folder),
            max_steps=1,
            report_to="none",
            use_cpu=True,
            bf16=False,
            max_length=config.pop("max_length", MAX_LENGTH),
            **config,
        ),
        train_dataset=IterableDataset.from_generator(stream),
        processing_class=tokenizer,
    )
    return [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]


def as_trl(row: Row) -> dict[str, Any]:
    if row.kind == "text":
        return {"text": row.text}
    if row.kind == "prompt_completion":
        return {"prompt": row.prompt, "completion": row.completion}
    return {"messages": row.messages, "tools": row.tools}


@pytest.mark.parametrize("name", FORMATS)
def test_ids_and_labels_are_trls(trl: Any, name: str, tokenizer: Any, tiny_base: Path, tmp_path: Path) -> None:
    rows, data = rows_of(name)
    config = {"assistant_only_loss": True} if rows[0].kind == "messages" else {}
    # Where a row is cut, we keep its trained part and TRL its beginning or its end; see the next test.
    data = data.model_copy(update={"max_length": 100_000})
    expected = theirs(trl, list(map(as_trl, rows)), tokenizer, tiny_base, tmp_path, max_length=None, **config)
    assert ours(rows, data, tokenizer) == expected
    assert any(label != IGNORE for _, labels in expected for label in labels)


@pytest.mark.parametrize("name", ["c4_text.jsonl", "alpaca_instruction.jsonl", "gsm8k_pairs.jsonl"])
def test_cut_rows_are_trls_where_nothing_trained_would_be_lost_or_all_is_trained(
    trl: Any, name: str, tokenizer: Any, tiny_base: Path, tmp_path: Path
) -> None:
    """On purpose we differ where TRL's cut loses trained tokens that fit: it drops those rows or trains half an answer."""
    rows, data = rows_of(name)
    config = {"assistant_only_loss": True} if rows[0].kind == "messages" else {}
    mine = ours(rows, data, tokenizer)
    matched = 0
    for row, (ids, labels) in zip(rows, mine, strict=True):
        expected = theirs(trl, [as_trl(row)], tokenizer, tiny_base, tmp_path, **config)
        kept = sum(label != IGNORE for label in labels)
        if expected and expected[0] == (ids, labels):
            matched += 1
        else:
            assert kept > (sum(label != IGNORE for label in expected[0][1]) if expected else 0)
    assert matched >= len(rows) // 2


@pytest.mark.parametrize("turns", [2, 6])
@pytest.mark.parametrize("name", TEMPLATES)
def test_turns_of_known_models_are_those_that_trls_markers_mark(
    trl: Any, name: str, turns: int, tokenizer: Any
) -> None:
    """By prefixes for a few turns and by pieces for more, from the template as the model brings it."""
    folder = Path(trl.__file__).parent / "chat_templates"
    messages = [] if "gemma" in name else [{"role": "system", "content": "Be brief."}]
    for number in range(turns):
        messages += [
            {"role": "user", "content": f"question {number}"},
            {"role": "assistant", "content": f"answer {number}"},
        ]
    spoken = []
    for path in (folder / f"{name}.jinja", folder / f"{name}_training.jinja"):
        if not path.is_file():
            pytest.skip(f"this TRL has no {path.name}")
        with_template = copy.deepcopy(tokenizer)
        with_template.chat_template = path.read_text()
        with_template.bos_token = "<|pad|>"
        rendered = ChatTemplate(with_template).render(messages, None)
        spoken.append([rendered.text[start:end].strip() for start, end in rendered.turns])
    assert spoken[0] == spoken[1]
    assert [f"answer {number}" in text for number, text in enumerate(spoken[0])] == [True] * turns
