"""Is a checkpoint without a seal whole? A cheap look at its form; nothing is unpickled.

This tells a checkpoint of a plain script (UNSEALED) from one that a crash cut short (TORN). It proves nothing
about the content: only a seal does.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

from .json_text import parse_json

_WEIGHTS = (
    "adapter_model.safetensors",
    "model.safetensors",
    "model.safetensors.index.json",
    "adapter_model.bin",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "pytorch_model_fsdp.bin",
)
# What the Trainer and peft write with these endings always holds something; a vocabulary may well be empty.
_NEVER_EMPTY = (".safetensors", ".pt", ".pth", ".bin", ".json")
_ZIP_END = b"PK\x05\x06"
_ZIP_END_SEARCH_BYTES = 65_536 + 22  # the end record may be followed by a comment
_MAX_STATE_BYTES = 256 * 1024 * 1024


def why_incomplete(folder: Path, *, step: int | None = None) -> str | None:
    """Return what is missing for the Trainer to resume from `folder`, or None.

    Raises OSError.
    """
    files = {entry.name: entry for entry in folder.iterdir()}
    if "trainer_state.json" not in files:
        return "trainer_state.json is missing"
    recorded = recorded_step(folder)
    if recorded is None:
        return "trainer_state.json cannot be read"
    if step is not None and recorded != step:
        return f"trainer_state.json is of step {recorded}"
    sharded = any(
        path.is_dir() and name.startswith(("pytorch_model_fsdp", "global_step")) for name, path in files.items()
    )
    adapters = any(path.is_dir() and (path / "adapter_config.json").is_file() for path in files.values())
    if not sharded and not adapters and not any(name in files for name in _WEIGHTS):
        return "it holds no weights"
    # Without either of these the Trainer drops both, in silence, and the learning rate jumps back to its
    # peak.
    if not sharded and not any(name.startswith("optimizer") for name in files):
        return "optimizer.pt is missing"
    if "scheduler.pt" not in files:
        return "scheduler.pt is missing"
    for name, path in sorted(files.items()):
        if not path.is_file() or path.suffix not in _NEVER_EMPTY:
            continue
        if path.stat().st_size == 0:
            return f"{name} is empty"
        if name.endswith(".safetensors") and not _is_whole_safetensors(path):
            return f"{name} is cut short"
        if name in ("optimizer.pt", "scheduler.pt") and not _is_whole_archive(path):
            return f"{name} is cut short"
    return None


def recorded_step(folder: Path) -> int | None:
    """`global_step` of trainer_state.json; None when it cannot be told."""
    path = folder / "trainer_state.json"
    try:
        if path.stat().st_size > _MAX_STATE_BYTES:
            return None
        step = parse_json(path.read_bytes())["global_step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) and not isinstance(step, bool) else None


def _is_whole_safetensors(path: Path) -> bool:
    """An 8-byte length, a JSON header of that length, and as many bytes as its last tensor ends at."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            return False
        (header_bytes,) = struct.unpack("<Q", start)
        if header_bytes > size - 8:
            return False
        try:
            header = parse_json(file.read(header_bytes))
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            return False
    return bool(size == 8 + header_bytes + max(ends, default=0))


def _is_whole_archive(path: Path) -> bool:
    """torch.save writes a ZIP archive, whose directory comes last; files of old torch are plain pickles."""
    with path.open("rb") as file:
        start = file.read(4)
        if not start.startswith(b"PK"):
            return True
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _ZIP_END_SEARCH_BYTES))
        return _ZIP_END in file.read()
