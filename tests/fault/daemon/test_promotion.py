"""SIGKILL between every two calls of a promotion that change the disk."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import guard
from daemon import versions
from tests.fault.daemon import scenarios
from tests.support.killpoints import killed_runs
from tests.support.sound_model import assert_model_dir_sound
from tests.unit.guard.conftest import make_checkpoint, make_fingerprint

SECOND = make_fingerprint(dataset__digest="c" * 64)


def whole(tensor: bytes) -> bytes:
    """A safetensors file of one tensor."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [len(tensor)], "data_offsets": [0, len(tensor)]}}).encode()
    return struct.pack("<Q", len(header)) + header + tensor


def candidate(model_dir: Path, name: str, weights: bytes) -> Path:
    folder = model_dir / ".staging" / name
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"weights": weights.decode()}))
    (folder / "adapter_model.safetensors").write_bytes(whole(weights))
    return folder


def test_a_reader_always_meets_one_whole_adapter_and_the_next_call_finishes(tmp_path: Path) -> None:
    """The old adapter or the new one, never parts of both, and never none."""
    template = tmp_path / "template"
    template.mkdir()
    rows = template / "rows.jsonl"
    rows.write_text('{"text": "one"}\n')
    model_dir = template / "model"
    with guard.ModelLock(model_dir, owner="test"):
        guard.prepare_run(model_dir, fingerprint=make_fingerprint(), dataset_path=rows, lora_config={})
        versions.promote(model_dir, candidate(model_dir, "candidate-a", b"old"), job_id="a", record={"rows": 1})
        # The run whose promotion is cut off, with its last checkpoint still there.
        guard.prepare_run(model_dir, fingerprint=SECOND, dataset_path=rows, lora_config={})
        make_checkpoint(model_dir / "checkpoint-2", 2)
        guard.seal_checkpoint(model_dir / "checkpoint-2", step=2, fingerprint=SECOND)
    candidate(model_dir, "candidate-b", b"new")

    def prepare(root: Path) -> dict[str, Any]:
        shutil.copytree(template, root, dirs_exist_ok=True, symlinks=True)
        return {"model_dir": str(root / "model")}

    seen = set()
    for run in killed_runs("tests.fault.daemon.scenarios:promote", prepare, tmp_path / "runs"):
        folder = run.root / "model"
        weights = (folder / "adapter_model.safetensors").read_bytes()
        config = json.loads((folder / "adapter_config.json").read_text())
        assert weights == whole(config["weights"].encode()), str(run)
        seen.add(weights)
        scenarios.promote(str(folder))
        assert (folder / "adapter_model.safetensors").read_bytes() == whole(b"new"), str(run)
        assert [version.name for version in versions.list_versions(folder)] == ["0001", "0002"], str(run)
        lineage = [json.loads(line) for line in (folder / "lineage.jsonl").read_text().splitlines()]
        assert [line["version"] for line in lineage] == ["0001", "0002"], str(run)
        assert guard.read_metadata(folder).run.finished == "0002", str(run)  # type: ignore[union-attr]
        assert_model_dir_sound(folder)
        # The next run over the same rows continues the new version from step 0, not the finished run from its end.
        with guard.ModelLock(folder, owner="the next run"):
            again = guard.prepare_run(folder, fingerprint=SECOND, dataset_path=run.root / "rows.jsonl", lora_config={})
        assert again.resume_from is None, str(run)
        assert "finished as version 0002" in again.verdict.reasons[0], str(run)
        assert list(folder.glob(".cleared/*/checkpoint-2")), str(run)
        assert (folder / "adapter_model.safetensors").read_bytes() == whole(b"new"), str(run)
        assert_model_dir_sound(folder)
    assert seen == {whole(b"old"), whole(b"new")}
