"""The GPU as the driver sees it: which one is ours, how much of its memory is free, who else uses it.

NVML (`nvidia-ml-py`, extra `gpu`) tells without a CUDA context, so that the daemon itself holds no GPU memory. Without the
package, the driver or a GPU, there is nothing to wait for: the trainer then runs on the CPU.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from daemon.errors import ConfigError
from daemon.holds import Hold, HoldKind, human_bytes
from daemon.processes import command_of
from daemon.recipe import Recipe

CONTEXT_BYTES = 600 * 2**20  # what CUDA and its libraries take before the first tensor
ACTIVATIONS_SHARE = (
    0.5  # of the weights; short of measuring, what gradients and activations of a LoRA run took at least
)


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One device at one moment."""

    uuid: str
    name: str
    free_bytes: int
    total_bytes: int
    processes: tuple[int, ...]  # pids that hold memory on it
    utilization: float | None  # 0 to 1; None where the driver does not tell


def devices() -> tuple[Gpu, ...]:
    """Every device of this machine, in the driver's order; empty without the package, the driver or a GPU.

    Waits for the driver, and one in trouble may never answer: `GpuProbe` asks for whoever must not wait.
    """
    try:
        import pynvml
    except ImportError:
        return ()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        return tuple(_read(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount()))
    except pynvml.NVMLError:
        return ()  # a driver that fell over; the trainer will say what it thinks of it
    finally:
        pynvml.nvmlShutdown()


def choose(found: Sequence[Gpu], device: str) -> Gpu | None:
    """The device that `[gpu] device` names: an index, a UUID, or with "auto" the one with most free memory.

    None when there is none to see, or `device` is "none". Raises ConfigError when a named device is not there: a run on
    the CPU, or on another GPU, is not what was asked for.
    """
    if device == "none":
        return None
    if device == "auto":
        return max(found, key=lambda gpu: gpu.free_bytes, default=None)
    for index, gpu in enumerate(found):
        if device in (str(index), gpu.uuid):
            return gpu
    raise ConfigError(
        operation="use",
        subject=f"[gpu] device = {device!r}",
        cause="there is no such GPU",
        hint=f"there are {', '.join(gpu.uuid for gpu in found)}"
        if found
        else "none can be seen: is the driver loaded, and the extra installed (pip install 'dropforge[gpu]')?",
    )


def memory_hold(gpu: Gpu, recipe: Recipe, *, min_free_bytes: int, own: frozenset[int]) -> Hold | None:
    """Why a run would not fit beside what others hold; None when it fits. `own` are pids of ours."""
    needed = min_free_bytes or bytes_needed(recipe)
    if gpu.free_bytes >= needed:
        return None
    others = [f"pid {pid} ({command_of(pid)})" for pid in gpu.processes if pid not in own]
    by = f", in use by {', '.join(others[:5])}" if others else ""
    return Hold(
        kind=HoldKind.GPU,
        reason=f"{gpu.name} has {human_bytes(gpu.free_bytes)} free, a run needs {human_bytes(needed)}{by}",
    )


def bytes_needed(recipe: Recipe) -> int:
    """What a run takes at least: the base weights as they lie on the disk, their activations, CUDA itself."""
    weights = 0
    folder = Path(recipe.model.model_name_or_path)
    if folder.is_dir():
        weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        if _stored_as_float32(folder) and recipe.model.dtype in ("auto", "bfloat16"):
            weights //= 2
    return CONTEXT_BYTES + int(weights * (1 + ACTIVATIONS_SHARE))


def _stored_as_float32(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and (config.get("dtype") or config.get("torch_dtype")) == "float32"


def _read(nvml: Any, index: int) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    try:
        utilization = int(nvml.nvmlDeviceGetUtilizationRates(handle).gpu) / 100
    except nvml.NVMLError:  # a slice of a device does not know
        utilization = None
    return Gpu(
        uuid=str(nvml.nvmlDeviceGetUUID(handle)),
        name=str(nvml.nvmlDeviceGetName(handle)),
        free_bytes=int(memory.free),
        total_bytes=int(memory.total),
        processes=tuple(int(process.pid) for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle)),
        utilization=utilization,
    )
