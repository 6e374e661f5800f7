"""With the real trainer: what a version says of its base, and bases that it cannot be continued on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM

from daemon import versions
from daemon.base_identity import BaseModel, recorded_base
from daemon.cli.init import examples_dir
from daemon.job import FailureKind, JobState
from daemon.lineage import LINEAGE
from daemon.trainer import train as training
from daemon.trainer.errors import RunFailure
from daemon.trainer.tiny_model import TinyShape, build_tiny
from tests.support.inprocess import rows, specify, train
from tests.support.root import Root, wait_until

SHORT = {"training": {"max_steps": 2, "learning_rate": 2e-2}, "data": {"max_length": 160, "held_out_fraction": 0.0}}


@pytest.fixture
def trained(make_root: Callable[..., Root], tiny_base: Path) -> Root:
    """A root that holds its base and one version."""
    root = make_root(base_model=tiny_base, tables=SHORT)
    shutil.copytree(tiny_base, root.path / "base")
    root.configure(model={"model_name_or_path": "base"})
    root.drop("a.jsonl", rows(16))
    assert root.run("run", "--once").returncode == 0, root.errors()
    return root


def test_a_version_names_a_base_in_the_root_by_a_path_that_moves_along(
    trained: Root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file of the version has the root's path; moved as a whole, the root loads, merges and trains on."""
    before = trained.path
    moved = before.rename(tmp_path / "moved")
    trained.path = moved
    folder = moved / "current_model" / "versions" / "0001"
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "./base"
    card = (folder / "README.md").read_text()
    assert "base_model: ./base" in card
    assert "in the folder that holds dropforge.toml" in card
    naming = [path.name for path in folder.iterdir() if str(before).encode() in path.read_bytes()]
    assert not naming
    monkeypatch.chdir(moved)
    model = AutoPeftModelForCausalLM.from_pretrained("current_model/latest")
    assert isinstance(model, PeftModel)
    assert isinstance(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("./base"), folder), PeftModel)
    monkeypatch.chdir(os.sep)
    assert trained.run("merge", "1", str(tmp_path / "out")).returncode == 0
    trained.drop("b.jsonl", rows(16, start=20))
    assert trained.run("run", "--once").returncode == 0, trained.errors()
    record = json.loads((moved / "current_model" / "versions" / "0002" / versions.RECORD).read_text())
    base = recorded_base(record)
    assert record["parent"] == "0001"
    assert base is not None
    assert base.name == "./base"


@pytest.mark.parametrize("recorded", [True, False])
def test_a_base_of_another_shape_is_told_in_words_and_never_as_a_size_mismatch(trained: Root, recorded: bool) -> None:
    """Also for a version of before bases were recorded, whose layers have the same names."""
    if not recorded:
        model_dir = trained.settings.model_dir
        path = model_dir / "versions" / "0001" / versions.RECORD
        old = {key: value for key, value in json.loads(path.read_text()).items() if key not in ("base", "files")}
        path.write_text(json.dumps(old))
        (model_dir / LINEAGE).write_text(json.dumps({"event": "promoted", **old}) + "\n")
    shutil.rmtree(trained.path / "base")
    shape = TinyShape(vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    build_tiny(trained.path / "base", [examples_dir() / "gsm8k_more_messages.jsonl"], shape=shape)
    trained.start()
    trained.drop("b.jsonl", rows(16, start=20))

    def held() -> str:
        status: dict[str, Any] = trained.status() or {}
        return str(status["reason"]) if status.get("status") == "waiting" and "start_from" in status["reason"] else ""

    reason = wait_until(held, what="the queue to be held")
    assert ("was trained on another base model" if recorded else "does not fit the base model") in reason
    assert "size mismatch" not in reason
    if recorded:
        assert len(trained.events("run.planned")) == 1, "told before any row became tokens"
    job = trained.job("b.jsonl")
    assert job is not None
    assert (job.state, job.attempts_without_progress) == (JobState.QUEUED, 0)
    assert trained.stop() == 0


def test_a_base_that_is_replaced_while_a_run_begins_is_not_trained_on(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was digested is what was loaded, or the run is lost and tried again."""
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    spec = specify(tmp_path / "run", rows(16), base, SHORT)
    load_model = training.load_model

    def replaced(*arguments: Any) -> Any:
        weights = base / "model.safetensors"
        content = weights.read_bytes()
        weights.unlink()
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        return load_model(*arguments)

    monkeypatch.setattr(training, "load_model", replaced)
    with pytest.raises(RunFailure, match="the base model's weights changed while the run began") as failed:
        train(spec)
    assert failed.value.kind is FailureKind.LOST


@pytest.mark.parametrize(
    ("name", "revision", "expected"),
    [
        ("ROOT/base", None, "./base"),
        ("ROOT/models/a b", None, "./models/a b"),
        ("ELSEWHERE/base", None, "ELSEWHERE/base"),
        ("org/model", "0" * 40, "org/model"),
    ],
)
def test_a_base_is_named_by_what_other_machines_know(
    tmp_path: Path, name: str, revision: str | None, expected: str
) -> None:
    def real(text: str) -> str:
        return text.replace("ROOT", str(tmp_path / "root")).replace("ELSEWHERE", str(tmp_path / "elsewhere"))

    base = BaseModel(name=real(name), path=Path(real(name)), revision=revision, root=tmp_path / "root")
    assert base.portable_name == real(expected)


def test_a_base_that_the_root_holds_by_a_link_is_named_by_the_link(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "disk" / "base"
    root.mkdir()
    elsewhere.mkdir(parents=True)
    (root / "base").symlink_to(elsewhere)
    base = BaseModel(name=str(root / "base"), path=elsewhere, revision=None, root=root)
    assert base.portable_name == "./base"
