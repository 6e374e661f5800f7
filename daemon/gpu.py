"""The GPU: which one is ours, how much of its memory is free, who uses it, and the lock that daemons share.

NVML (`nvidia-ml-py`, extra `gpu`) answers without a CUDA context, so that the daemon itself holds no GPU memory. Without the
package, the driver or a GPU there is nothing to wait for: the trainer then runs on the CPU.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from daemon.config import GpuSettings, Settings
from daemon.errors import ConfigError
from daemon.holds import Hold, HoldKind
from daemon.job import utc_now
from daemon.processes import command_of
from daemon.recipe import Recipe
from daemon.text import escape, format_bytes
from guard.atomic import write_all
from guard.json_text import parse_json

CONTEXT_BYTES = 600 * 2**20  # what CUDA and its libraries take before the first tensor
# Of the weights: the least that gradients and activations of a LoRA run took where it was measured.
ACTIVATIONS_SHARE = 0.5
CPU_HINT = 'or set device = "none" under [gpu] to train on the CPU'
QUERY_SECONDS = 10.0  # how old the last answer may be
# Made by the line below, from `dropforge service install`; where it is not, /run/lock, which some systems open to all.
SHARED_LOCKS, PLAIN_LOCKS = Path("/run/dropforge"), Path("/run/lock")
TMPFILES_LINE = f"d {SHARED_LOCKS} 1777 root root -"
LOCK_NAMES = 8  # a name that somebody closed to others is passed over
DEVICES = Path("/dev")
TIMEOUT_SECONDS = 5.0  # how long a launch waits for the driver


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One device at one moment."""

    uuid: str
    name: str
    free_bytes: int
    total_bytes: int
    processes: tuple[int, ...]  # pids that hold memory on it
    utilization: float | None  # 0 to 1; None where the driver does not know
    celsius: float | None = None  # likewise


class GpuUnavailable(Exception):
    """The driver is there, but shows no GPU that works; the message is a sentence."""


class GpuTimeout(GpuUnavailable):
    """The driver has not answered in time."""


def devices() -> tuple[Gpu, ...]:
    """Return every device of this machine, in the driver's order; empty without the package, the driver or a GPU.

    Waits for the driver, and one in trouble may never answer: use `GpuProbe` where waiting is no option. A device that is
    lost is left out while there are others; raises GpuUnavailable when there are none, or when the driver does not work
    although the machine has the device nodes of an NVIDIA GPU.
    """
    try:
        import pynvml
    except ImportError:
        return ()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        if node := next(iter(sorted(DEVICES.glob("nvidia[0-9]*"))), None):
            raise GpuUnavailable(f"this machine has a GPU ({node}), but its driver does not work: {error}") from error
        return ()
    gpus: list[Gpu] = []
    failure = None
    try:
        for index in range(pynvml.nvmlDeviceGetCount()):
            try:
                gpus.append(_read(pynvml, index))
            except pynvml.NVMLError as error:
                failure = error
    except pynvml.NVMLError as error:
        failure = error
    finally:
        pynvml.nvmlShutdown()
    if failure is not None and not gpus:
        raise GpuUnavailable(f"the GPU's driver reports: {failure}")
    return tuple(gpus)


def choose(gpus: Sequence[Gpu], device: str) -> Gpu | None:
    """Return the device that `[gpu] device` names: an index, a UUID, or with "auto" the one with most free memory.

    None when there is none to see, or `device` is "none". Raises ConfigError when a named device is not there: a run on
    the CPU, or on another GPU, is not what was asked for.
    """
    if device == "none":
        return None
    if device == "auto":
        return max(gpus, key=lambda gpu: gpu.free_bytes, default=None)
    for index, gpu in enumerate(gpus):
        if device in (str(index), gpu.uuid):
            return gpu
    raise ConfigError(
        operation="use",
        subject=f"[gpu] device = {device!r}",
        cause="there is no such GPU",
        hint=f"there are {', '.join(gpu.uuid for gpu in gpus)}"
        if gpus
        else "none is visible: is the driver loaded, and the extra installed (pip install 'dropforge[gpu]')?",
    )


