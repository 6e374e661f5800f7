"""Fixtures that every kind of test shares."""

from __future__ import annotations

import os
import random
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from daemon.trainer.bootstrap import collector_paused
from tests.support.root import Root

# A shell that starts tests in the background has them ignore SIGINT, and every process that they start as well.
signal.signal(signal.SIGINT, signal.default_int_handler)

# On a machine that does other things as well, other tests among them, torch's threads wait for each other: six times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")


# A job's life is a hundred fsyncs, of milliseconds each on a disk; what has to survive a cut of the power has disks of its own.
MEMORY_DISK, MEMORY_DISK_FREE_BYTES = Path("/dev/shm"), 8 * 2**30


def has_memory_disk() -> bool:
    """Whether there is a file system in memory, with room for every root of the tests, where programs can be started."""
    try:
        found = os.statvfs(MEMORY_DISK)
    except OSError:
        return False
    free = found.f_bavail * found.f_frsize
    return free >= MEMORY_DISK_FREE_BYTES and not found.f_flag & os.ST_NOEXEC and os.access(MEMORY_DISK, os.W_OK)


if has_memory_disk():
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY_DISK))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=20, help="how many processes the random test kills")
    parser.addoption("--real-trainer", action="store_true", help="the random test trains for real")
    parser.addoption("--seed", type=int, default=random.randrange(2**32), help="of the random test")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Twice as many workers as cores: tests of processes wait most of the time, for each other's ticks and ends."""
    return 2 * len(os.sched_getaffinity(0))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Import the tests without garbage collection: what they import stays, and is never looked at again."""
    with collector_paused():
        return (yield)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What has a time limit of its own takes long: it begins first, so that no worker is left alone with it."""
    items.sort(key=lambda item: item.get_closest_marker("timeout") is None)


@pytest.fixture
def make_root(tmp_path: Path) -> Iterator[Callable[..., Root]]:
    """Make roots; whatever still runs in them is ended afterwards."""
    made: list[Root] = []

    def make(name: str = "root", **options: Any) -> Root:
        made.append(Root(tmp_path / name, **options))
        return made[-1]

    yield make
    for root in made:
        root.close()


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model small enough for many runs: about 400,000 parameters, the product's own recipe."""
    from daemon.cli.init import examples_dir
    from daemon.trainer.tiny_model import TinyShape, build_tiny

    folder = tmp_path_factory.mktemp("base") / "tiny"
    shape = TinyShape(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    build_tiny(folder, [examples_dir() / "gsm8k_more_messages.jsonl"], shape=shape)
    return folder


@pytest.fixture
def open_tmp_path() -> Iterator[Path]:
    """A temporary folder that every user can enter; pytest's own are closed to others."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)
