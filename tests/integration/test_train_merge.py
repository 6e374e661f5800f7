"""A merged version is the base with its adapter, for programs that know no adapters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from daemon.recipe import ModelSettings
from daemon.trainer import merge as merging
from daemon.trainer.errors import RunFailure
from daemon.trainer.merge import merge
from daemon.versions import promote
from tests.support.inprocess import rows, specify, train
from tests.support.root import Root


def trained(folder: Path, base: Path, lora: dict[str, Any]) -> Path:
    tables = {"lora": lora, "training": {"max_steps": 4, "learning_rate": 2e-2}, "data": {"held_out_fraction": 0.0}}
    return Path(train(specify(folder, rows(16), base, tables)).candidate or "")


SHORT = {"training": {"max_steps": 2, "learning_rate": 2e-2}, "data": {"max_length": 160, "held_out_fraction": 0.0}}
ON_TIED_WEIGHTS = [
    {"target_modules": ["q_proj", "lm_head"]},
    {"target_modules": ["q_proj", "embed_tokens"]},
    {"modules_to_save": ["embed_tokens"]},
]


@pytest.mark.parametrize(
    "lora", [{}, {"use_dora": True, "use_rslora": True}, {"modules_to_save": ["lm_head"]}, *ON_TIED_WEIGHTS]
)
def test_logits_of_the_merged_model_are_those_of_base_and_adapter(
    tiny_base: Path, tmp_path: Path, lora: dict[str, Any]
) -> None:
    version = trained(tmp_path / "run", tiny_base, lora)
    merge(version, tmp_path / "out", ModelSettings(model_name_or_path=str(tiny_base)))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.dtype is torch.bfloat16
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    ids = torch.arange(10, 90).view(2, 40)
    with torch.inference_mode():
        plain = base(ids).logits
        expected = PeftModel.from_pretrained(base, version)(ids).logits
        found = merged.float()(ids).logits
    moved = float((expected - plain).abs().max())
    assert float((found - expected).abs().max()) < 0.05 * moved  # rounding, far below what was learned
    assert not list((tmp_path / "out").glob("*.bin"))


def test_neither_an_existing_folder_nor_another_base_is_taken(tiny_base: Path, tmp_path: Path) -> None:
    version = trained(tmp_path / "run", tiny_base, {})
    (tmp_path / "there").mkdir()
    with pytest.raises(RunFailure, match="exists"):
        merge(version, tmp_path / "there", ModelSettings(model_name_or_path=str(tiny_base)))
    config = json.loads((version / "adapter_config.json").read_text())
    (version / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "evil/base"}))
    with pytest.raises(RunFailure, match="was trained on 'evil/base'"):
        merge(version, tmp_path / "out", ModelSettings(model_name_or_path=str(tiny_base)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["model.safetensors", "tokenizer.json", "chat_template.jinja"])
def test_a_base_that_was_replaced_in_place_is_not_merged(
    make_root: Any, tiny_base: Path, tmp_path: Path, part: str
) -> None:
    """Same name, same shapes, other contents: refused with both identities, and nothing is written."""
    root: Root = make_root(base_model=tiny_base, tables=SHORT)
    shutil.copytree(tiny_base, root.path / "base")
    root.configure(model={"model_name_or_path": "base"})
    root.drop("a.jsonl", rows(16))
    assert root.run("run", "--once").returncode == 0, root.errors()
    replaced = root.path / "base" / part
    content = replaced.read_bytes() if replaced.exists() else b"{{ messages }}"
    if part == "model.safetensors":
        content = content[:-1] + bytes([content[-1] ^ 1])
    replaced.write_bytes(content if part == "model.safetensors" else content + b"\n ")
    done = root.run("merge", "1", str(tmp_path / "out"))
    assert done.returncode == 1
    assert "version 0001 was trained" in done.stderr
    assert done.stderr.count("./base (") == 2
    assert "put that base back" in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_command_merges_a_version_by_number_and_fails_in_words(
    make_root: Any, tiny_base: Path, tmp_path: Path
) -> None:
    root: Root = make_root(base_model=tiny_base)
    candidate = trained(tmp_path / "run", tiny_base, {})
    promote(root.settings.model_dir, candidate, job_id="job", record={})
    done = root.run("merge", "1", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()
    again = root.run("merge", "latest", str(tmp_path / "out"))
    assert again.returncode == 1
    assert "exists" in again.stderr
    assert root.run("merge", "9", str(tmp_path / "other")).returncode == 4


def test_a_merge_that_computes_something_else_is_refused_and_leaves_nothing(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is added to a weight that head and embeddings share changes both; without untying the probe tells."""
    version = trained(tmp_path / "run", tiny_base, {"target_modules": ["q_proj", "lm_head"]})
    monkeypatch.setattr(merging, "untie", lambda model: None)
    with pytest.raises(RunFailure, match="does not compute what version"):
        merge(version, tmp_path / "out", ModelSettings(model_name_or_path=str(tiny_base)))
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_a_saved_merge_with_another_weight_is_refused(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = trained(tmp_path / "run", tiny_base, {})

    monkeypatch.setattr(
        merging, "load_saved", lambda folder: AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.bfloat16)
    )
    with pytest.raises(RunFailure, match="reads back with other weights"):
        merge(version, tmp_path / "other", ModelSettings(model_name_or_path=str(tiny_base)))
    assert not (tmp_path / "other").exists()


def test_a_version_that_is_not_as_it_was_promoted_is_not_merged(make_root: Any, tmp_path: Path) -> None:
    """One flipped bit in the adapter, and one file that is gone: named, and nothing is written."""
    root: Root = make_root(behaviour={})
    candidate = tmp_path / "candidate"
    candidate.mkdir()
    (candidate / "adapter_config.json").write_text("{}")
    (candidate / "adapter_model.safetensors").write_bytes(b"weights")
    version = promote(root.settings.model_dir, candidate, job_id="job", record={})
    (version.path / "adapter_model.safetensors").write_bytes(b"weightr")
    (version.path / "adapter_config.json").unlink()
    done = root.run("merge", "1", str(tmp_path / "out"))
    assert done.returncode == 1
    assert "version 0001 lacks adapter_config.json" in done.stderr
    assert "adapter_model.safetensors is not the file that was promoted" in done.stderr
    assert not (tmp_path / "out").exists()
