"""What a run never does, whatever lies on the disk or in the file that was dropped."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import guard
from daemon.base_identity import BaseModel
from daemon.errors import ConfigError
from daemon.job import FailureKind, Outcome
from daemon.recipe import LoraSettings, ModelSettings, Recipe
from daemon.trainer import requirements
from daemon.trainer.base_model import load_tokenizer, resolve_base
from daemon.trainer.callbacks import MonitorCallback
from daemon.trainer.errors import RunFailure
from daemon.trainer.merge import merge
from daemon.trainer.model import load_model, lora_config
from daemon.trainer.tiny_model import TinyShape, build_tiny
from daemon.versions import promote
from tests.support.inprocess import Wish, rows, specify, train
from tests.support.root import environment

SHORT = {"training": {"max_steps": 2}, "data": {"held_out_fraction": 0.0}}


def copy_of(base: Path, folder: Path, **config: Any) -> Path:
    shutil.copytree(base, folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


class Trap:
    """Unpickling this leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


def test_a_base_that_brings_code_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_base, tmp_path / "base", auto_map={"AutoModelForCausalLM": "evil.Model"})
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')")
    with pytest.raises(RunFailure, match="never run") as caught:
        train(specify(tmp_path / "run", rows(8), folder, SHORT))
    assert caught.value.kind is FailureKind.BASE
    assert not (tmp_path / "trace").exists()


def test_a_pickled_base_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_base, tmp_path / "base")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "trace")))
    with pytest.raises(RunFailure, match=r"no \*\.safetensors"):
        resolve_base(ModelSettings(model_name_or_path=str(folder)))
    assert not (tmp_path / "trace").exists()


def test_code_that_lies_beside_a_tokenizer_is_never_run(tiny_base: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_base, tmp_path / "base")
    path = folder / "tokenizer_config.json"
    named = {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}, "tokenizer_class": "Tokenizer"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **named}))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')\nclass Tokenizer: pass\n")
    with suppress(RunFailure):  # refused, or loaded as the plain tokenizer that tokenizer.json describes
        load_tokenizer(resolve_base(ModelSettings(model_name_or_path=str(folder))))
    assert not (tmp_path / "trace").exists()


