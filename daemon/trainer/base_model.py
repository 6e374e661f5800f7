"""Find the base model and its tokenizer: a local folder, or a Hub snapshot, downloaded only when that is allowed.

Nothing here imports torch or peft, so that a check or a preview starts quickly. No code of a model is ever run: a
configuration with `auto_map` is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from daemon.base_identity import OFFLINE_VARIABLE, BaseModel, base_problem, expand_home
from daemon.job import FailureKind
from daemon.recipe import ModelSettings
from daemon.trainer.errors import RunFailure

CAUSE_CHARACTERS = 200  # of what the Hub's client says
# What a causal language model in safetensors form consists of; no .bin, no .py.
SNAPSHOT_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "LICENSE*")


def resolve_base(model: ModelSettings, root: Path | None = None) -> BaseModel:
    """Return the base model; `root` is Dropforge's, where that is known.

    Raises RunFailure(BASE) when it is missing, incomplete or needs code of its own.
    """
    if (problem := base_problem(model)) is not None:
        raise RunFailure(FailureKind.BASE, problem.message, hint=problem.hint)
    name = model.model_name_or_path
    local = expand_home(name)
    if local.is_dir():
        base = BaseModel(name=name, path=local.resolve(), revision=None, root=root)
    else:
        base = _snapshot(model, root)
    _require_loadable(base)
    return base


def load_tokenizer(base: BaseModel) -> Any:
    """Load the base model's tokenizer; its padding token is set (to EOS where it has none). Raises RunFailure(BASE)."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(base.path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # a damaged tokenizer.json raises whatever its reader stumbles over
        words = " ".join(str(error).split()) if isinstance(error, OSError | ValueError) else ""
        said = words[:CAUSE_CHARACTERS] or repr(error)
        raise RunFailure(
            FailureKind.BASE,
            f"the base model in {base.path} has no usable tokenizer: {said}",
            hint="fetch the model again, tokenizer.json included",
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextmanager
def offline() -> Iterator[None]:
    """Keep libraries from requests to the Hub: all that a run needs is on this machine.

    peft would look up the base model's vocabulary there at every checkpoint.
    """
    from huggingface_hub import constants

    before, variable = constants.HF_HUB_OFFLINE, os.environ.get(OFFLINE_VARIABLE)
    constants.HF_HUB_OFFLINE, os.environ[OFFLINE_VARIABLE] = True, "1"
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
        if variable is None:
            del os.environ[OFFLINE_VARIABLE]
        else:
            os.environ[OFFLINE_VARIABLE] = variable


def _snapshot(model: ModelSettings, root: Path | None) -> BaseModel:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import snapshot_download

    name, revision = model.model_name_or_path, model.revision
    patterns = list(SNAPSHOT_PATTERNS)
    # The Hub client has a dozen error classes of its own, network ones among them; each means the same to the user.
    try:
        path = Path(
            snapshot_download(
                name, revision=revision, local_files_only=not model.allow_downloads, allow_patterns=patterns
            )
        )
    except Exception as error:
        raise RunFailure(
            FailureKind.BASE,
            f"cannot fetch {name} from the Hub: {_first_cause(error)}",
            hint="check the network and the name; or fetch it elsewhere and bring the folder",
        ) from error
    return BaseModel(name=name, path=path, revision=path.name, root=root)


def _first_cause(error: BaseException) -> str:
    """The first line of what an error was raised from, at its beginning."""
    while (cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__)) is not None:
        error = cause
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:CAUSE_CHARACTERS]}" if lines else type(error).__name__


def _require_loadable(base: BaseModel) -> None:
    config_path = base.path / "config.json"
    try:
        config = json.loads(config_path.read_bytes())
    except (OSError, ValueError) as error:
        raise RunFailure(
            FailureKind.BASE, f"the base model has no readable {config_path}: {error}", hint="fetch the model again"
        ) from error
    if not isinstance(config, dict) or "auto_map" in config:
        raise RunFailure(
            FailureKind.BASE,
            f"the base model {base.name} needs code of its own (auto_map in config.json), which is never run",
            hint="choose a model whose architecture transformers has built in",
        )
