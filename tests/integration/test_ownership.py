"""Root, by mistake, on the root of a service's own account."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from daemon.job import JobState
from tests.support.root import Root, wait_until

SERVICE = 4001
TABLES = {"training": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "save_steps": 2}}
pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None, reason="acting as other accounts takes root and setpriv"
)


@pytest.fixture
def service_root(open_tmp_path: Path) -> Iterator[Root]:
    """A root of another account, whose daemon runs as that."""
    # It may read everything, as this interpreter may lie where others cannot go, and write only what is its own.
    caps = ("--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search")
    become = ("setpriv", "--reuid", str(SERVICE), "--regid", str(SERVICE), "--clear-groups", *caps)
    root = Root(open_tmp_path / "forge", behaviour={}, tables=TABLES, through=become)
    (root.path / "daemon.err").touch()
    give(root.path)
    yield root
    root.close()


def give(folder: Path, uid: int = SERVICE) -> None:
    for path in (folder, *folder.rglob("*")):
        os.chown(path, uid, uid, follow_symlinks=False)


def drop(root: Root, name: str) -> None:
    give(root.drop(name, [{"text": f"{name} {number}"} for number in range(3)]))


WRITERS = ["run --once", "pause", "resume", "cancel x", "retry x", "rollback 1", "adopt", "guard clear current_model"]
READERS = ["status", "jobs", "versions", "guard check", "logs", "doctor --json"]


def test_root_is_refused_where_it_would_write_and_told_how_to_do_it(service_root: Root) -> None:
    root = service_root
    root.start()
    drop(root, "a.jsonl")
    assert root.finished("a.jsonl").state is JobState.SUCCEEDED
    assert root.stop() == 0
    for command in WRITERS:
        done = root.run(*command.split())
        assert done.returncode == 2, (command, done)
        assert f"it belongs to user {SERVICE}" in done.stderr
        assert f"sudo -u '#{SERVICE}' dropforge" in done.stderr
    for command in READERS:
        assert "belongs to user" not in root.run(*command.split()).stderr, command
    foreign = [path for path in root.path.rglob("*") if path.lstat().st_uid != SERVICE]
    assert [path.name for path in foreign if not path.name.endswith(".err")] == []


def test_a_checkpoint_that_root_left_holds_the_queue_and_no_job_fails_of_it(service_root: Root) -> None:
    root = service_root
    root.start()
    drop(root, "a.jsonl")
    assert root.finished("a.jsonl").state is JobState.SUCCEEDED
    newest = max(root.settings.model_dir.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
    give(newest, uid=0)
    newest.chmod(0o755)
    drop(root, "b.jsonl")
    status = wait_until(lambda: (now := root.status()) and str(newest) in now["reason"] and now)
    assert status
    assert status["status"] == "waiting"
    assert "belongs to root" in status["reason"]
    findings = {one["name"]: one for one in json.loads(root.run("doctor", "--json").stdout)}
    assert findings["ownership"]["verdict"] == "fail"
    assert str(newest) in findings["ownership"]["told"]
    give(newest)
    done = root.finished("b.jsonl")
    assert (done.state, done.attempt) == (JobState.SUCCEEDED, 1)
    assert root.stop() == 0


def test_a_run_directory_that_root_left_holds_its_job(service_root: Root, make_root: Callable[..., Root]) -> None:
    root = service_root
    root.start()
    assert root.run("status").returncode == 0
    runs = root.settings.state_dir / "runs"
    runs.mkdir(exist_ok=True)
    give(runs, uid=0)
    drop(root, "a.jsonl")
    status = wait_until(lambda: (now := root.status()) and str(runs) in now["reason"] and now)
    assert status
    give(runs)
    assert root.finished("a.jsonl").attempt == 1
    assert root.stop() == 0
