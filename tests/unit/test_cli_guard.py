"""`dropforge guard`: the guard's own command, which knows the key and the policy of this root's model directory."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import guard
from tests.support.root import dropforge
from tests.unit.guard.conftest import make_checkpoint, make_fingerprint

KEY = b"k" * 32


def test_it_uses_the_key_and_the_policy_of_its_own_root(tmp_path: Path) -> None:
    guard_command = partial(dropforge, "--root", str(tmp_path), "guard")
    (tmp_path / "key").write_bytes(KEY)
    (tmp_path / "key").chmod(0o600)
    (tmp_path / "dropforge.toml").write_text('[guard]\nkey_file = "key"\nkeep_cleared_sets = 1\n')
    model_dir = tmp_path / "current_model"
    for number in range(3):
        make_checkpoint(model_dir / "checkpoint-5", 5, seed=number)
        guard.clear_checkpoints(model_dir)
    make_checkpoint(model_dir / "checkpoint-5", 5)
    guard.seal_checkpoint(model_dir / "checkpoint-5", step=5, fingerprint=make_fingerprint(), key=KEY)

    verified = guard_command("verify", str(model_dir), "--json")
    assert verified.returncode == 0, verified.stdout
    assert json.loads(verified.stdout)["checkpoints"][0]["state"] == "intact"
    shown = guard_command("purge", os.path.relpath(model_dir), "--dry-run")
    assert (shown.returncode, shown.stdout.count("more than 1 sets")) == (0, 2)
    purged = guard_command("purge", str(model_dir), "--json")
    assert purged.returncode == 0, purged.stdout
    assert len(json.loads(purged.stdout)["sets"]) == 2
    assert len(guard.list_cleared_sets(model_dir)) == 1
    asked = guard_command("--help")
    assert asked.returncode == 0
    assert "usage: dropforge guard" in asked.stdout
    assert "purge" in asked.stdout