def memory_hold(gpu: Gpu, recipe: Recipe, *, min_free_bytes: int, own: frozenset[int]) -> Hold | None:
    """Return the hold of a GPU without room for a run, None when it fits. `own`: pids of ours."""
    needed = min_free_bytes or bytes_needed(recipe)
    if gpu.free_bytes >= needed:
        return None
    others = [f"pid {pid} ({command_of(pid)})" for pid in gpu.processes if pid not in own]
    by = f", in use by {', '.join(others[:5])}" if others else ""
    return Hold(
        kind=HoldKind.GPU,
        reason=f"{gpu.name} has {format_bytes(gpu.free_bytes)} free, a run needs {format_bytes(needed)}{by}",
    )


def bytes_needed(recipe: Recipe) -> int:
    """Return what a run takes at least: the base weights as stored, their activations, CUDA itself."""
    weights = 0
    folder = Path(recipe.model.model_name_or_path)
    if folder.is_dir():
        weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        if _stored_as_float32(folder) and recipe.model.dtype in ("auto", "bfloat16"):
            weights //= 2
    return CONTEXT_BYTES + int(weights * (1 + ACTIVATIONS_SHARE))


def _stored_as_float32(folder: Path) -> bool:
    try:
        config = parse_json((folder / "config.json").read_bytes())
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
        celsius=_celsius(nvml, handle),
    )


def _celsius(nvml: Any, handle: Any) -> float | None:
    """How hot a device is; None where the driver does not know."""
    for function in (nvml.nvmlDeviceGetTemperatureV, nvml.nvmlDeviceGetTemperature):  # of new drivers, of older ones
        with suppress(nvml.NVMLError):
            return float(function(handle, nvml.NVML_TEMPERATURE_GPU))
    return None


class GpuProbe:
    """Asks the driver in a thread: one in trouble may never answer, and the daemon goes on. One thread calls everything."""

    def __init__(self, query: Callable[[], tuple[Gpu, ...]] = devices) -> None:
        self._query = query
        self._known: tuple[Gpu, ...] = ()
        self._failure = ""  # of the last query, as a sentence
        self._queried_at = float("-inf")
        self._thread: threading.Thread | None = None

    def known(self) -> tuple[Gpu, ...]:
        """Return the devices of the last answer; never waits, asks again when that is old."""
        if time.monotonic() - self._queried_at >= QUERY_SECONDS:
            self._start()
        return self._known

    def fresh(self) -> tuple[Gpu, ...]:
        """Return the devices as they are now, waiting at most TIMEOUT_SECONDS, and only once for one query.

        Raises GpuUnavailable.
        """
        thread = self._start()
        thread.join(max(0.0, self._queried_at + TIMEOUT_SECONDS - time.monotonic()))
        if thread.is_alive():
            raise GpuTimeout("the GPU's driver does not answer")
        if self._failure:
            raise GpuUnavailable(self._failure)
        return self._known

    def _start(self) -> threading.Thread:
        """Start a query, unless the driver still owes the answer to the last one."""
        if self._thread is None or not self._thread.is_alive():
            self._queried_at = time.monotonic()
            self._thread = threading.Thread(target=self._run, name="gpu", daemon=True)
            self._thread.start()
        return self._thread

    def _run(self) -> None:
        try:
            self._known, self._failure = self._query(), ""
        except GpuUnavailable as error:
            self._known, self._failure = (), str(error)


class GpuLock:
    """One training at a time among several daemons of one machine: a lock file that they share.

    It is a flock(2) on an open file that the trainer inherits: it lasts as long as either of the two lives, so that a
    trainer that outlives its daemon still keeps the others away, and nothing has to be cleaned up after a crash. Every
    account can use the file, whoever made it: a lock takes no more than a file that can be read. Without a path it is not
    shared, and always ours.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._fd: int | None = None

    @property
    def descriptors(self) -> tuple[int, ...]:
        """What a trainer has to inherit."""
        return () if self._fd is None else (self._fd,)

    def acquire(self, owner: str) -> str:
        """Try to take it for `owner`, a text that the others show; returns why not, empty when it is ours.

        Raises OSError when there is no file that all can use, and none can be made.
        """
        if self.path is None or self._fd is not None:
            return ""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fd = _open_for_all(self.path)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(fd)
            os.close(fd)
            return f"the GPU is in use by {holder}"
        # Only for people: on a full disk, or in a file that we can only read, the lock holds all the same.
        with suppress(OSError):
            os.ftruncate(fd, 0)
            write_all(fd, json.dumps({"owner": owner, "since": utc_now()}).encode())
        self._fd = fd
        return ""

    def release(self) -> None:
        """Let go; a trainer that inherited it keeps it until it ends."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _open_for_all(path: Path) -> int:
    """Open the lock file, making it where it is missing. Raises OSError.

    One that is not open to everybody, or no file at all, would keep all accounts but its maker's away: its name is passed
    over, and since everybody sees its mode, everybody agrees on the next one.
    """
    for number in range(LOCK_NAMES):
        name = path if number == 0 else path.with_name(f"{path.stem}-{number}{path.suffix}")
        try:
            return _make_for_all(name)
        except FileExistsError:
            mode = name.lstat().st_mode
        if not stat.S_ISREG(mode) or mode & 0o444 != 0o444:
            continue
        flags = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            return os.open(name, os.O_RDWR | flags)
        except PermissionError:
            return os.open(name, os.O_RDONLY | flags)
    raise PermissionError(errno.EACCES, f"{LOCK_NAMES} names are taken by files that are closed to others", str(path))