def test_a_pickled_adapter_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    """peft would load it; neither a run that continues it nor a merge does."""
    spec = specify(tmp_path / "run", rows(16), tiny_base, SHORT)
    parent = Path(train(spec).candidate or "")
    (parent / "adapter_model.safetensors").unlink()
    (parent / "adapter_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "trace")))
    settings = ModelSettings(model_name_or_path=str(tiny_base))
    with pytest.raises(RunFailure, match=r"no adapter_model\.safetensors"):
        load_model(resolve_base(settings), settings, LoraSettings(), parent)
    with pytest.raises(RunFailure, match=r"no adapter_model\.safetensors"):
        merge(parent, tmp_path / "out", settings)
    assert not (tmp_path / "trace").exists()


def test_pickles_in_a_checkpoint_are_never_run(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changed ones fail the seal and the run starts again; sealed ones, by somebody with our rights, load as weights only."""
    prepared: list[guard.PreparedRun] = []
    prepare, ended = guard.prepare_run, MonitorCallback.on_step_end

    def noting(*args: Any, **options: Any) -> guard.PreparedRun:
        prepared.append(prepare(*args, **options))
        return prepared[-1]

    wish = Wish()

    def stopping(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        wish.requested = state.global_step >= 2
        ended(self, args, state, control, **kwargs)

    monkeypatch.setattr(guard, "prepare_run", noting)
    monkeypatch.setattr(MonitorCallback, "on_step_end", stopping)
    spec = specify(tmp_path / "run", rows(40), tiny_base, {"data": {"held_out_fraction": 0.0}})
    checkpoint = tmp_path / "run" / "model" / "checkpoint-2"
    trap = pickle.dumps(Trap(tmp_path / "trace"))
    train(spec, wish)
    monkeypatch.setattr(MonitorCallback, "on_step_end", ended)
    for name in ("optimizer.pt", "scheduler.pt", "training_args.bin"):
        (checkpoint / name).write_bytes(trap)
    guard.seal_checkpoint(checkpoint, step=2, fingerprint=prepared[0].fingerprint)
    with pytest.raises(pickle.UnpicklingError):
        train(spec)
    assert prepared[-1].resume_from is not None  # it did try them
    (checkpoint / "optimizer.pt").write_bytes(trap + b"and a byte")
    result = train(spec)
    assert (result.outcome, result.resumed_from) == (Outcome.SUCCEEDED, None)
    assert not (tmp_path / "trace").exists()


def test_the_base_that_an_adapter_names_is_never_followed(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parent's configuration leads to a folder that is no model; the run takes its weights and the configured base."""
    spec = specify(tmp_path / "run", rows(16), tiny_base, SHORT)
    candidate = Path(train(spec).candidate or "")
    path = candidate / "adapter_config.json"
    config = {
        **json.loads(path.read_text()),
        "base_model_name_or_path": str(tmp_path / "elsewhere"),
        "revision": "evil",
    }
    path.write_text(json.dumps(config))
    promote(tmp_path / "run" / "model", candidate, job_id="one", record={})
    again = specify(tmp_path / "run", rows(16, start=16), tiny_base, SHORT)
    result = train(again)
    assert result.outcome is Outcome.SUCCEEDED
    saved = json.loads((Path(result.candidate or "") / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(tiny_base)


def test_an_adapters_configuration_is_built_from_our_own_settings_alone(tiny_base: Path) -> None:
    """Every field of peft's class is our setting, or what the class itself has."""
    from peft import LoraConfig

    base = BaseModel(name=str(tiny_base), path=tiny_base, revision=None)
    made = lora_config(LoraSettings(r=3), base).to_dict()
    ours = {*LoraSettings.model_fields, "task_type", "base_model_name_or_path", "revision"}
    plain = LoraConfig().to_dict()
    assert {name: value for name, value in made.items() if name not in ours} == {
        name: value for name, value in plain.items() if name not in ours
    }
    assert made["r"] == 3


def test_a_parents_configuration_that_asks_for_more_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    spec = specify(tmp_path / "run", rows(16), tiny_base, SHORT)
    parent = Path(train(spec).candidate or "")
    config = json.loads((parent / "adapter_config.json").read_text())
    base = resolve_base(ModelSettings(model_name_or_path=str(tiny_base)))
    for strange in ({"layer_replication": [[0, 1], [0, 1]]}, {"rank_pattern": {"q_proj": 2}}, {"peft_type": "IA3"}):
        (parent / "adapter_config.json").write_text(json.dumps({**config, **strange}))
        with pytest.raises(RunFailure, match=next(iter(strange))):
            load_model(base, ModelSettings(model_name_or_path=str(tiny_base)), LoraSettings(), parent)


def test_without_permission_nothing_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[bool] = []

    def fetch(*args: Any, local_files_only: bool, **kwargs: Any) -> str:
        asked.append(local_files_only)
        raise OSError("Name or service not known\nand an essay") from ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(RunFailure, match="nor in the local cache") as caught:
        resolve_base(ModelSettings(model_name_or_path="some/model"))
    assert caught.value.kind is FailureKind.BASE
    with pytest.raises(RunFailure, match=r"cannot fetch some/model from the Hub: ConnectionError: no route$") as caught:
        resolve_base(ModelSettings(model_name_or_path="some/model", allow_downloads=True))
    assert caught.value.kind is FailureKind.BASE
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(RunFailure, match="HF_HUB_OFFLINE"):
        resolve_base(ModelSettings(model_name_or_path="some/model", allow_downloads=True))
    assert asked == [False]


def test_files_that_libraries_write_have_the_umasks_mode(tiny_base: Path, tmp_path: Path) -> None:
    """Checkpoint, candidate, merged model and tiny base: the unit's group reads the weights as it does the configuration."""
    spec = specify(tmp_path / "run", rows(16), tiny_base, {"training": {"max_steps": 2, "save_steps": 1}})
    before = os.umask(0o027)
    try:
        candidate = Path(train(spec).candidate or "")
        merge(candidate, tmp_path / "merged", ModelSettings(model_name_or_path=str(tiny_base)))
        build_tiny(tmp_path / "base", [Path(spec.dataset.path)], shape=TinyShape(hidden_size=12))
    finally:
        os.umask(before)
    folders = (tmp_path / "run" / "model" / "checkpoint-2", candidate, tmp_path / "merged", tmp_path / "base")
    modes = {path: path.stat().st_mode & 0o777 for folder in folders for path in folder.iterdir()}
    assert {path.name for path in modes} >= {"adapter_model.safetensors", "model.safetensors", "optimizer.pt"}
    assert not {str(path): oct(mode) for path, mode in modes.items() if mode != 0o640}


def test_telemetry_is_off() -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-P", "-c"),
            "from daemon.trainer.bootstrap import set_library_environment; set_library_environment()\n"
            "from huggingface_hub import constants; print(constants.HF_HUB_DISABLE_TELEMETRY)",
        ],
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
    )
    assert done.stdout.strip() == "True"


@pytest.mark.parametrize(("package", "version"), [("torch", "2.9"), ("transformers", "4.57")])
def test_libraries_whose_loading_we_do_not_know_resume_nothing(
    monkeypatch: pytest.MonkeyPatch, package: str, version: str
) -> None:
    known = requirements.minor_version
    monkeypatch.setattr(requirements, "minor_version", lambda name: version if name == package else known(name))
    with pytest.raises(RunFailure, match=f"cannot be resumed with {package} {version}"):
        requirements.require_resume_support()
    monkeypatch.undo()
    requirements.require_resume_support()


@pytest.mark.parametrize("key", ["num_processes", "report_to"])
def test_a_dropped_file_has_no_say_about_the_machine(key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        Recipe().with_overrides({"training": {key: 2 if key == "num_processes" else ["wandb"]}})


def test_4_bits_without_a_gpu_are_refused_in_words(tiny_base: Path, tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(RunFailure, match="load_in_4bit needs"):
        train(specify(tmp_path, rows(8), tiny_base, {**SHORT, "model": {"load_in_4bit": True}}))
