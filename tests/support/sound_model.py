"""One check of everything that must hold in a model directory, at any time and after any crash."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import guard
from guard.clear import JOURNAL_NAME, SET_NAME, SET_RECORD
from guard.completeness import _is_whole_safetensors

_TEMPORARY = re.compile(r"\..*\.\d+-\d+\.tmp")
_VERSION = re.compile(r"\d{4,}")


def assert_model_dir_sound(
    model_dir: Path, *, key: bytes | None = None, allow_unsealed: bool = False, settled: bool = True
) -> None:
    """Raise AssertionError for the first thing that is not as it must be.

    `allow_unsealed`: checkpoints of a script that seals in place may lack their seal. `settled`: nothing was
    killed since the last start, so that the lineage and `latest` agree; without it the last of them may be
    one step behind.
    """
    assert model_dir.is_dir(), f"{model_dir} is gone"
    _check_checkpoints(model_dir, key, allow_unsealed)
    _check_metadata(model_dir)
    _check_temporary_files(model_dir)
    _check_cleared(model_dir)
    _check_versions(model_dir, settled)


def _check_checkpoints(model_dir: Path, key: bytes | None, allow_unsealed: bool) -> None:
    allowed = {guard.CheckpointState.INTACT}
    if allow_unsealed:
        allowed |= {guard.CheckpointState.UNSEALED, guard.CheckpointState.TORN}
    for checkpoint in guard.scan_checkpoints(model_dir, key=key, digests=True):
        assert checkpoint.state in allowed, f"{checkpoint.path} is {checkpoint.state}: {checkpoint.reason}"


def _check_metadata(model_dir: Path) -> None:
    reading = guard.read_metadata(model_dir)
    assert reading.kind in (guard.MetadataKind.MISSING, guard.MetadataKind.LEGACY, guard.MetadataKind.CURRENT), (
        reading.reason
    )


def _check_temporary_files(model_dir: Path) -> None:
    """Temporary files live under .staging/, but for the seal of a checkpoint that is being sealed in
    place.
    """
    for path in model_dir.rglob("*.tmp"):
        if not _TEMPORARY.fullmatch(path.name) or "staging" in {part.lstrip(".") for part in path.parts}:
            continue
        if any(part.startswith(".before-restore-") for part in path.parts):
            continue  # moved aside as it was
        assert path.name.startswith(".seal.json."), path
        assert not (path.parent / "seal.json").exists(), path


def _check_cleared(model_dir: Path) -> None:
    root = model_dir / ".cleared"
    if not root.exists():
        return
    for path in root.iterdir():
        if path.name.startswith(".purging-") or path.name in (JOURNAL_NAME, JOURNAL_NAME + ".torn"):
            continue
        assert SET_NAME.fullmatch(path.name), f"{path} is no set"
        content = {entry.name for entry in path.iterdir()}
        if content:  # a set that was just made is empty
            assert SET_RECORD in content, f"{path} does not say what it is"
            assert isinstance(json.loads((path / SET_RECORD).read_bytes()), dict)
    _read_lines(root / JOURNAL_NAME)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Every line that was finished parses; bytes after the last newline are an append that was never
    acknowledged.
    """
    if not path.exists():
        return []
    *finished, _ = path.read_bytes().split(b"\n")
    entries = [json.loads(line) for line in finished]
    assert all(isinstance(entry, dict) for entry in entries), path
    return entries


def _check_versions(model_dir: Path, settled: bool) -> None:
    root = model_dir / "versions"
    versions = {path.name: path for path in root.iterdir() if _VERSION.fullmatch(path.name)} if root.is_dir() else {}
    for name, path in versions.items():
        assert path.is_dir(), path
        assert not path.is_symlink(), path
        assert (path / "adapter_config.json").is_file(), f"version {name} has no adapter_config.json"
        weights = path / "adapter_model.safetensors"
        assert weights.is_file(), f"version {name} has no weights"
        assert _is_whole_safetensors(weights), f"the weights of version {name} are cut short"
    latest = model_dir / "latest"
    current = None
    if latest.is_symlink():
        current = latest.readlink().name
        assert not latest.readlink().is_absolute(), "latest leaves the model directory when it is moved"
        assert current in versions, f"latest names {current}, which is not there"
    else:
        assert not latest.exists(), "latest is not a link"
    for path in model_dir.iterdir():
        if path.is_symlink() and path != latest and not path.name.startswith("checkpoint-"):
            assert path.exists(), f"{path} leads nowhere"
    lineage = [entry for entry in _read_lines(model_dir / "lineage.jsonl") if "version" in entry]
    if settled:
        made_current = [entry["version"] for entry in lineage if entry.get("event") not in ("held", "discarded")]
        assert (made_current[-1] if made_current else None) == current, "lineage and latest disagree"
