"""The base model's tokenizer.

Apart from `daemon.trainer.model`, so that what only tokenises (a check, a preview) imports neither torch nor peft.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer

from daemon.job import FailureKind
from daemon.trainer.base_model import BaseModel
from daemon.trainer.errors import RunFailure


def load_tokenizer(base: BaseModel) -> Any:
    """The base model's tokenizer; its padding token is set (to EOS where it has none)."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(base.path, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        raise RunFailure(
            FailureKind.CONFIG,
            f"the base model in {base.path} has no usable tokenizer: {error}",
            hint="fetch the model again, tokenizer.json included",
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
