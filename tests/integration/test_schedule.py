"""The hours of jobs, with the real daemon: one that runs is sealed at their end and goes on in the next window."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from daemon import logins
from daemon.config import Settings
from daemon.gpu import GpuProbe
from daemon.job import JobState
from daemon.run_window import RunWindow
from tests.support.root import Root, wait_until
from tests.support.sound import assert_sound


def window(*, begins_hours: int) -> str:
    """An hour of the day that begins so many hours from now."""
    begin = datetime.now() + timedelta(hours=begins_hours)
    return f"{begin:%H:%M}-{begin + timedelta(hours=1):%H:%M}"


def test_a_job_seals_a_checkpoint_at_the_end_of_its_hours_and_goes_on_in_the_next(
    make_root: Callable[..., Root],
) -> None:
    later = window(begins_hours=5)
    steps = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "save_steps": 4}
    tables = {"schedule": {"at_end": "seal", "hours": [later]}, "training": steps}
    root = make_root(behaviour={"1": {"step_seconds": 0.5}}, tables=tables)
    root.start()
    root.drop("a.jsonl", [{"text": f"row {number}"} for number in range(60)])
    status = wait_until(lambda: (now := root.status()) and later in now["reason"] and now)
    assert status
    assert (status["status"], root.jobs()[0].attempt) == ("waiting", 0)
    root.configure(schedule={"hours": []})
    os.kill(root.start_pid, signal.SIGHUP)
    root.running("a.jsonl", step=1)
    root.behave({})
    root.configure(schedule={"hours": [later]})
    os.kill(root.start_pid, signal.SIGHUP)
    wait_until(lambda: (now := root.status()) and later in now["reason"], what="the window's end")
    sealed = root.job("a.jsonl")
    assert sealed is not None
    assert sealed.max_step > 0
    assert "it goes on in the next window" in sealed.reason
    root.configure(schedule={"hours": []})
    os.kill(root.start_pid, signal.SIGHUP)
    job = root.finished("a.jsonl")
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 1)
    root.stop()
    assert_sound(root)


@pytest.mark.parametrize("sessions", [["ada", "ben"], OSError("nobody answers")])
def test_a_machine_that_somebody_uses_or_that_does_not_tell_is_left_alone(
    tmp_path: Path, sessions: Sequence[str] | OSError
) -> None:
    def asked() -> Sequence[str]:
        if isinstance(sessions, OSError):
            raise sessions
        return sessions

    settings = Settings.model_validate({"root": tmp_path, "schedule": {"nobody_logged_in": True, "at_end": "seal"}})
    looked = RunWindow(GpuProbe(lambda: ()), sessions=asked)
    hold = looked.hold(settings)
    assert hold is not None
    assert hold.reason.startswith("nobody answers" if isinstance(sessions, OSError) else "ada, ben is logged in")
    assert looked.stop(settings) is not None
    assert RunWindow(GpuProbe(lambda: ()), sessions=list).hold(settings) is None


def test_who_is_logged_in_is_asked_of_the_login_manager() -> None:
    """With its library, the answer is a list of names or one sentence; never a crash."""
    try:
        ctypes.CDLL(logins.LIBRARY)
    except OSError:
        pytest.skip(f"{logins.LIBRARY} is not installed")
    try:
        told: list[str] = logins.logged_in()
    except OSError as error:
        told = [str(error)]
    assert all(isinstance(text, str) and text for text in told)