def _make_for_all(path: Path) -> int:
    """Make a file that everybody may write to, from its first moment on. Raises FileExistsError, OSError."""
    umask = os.umask(0)
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    finally:
        os.umask(umask)


def _holder(fd: int) -> str:
    try:
        content = parse_json(os.pread(fd, 4096, 0))
        return f"{escape(str(content['owner']))} since {escape(str(content['since']))}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another daemon"


def _lock_path(configured: GpuSettings, device: Gpu | None) -> Path | None:
    """Return the lock file that daemons of this machine share for a device.

    Without one that can be seen (no GPU, or one without NVML) they share a lock where an administrator made a folder for it.
    """
    shared = configured.lock_dir or (SHARED_LOCKS if SHARED_LOCKS.is_dir() else None)
    if device is not None:
        return (shared or PLAIN_LOCKS) / f"dropforge-{device.uuid}.lock"
    return shared / "dropforge-machine.lock" if shared and configured.device != "none" else None


class GpuReservation:
    """The GPU of the next launch: chosen, with room for the run, locked against other daemons."""

    def __init__(self, settings: Settings, probe: GpuProbe) -> None:
        configured = settings.executor.gpu_lock
        self.lock = GpuLock(settings.root / configured if configured else None)
        self.device: Gpu | None = None
        self._follows_device = configured is None  # the lock file is that of the chosen device
        self._probe = probe
        self._had_gpu = False  # a run on the CPU is then not what is expected, and its precision would be another

    def reserve(self, settings: Settings, recipe: Recipe) -> Hold | None:
        """Choose the GPU and lock it; returns what to wait for instead. Without a GPU only the lock counts."""
        configured = settings.gpu
        try:
            self.device = choose(() if configured.device == "none" else self._probe.fresh(), configured.device)
        except ConfigError as error:  # it was there when the daemon started
            return Hold(kind=HoldKind.GPU, reason=error.sentence)
        except GpuUnavailable as error:
            return Hold(kind=HoldKind.GPU, reason=f"{error}; waits until it works, {CPU_HINT}")
        if self.device is None and self._had_gpu and configured.device != "none":
            return Hold(
                kind=HoldKind.GPU, reason=f"the GPU of earlier runs cannot be seen; waits until it can, {CPU_HINT}"
            )
        if self.device is not None:
            self._had_gpu = True
            own = frozenset({os.getpid()})
            hold = memory_hold(self.device, recipe, min_free_bytes=configured.min_free_bytes, own=own)
            if hold is not None:
                return hold
        if self._follows_device and not self.lock.descriptors:
            self.lock.path = _lock_path(configured, self.device)
        try:
            in_use = self.lock.acquire(f"the daemon of {settings.root}")
        except OSError as error:
            in_use = (
                f"the GPU lock {self.lock.path} cannot be used: {(error.strerror or str(error)).lower()}; an administrator makes"
                f" a folder for it by the line `{TMPFILES_LINE}` in /etc/tmpfiles.d/dropforge.conf and `systemd-tmpfiles"
                " --create`, or lock_dir under [gpu] names one that every account of this GPU may write to"
            )
        return Hold(kind=HoldKind.GPU, reason=in_use) if in_use else None

    def release(self) -> None:
        """Let go of the lock."""
        self.lock.release()
