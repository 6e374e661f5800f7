"""Two processes train one model: each writes its part of a checkpoint, one of them seals it, after both
are done.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from tests.fault.guard.tiny import save_base_model, write_rows
from tests.support.sound_model import assert_model_dir_sound


def test_the_seal_covers_the_parts_of_both(tmp_path: Path) -> None:
    save_base_model(tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl", 16)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "tests.fault.guard.two_processes", str(tmp_path)]
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        assert (tmp_path / f"rank-{rank}").read_text() == "fresh [1, 2, 3, 4]\nresume [3, 4]\n"
    newest = tmp_path / "model" / "checkpoint-4"
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in newest.iterdir()}
    assert_model_dir_sound(tmp_path / "model")
