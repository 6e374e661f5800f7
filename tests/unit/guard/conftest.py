"""Model directories with small checkpoints that have the Trainer's form but need no Trainer."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import guard


def make_checkpoint(folder: Path, step: int, *, seed: int = 0) -> Path:
    """Files of a PEFT checkpoint, structurally whole: safetensors header, ZIP archives, trainer state."""
    folder.mkdir(parents=True)
    body = bytes((seed + step + i) % 256 for i in range(64))
    header = json.dumps({"lora.weight": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}}).encode()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + body)
    (folder / "adapter_config.json").write_text(json.dumps({"r": 8, "lora_alpha": 16}))
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        with zipfile.ZipFile(folder / name, "w") as archive:
            archive.writestr("data.pkl", f"{name} {step} {seed}")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": []}))
    return folder


def make_fingerprint(**changes: Any) -> guard.Fingerprint:
    """A fingerprint of a few components; `lora__r=16` changes lora.r."""
    components: dict[str, Any] = {
        "dataset.digest": "a" * 64,
        "dataset.name": "rows.jsonl",
        "lora.r": 8,
        "lora.lora_alpha": 16,
        "training.learning_rate": 1e-4,
        "training.global_batch_size": 8,
        "training.save_steps": 10,
        "model.digest": "b" * 64,
    }
    components.update({name.replace("__", "."): value for name, value in changes.items()})
    return guard.Fingerprint(components)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    return path


@pytest.fixture
def fingerprint(dataset: Path) -> guard.Fingerprint:
    return make_fingerprint(dataset__digest=guard.digest_file(dataset).blake3_hex)


@pytest.fixture
def model_dir(tmp_path: Path, dataset: Path, fingerprint: guard.Fingerprint) -> Path:
    """A run in progress: recorded, with sealed checkpoints at steps 10, 20 and 30."""
    folder = tmp_path / "model"
    with guard.ModelLock(folder, owner="fixture"):
        prepared = guard.prepare_run(
            folder,
            fingerprint=fingerprint,
            dataset_path=dataset,
            lora_config={"r": 8, "alpha": 16, "dropout": 0.0},
        )
        for step in (10, 20, 30):
            staged = make_checkpoint(prepared.staging_dir / f"checkpoint-{step}", step)
            guard.seal_checkpoint(staged, step=step, fingerprint=fingerprint, into=folder / f"checkpoint-{step}")
    return folder


def as_user(uid: int, act: Callable[[], Any]) -> Any:
    """Call `act` as another user, in a forked child, and return its (pickled) result. Needs root."""
    read_fd, write_fd = os.pipe()
    child = os.fork()
    if child == 0:
        answer: Any = None
        try:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
            answer = act()
        except BaseException as error:
            answer = error
        finally:
            os.write(write_fd, pickle.dumps(answer))
            os._exit(0)
    os.close(write_fd)
    with os.fdopen(read_fd, "rb") as pipe:
        result = pickle.loads(pipe.read())
    os.waitpid(child, 0)
    if isinstance(result, BaseException):
        raise result
    return result
