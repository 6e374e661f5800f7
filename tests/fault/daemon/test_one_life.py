"""SIGKILL at every COMMIT of the store and every rename in one job's life: enumerated, not sampled."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from daemon.job import JobState
from daemon.versions import list_versions
from tests.support.root import Root, environment, wait_until
from tests.support.sound import assert_sound

LIFE = Path(__file__).parents[2] / "support" / "life.py"
TABLES = {
    "training": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "save_steps": 2},
    "queue": {"retry_seconds": 0.0},
}


def live(root: Root, kill_at: int = 0) -> tuple[int, list[str]]:
    """One life of the daemon; its exit code and the points that it passed."""
    done = subprocess.run(
        [sys.executable, "-P", str(LIFE), str(root.path), str(kill_at)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, (root.path / "points.txt").read_text().splitlines()


def no_trainer(root: Root) -> bool:
    return not any(root.trainer_alive(folder) for folder in (root.settings.state_dir / "runs").glob("*"))


def test_a_job_survives_the_daemons_death_at_each_point_of_its_life(make_root: Callable[..., Root]) -> None:
    """After each death the next daemon ends the job right, once: one version, its steps run, its file in one place."""

    def prepared(name: str) -> Root:
        root = make_root(name, behaviour={}, tables=TABLES)
        root.drop("a.jsonl", [{"text": f"row {number}"} for number in range(4)])
        return root

    code, points = live(prepared("whole"))
    assert code == 0, points
    assert len(points) > 20
    for number in range(1, len(points) + 1):
        root = prepared(f"killed-at-{number}")
        code, passed = live(root, number)
        where = f"killed at {passed[-1]} of {len(points)}"
        assert code == -9, where
        wait_until(partial(no_trainer, root), what=f"the trainer to follow its daemon, {where}")
        code, _ = live(root)
        assert code == 0, f"{where}: {root.errors()}"
        jobs = root.jobs()
        assert [job.state for job in jobs] == [JobState.SUCCEEDED], where
        assert jobs[0].result is not None
        assert jobs[0].result.steps_run == jobs[0].result.steps_planned == 4, where
        assert [version.name for version in list_versions(root.settings.model_dir)] == ["0001"], where
        assert not (root.settings.inbox_dir / "a.jsonl").exists(), where
        assert_sound(root)
