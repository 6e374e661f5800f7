"""Root, by mistake, on the root of a service's own account."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from daemon.cli import doctor
from daemon.job import JobState
from tests.support.root import Root, environment, fork_server, wait_until

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
    findings = {one["name"]: one for one in json.loads(root.run("doctor", "--json").stdout)["findings"]}
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


DROPPER = 4002
REFUSED = ("run", "run --once", "pause", "resume", "cancel last", "retry last", "move last --first", "rollback 1", "adopt",
           "memory forget a.jsonl", "guard clear current_model", "backup forge.tar")  # fmt: skip
ALLOWED = ("status", "jobs", "show last", "versions", "logs", "logs last", "memory", "config check", "check {bad}",
           "submit {file} --no-check")  # fmt: skip


def as_dropper(root: Root, command: str) -> subprocess.CompletedProcess[str]:
    """A command as a member of the service's group, which reads the root and writes to its inbox alone."""
    caps = ("--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search")
    server = fork_server(("setpriv", "--reuid", str(DROPPER), "--regid", str(DROPPER), "--groups", str(SERVICE), *caps))
    return server.run(["--root", str(root.path), *command.split()], env=environment(), timeout=120)


def test_a_dropper_reads_and_drops_and_is_told_who_may_do_the_rest(service_root: Root) -> None:
    """With the daemon at work and with none: no command ends in SQLite's words, nor proposes to take the root over."""
    root = service_root
    root.settings.inbox_dir.chmod(0o3770)
    file = root.path.parent / "mine.jsonl"
    file.write_text('{"text": "mine"}\n')
    bad = file.with_name("bad.jsonl")  # its tokens are not counted, for which libraries would be loaded
    bad.write_text("{")
    root.start()
    drop(root, "a.jsonl")
    assert root.finished("a.jsonl").state is JobState.SUCCEEDED
    for is_running in (True, False):
        if not is_running:
            assert root.stop() == 0
        for command in ALLOWED:
            done = as_dropper(root, command.format(file=file, bad=bad))
            assert done.returncode == (3 if "{bad}" in command else 0), (command, done)
            assert "chown" not in done.stdout, done
        for command in REFUSED if is_running else ("pause",):
            done = as_dropper(root, command)
            assert done.returncode == 2, (command, done)
            assert (
                f"it belongs to user {SERVICE}, and user {DROPPER} may read and drop files, and no more" in done.stderr
            )
            assert f"`sudo -u '#{SERVICE}' dropforge --root {root.path} ...`" in done.stderr
        done = as_dropper(root, "config set training.learning_rate 1e-4")
        assert f"it belongs to user {SERVICE}, and this is user {DROPPER}" in done.stderr
    said = as_dropper(root, f"submit {file} --no-check").stdout
    assert "no daemon runs on this root" in said
    assert f"sudo -u '#{SERVICE}' dropforge --root {root.path} run" in said


def test_doctor_proposes_no_dropper_to_take_the_root_over(service_root: Root) -> None:
    root = service_root
    (answers, theirs), settings = os.pipe(), root.settings
    child = os.fork()
    if child == 0:
        os.setgroups([SERVICE])
        os.setresgid(DROPPER, DROPPER, DROPPER)
        os.setresuid(DROPPER, DROPPER, DROPPER)
        findings = [finding.as_dict() for finding in doctor._permissions(settings)]
        os.write(theirs, json.dumps(findings).encode())
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    [finding] = json.loads(os.read(answers, 65_536))
    assert finding["verdict"] == "warn"
    assert finding["hint"] == f"`sudo -u '#{SERVICE}' dropforge --root {root.path} doctor` sees what its daemon sees"


def test_a_stranger_is_told_which_group_may_read_the_root(service_root: Root) -> None:
    service_root.path.chmod(0o750)
    server = fork_server(("setpriv", "--reuid", "4003", "--regid", "4003", "--clear-groups", "--bounding-set", "-all"))
    for command in ("status", "jobs", "submit x.jsonl", "pause", "doctor --json"):
        done = server.run(["--root", str(service_root.path), *command.split()], env=environment(), timeout=120)
        assert done.returncode in (1, 2), (command, done)
        assert f"user 4003 may not read {service_root.path}" in done.stdout + done.stderr
        assert f"usermod --append --groups {SERVICE} user 4003" in done.stdout + done.stderr
