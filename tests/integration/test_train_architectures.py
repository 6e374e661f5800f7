"""Architectures other than Llama: what peft and transformers do differently for them, a run survives.

GPT-2 keeps its weights transposed, mixtures keep their experts in one tensor, which peft adapts by other fields, Gemma 2
caps its attention's scores, Mistral looks back through a window: models of random weights, as small as they come.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from daemon.job import FailureKind, Outcome
from daemon.recipe import LoraSettings, ModelSettings
from daemon.trainer.attention import use_packed
from daemon.trainer.base_model import resolve_base
from daemon.trainer.collate import Example, flatten
from daemon.trainer.errors import RunFailure
from daemon.trainer.merge import merge
from daemon.trainer.model import load_model, resolve_attention
from daemon.versions import promote
from tests.support.inprocess import StopAfterLoading, events, rows, specify, train

SMALL = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "qwen3": SMALL,
    "qwen3_moe": {**SMALL, **EXPERTS},
    "mixtral": {**SMALL, "num_local_experts": 4},
    "gemma2": {**SMALL, "sliding_window": 32},
    "mistral": {**SMALL, "sliding_window": 32},
    "gpt_oss": {**SMALL, "num_local_experts": 4, "sliding_window": 32},
}
EAGER = {"gemma2", "gpt_oss"}
TABLES = {"training": {"max_steps": 3, "learning_rate": 1e-2}, "data": {"held_out_fraction": 0.3}}


@pytest.fixture(scope="module", params=list(KINDS))
def base(request: pytest.FixtureRequest, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(request.param, tiny_base, tmp_path_factory.mktemp("bases") / request.param)


def built(kind: str, tiny_base: Path, folder: Path, **changed: Any) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "eos_token_id", "bos_token_id")}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **special, **{**KINDS[kind], **changed})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_one_job_goes_on_from_another_and_its_version_merges(base: Path, tmp_path: Path) -> None:
    settings = ModelSettings(model_name_or_path=str(base))
    assert resolve_attention(resolve_base(settings), settings) == ("eager" if base.name in EAGER else "sdpa")
    first = specify(tmp_path, rows(40), base, TABLES)
    result = train(first)
    assert (result.outcome, result.steps_run) == (Outcome.SUCCEEDED, 3)
    promote(Path(first.model_dir), Path(result.candidate or ""), job_id="one", record={})
    second = specify(tmp_path, rows(40, start=40), base, TABLES)
    after = train(second)
    assert (after.outcome, after.steps_run) == (Outcome.SUCCEEDED, 3), after.message
    assert after.lora_norm is not None
    assert after.lora_norm > 1.2 * (result.lora_norm or 0.0)  # it continues, nothing starts at zero again
    assert after.held_out_after is not None
    assert after.held_out_before is not None
    assert after.held_out_after < after.held_out_before

    ids = torch.arange(10, 90).view(2, 40)
    merge(Path(after.candidate or ""), tmp_path / "out", settings)
    with torch.inference_mode():
        network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        plain = network(ids).logits
        expected = PeftModel.from_pretrained(network, after.candidate)(ids).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(ids).logits
    assert float((found - expected).abs().max()) < 0.05 * float((expected - plain).abs().max())
    assert events(second, "run.started")[0]["scores_trained_only"] is True


@pytest.mark.parametrize("kind", ["gpt2", "qwen3_moe"])
def test_a_stopped_run_ends_with_the_weights_of_one_that_was_not(kind: str, tiny_base: Path, tmp_path: Path) -> None:
    folder = built(kind, tiny_base, tmp_path / "base")
    tables = {"training": {"save_steps": 1, "max_steps": 4}, "data": {"held_out_fraction": 0.0}}
    spec = specify(tmp_path / "run", rows(32), folder, tables)
    assert train(spec, StopAfterLoading()).outcome is Outcome.INTERRUPTED
    resumed = train(spec)
    assert (resumed.start_step, resumed.steps_run) == (1, 4)
    whole = train(specify(tmp_path / "whole", rows(32), folder, tables))
    found, expected = (load_file(Path(one.candidate or "", "adapter_model.safetensors")) for one in (resumed, whole))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_rows_without_padding_are_computed_so_only_where_that_is_the_same(base: Path) -> None:
    """A window or a cap that packed attention does not know has to show before a run, not in its loss."""
    settings = ModelSettings(model_name_or_path=str(base))
    for longest in (24, 60):
        examples = [example(size) for size in (longest, 7, 18)]
        model = load_model(resolve_base(settings), settings, LoraSettings(), None).eval()
        with torch.inference_mode():
            alone = torch.cat([model(input_ids=torch.tensor([one.input_ids])).logits[0] for one in examples])
        packed = use_packed(model, examples)
        assert packed is (base.name not in EAGER and not (longest > 32 and "sliding_window" in KINDS[base.name]))
        batch = flatten(examples)
        batch.pop("labels")
        if packed:
            with torch.inference_mode():
                together = model(**batch, use_cache=False).logits[0]
            torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_a_token_that_the_base_does_not_know_is_told_before_anything_is_cleared(
    tiny_base: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["Natalia"])
    tokenizer.save_pretrained(folder)
    spec = specify(tmp_path / "run", rows(8), folder)
    with pytest.raises(RunFailure, match=r"line 1: the tokenizer makes token \d+, 'Natalia'") as caught:
        train(spec)
    assert caught.value.kind is FailureKind.CONFIG
    assert not list(Path(spec.model_dir).iterdir())


def test_a_row_beyond_the_last_position_is_told_and_one_beyond_what_a_model_was_made_for_is_a_warning(
    tiny_base: Path, tmp_path: Path
) -> None:
    short = {"n_positions": 64, "max_position_embeddings": 64}
    last = built("gpt2", tiny_base, tmp_path / "gpt2", **short)
    with pytest.raises(
        RunFailure, match=r"line \d+ has \d+ tokens, and the base model no more than 64 positions"
    ) as caught:
        train(specify(tmp_path / "one", rows(8), last, TABLES))
    assert "max_length = 64" in caught.value.hint
    tables = {**TABLES, "data": {"max_length": 64}}
    assert train(specify(tmp_path / "two", rows(8), last, tables)).outcome is Outcome.SUCCEEDED
    made_for = built("qwen3", tiny_base, tmp_path / "qwen3", max_position_embeddings=64)
    result = train(specify(tmp_path / "three", rows(8), made_for, TABLES))
    assert any("longer than the 64 positions" in warning for warning in result.warnings)


def test_padding_with_a_token_that_the_base_does_not_know_does_no_harm(tiny_base: Path, tmp_path: Path) -> None:
    """As in many a repaired tokenizer: what is padded is neither attended to nor learned."""
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    tokenizer.save_pretrained(folder)
    found = train(specify(tmp_path / "run", rows(24), folder, TABLES))
    expected = train(specify(tmp_path / "plain", rows(24), tiny_base, TABLES))
    assert (found.outcome, found.held_out_after) == (Outcome.SUCCEEDED, expected.held_out_after)


def example(size: int) -> Example:
    ids = torch.randint(10, 400, (size,), generator=torch.Generator().manual_seed(size)).tolist()
    return Example(input_ids=ids, learned=((0, size),), line=size, content_digest="")


@pytest.mark.parametrize(
    ("kind", "lora"), [("qwen3", {"target_modules": ["no_such_layer"]}), ("qwen3_moe", {"use_dora": True})]
)
def test_an_adapter_that_a_base_cannot_have_is_told_in_words(
    kind: str, lora: dict[str, Any], tiny_base: Path, tmp_path: Path
) -> None:
    folder = built(kind, tiny_base, tmp_path / "base")
    with pytest.raises(RunFailure, match="cannot have this adapter") as caught:
        train(specify(tmp_path / "run", rows(8), folder, {"lora": lora}))
    assert caught.value.kind is FailureKind.CONFIG
    assert "target_modules" in caught.value.hint
