"""A clock that is set a day forward or back under a living daemon and its trainer."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest

from daemon.job import JobState
from tests.support.root import Root, wait_until
from tests.support.sound import assert_sound

SOURCE = Path(__file__).parents[2] / "support" / "clock.c"
DAY = 86_400
TABLES = {
    "training": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "save_steps": 10},
    "queue": {"stall_timeout": 20.0, "job_timeout": 600.0, "retry_seconds": 2.0},
    "inbox": {"settle_seconds": 1.0},
}
pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler to build the clock with")


class Clock:
    """The time of day of one root's processes."""

    def __init__(self, folder: Path) -> None:
        self.library = folder / "clock.so"
        self._offset = folder / "offset"
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", self.library, SOURCE, "-ldl"], check=True)
        self.set(0)

    @property
    def variables(self) -> dict[str, str]:
        return {"LD_PRELOAD": str(self.library), "CLOCK_OFFSET": str(self._offset)}

    def set(self, seconds: int) -> None:
        beside = self._offset.with_suffix(".new")
        beside.write_text(str(seconds))
        beside.rename(self._offset)


@pytest.mark.parametrize("jump", [DAY, -DAY], ids=["a day forward", "a day back"])
def test_nothing_is_fooled_by_a_clock_that_is_set(make_root: Callable[..., Root], tmp_path: Path, jump: int) -> None:
    clock = Clock(tmp_path)
    root = make_root(behaviour={"*": {"step_seconds": 0.02}}, tables=TABLES, variables=clock.variables)
    daemon = root.start()

    # In mid-run: neither stalled nor over its time, and the heartbeat goes on.
    root.drop("a.jsonl", [{"text": f"a {row}"} for row in range(200)])
    running = root.running("a.jsonl", step=10)
    before = root.status()
    assert before
    clock.set(jump)

    def beat_again() -> dict[str, object] | None:
        status = root.status()
        assert status
        told = datetime.fromisoformat(status["timestamp"]) - datetime.fromisoformat(before["timestamp"])
        return status if abs(told.total_seconds()) > DAY / 2 and status["job"]["step"] > before["job"]["step"] else None

    status = wait_until(beat_again, what="a heartbeat after the jump")
    assert status
    assert status["liveness"] == "alive"

    # While a copy is being written: it settles on a clock of its own.
    with (root.settings.inbox_dir / "b.jsonl").open("w") as copy:
        copy.write('{"text": "b 1"}\n')
        copy.flush()
        wait_until(lambda: (now := root.status()) and any(item["file"] == "b.jsonl" for item in now["waiting"]))
        clock.set(0)
        copy.write('{"text": "b 2"}')
    done = root.finished("a.jsonl")
    assert (done.state, done.attempt, done.id) == (JobState.SUCCEEDED, 1, running.id)
    assert not root.events("trainer.asked_to_leave")
    settled = root.finished("b.jsonl")
    assert settled.state is JobState.SUCCEEDED
    assert settled.dataset is not None
    assert settled.dataset.rows == 2

    # In a back-off: it ends in time, or at once, but not a day later.
    root.behave({"1": {"die_at": 1}})
    root.drop("c.jsonl", [{"text": "c"}, {"text": "c 2"}])
    wait_until(lambda: (job := root.job("c.jsonl")) and job.attempt == 1 and job.state is JobState.QUEUED)
    clock.set(jump)
    again = root.finished("c.jsonl", timeout=30)
    assert (again.state, again.attempt) == (JobState.SUCCEEDED, 2)

    # Over a restart with the clock set once more: who is who is told by pid, start time and boot, not by the hour.
    clock.set(-jump)
    assert root.stop() == 0
    root.start()
    root.drop("d.jsonl", [{"text": "d"}])
    assert root.finished("d.jsonl").state is JobState.SUCCEEDED
    assert daemon.returncode == 0
    assert root.stop() == 0
    assert_sound(root)
