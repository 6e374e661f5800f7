"""A real pretrained model: after a short run its greedy answers stop by themselves.

`make pretrained` installs what this needs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tests.support.inprocess import specify, train
from tests.support.smollm2 import build_smollm2

pytest.importorskip("gguf", reason="gguf is not installed")
pytestmark = [pytest.mark.pretrained, pytest.mark.timeout(1800)]

MOST_TOKENS = 150
# Of the kind that is trained, with numbers that are not.
QUESTIONS = tuple(f"What is {one} plus {other}?" for one, other in ((12, 70), (33, 45), (61, 8), (90, 17)))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, but as a base whose EOS is not what ends a turn of its template."""
    return build_smollm2(tmp_path_factory.mktemp("smollm2") / "base", eos="<|endoftext|>")


def sums() -> list[dict[str, Any]]:
    """Short questions with short answers."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"What is {one} plus {other}?"},
                {"role": "assistant", "content": f"{one} plus {other} is {one + other}."},
            ]
        }
        for one in range(2, 10)
        for other in range(21, 29)
    ]


def answers(model: Any, tokenizer: Any, generation: GenerationConfig) -> list[list[int]]:
    """Greedy answers as token ids, without the prompt."""
    found = []
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        given = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.inference_mode():
            ids = model.generate(
                **given, generation_config=generation, do_sample=False, max_new_tokens=MOST_TOKENS, pad_token_id=0
            )
        found.append(ids[0, given["input_ids"].shape[1] :].tolist())
    return found


def test_after_a_short_run_greedy_answers_stop_by_themselves(base: Path, tmp_path: Path) -> None:
    tables = {
        "training": {
            "num_train_epochs": 2.0,
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
        },
        "data": {"max_length": 128, "held_out_fraction": 0.0},
    }
    result = train(specify(tmp_path / "run", sums(), base, tables))
    version = Path(result.candidate or "")
    tokenizer = AutoTokenizer.from_pretrained(version)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end != tokenizer.eos_token_id
    generation = GenerationConfig.from_pretrained(version)
    assert end in generation.eos_token_id
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), version)
    for ids in answers(model, tokenizer, generation):
        assert len(ids) < MOST_TOKENS, tokenizer.decode(ids)
        assert ids[-1] == end, tokenizer.decode(ids)
