"""One suite for every executor of this machine: what the scheduler relies on, whichever it is."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from daemon.config import ExecutorSettings
from daemon.executors import make_executor
from daemon.executors.base import Exit
from daemon.executors.forked import ForkedExecutor
from daemon.executors.local import LocalExecutor
from daemon.job import RUN_SPEC_VERSION, Dataset, RunSpec, from_json
from daemon.processes import ProcessIdentity, identify, oom_kills
from daemon.run_dir import IDENTITY_NAME
from daemon.trainer.fork_server import QUIET
from tests.support.root import wait_until

SUPPORT = Path(__file__).parents[1] / "support"
COLD = (sys.executable, "-P", str(SUPPORT / "scripted.py"))
SERVER = (sys.executable, "-P", "-m", "tests.support.quick_warm")
# Warm trainers, a warm executor whose server is not ready yet, and plain ones.
KINDS = ("local", "warming", "warm")
ODD = 'a run\'s folder "of" two\nlines and an odd byte \udcff'


@pytest.fixture(params=KINDS)
def executor(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[LocalExecutor]:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    if request.param == "local":
        yield LocalExecutor(COLD)
        return
    warm = ForkedExecutor(COLD, server=SERVER, idle_seconds=60)
    if request.param == "warm":
        heat(warm, tmp_path)
    yield warm
    warm.close()


def heat(executor: ForkedExecutor, folder: Path) -> None:
    """The first job starts the server; wait until that is ready."""
    first = specify(folder / "first")
    executor.launch(first)
    ended(executor, first)
    wait_until(lambda: executor.is_ready, what="the fork server")


def specify(run_dir: Path, **script: Any) -> RunSpec:
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "facts").unlink(missing_ok=True)
    (run_dir / "script").write_text(json.dumps(script))
    dataset = Dataset(name="x", path="/x", size_bytes=1, rows=1, digest="00", format="text")
    return RunSpec(
        schema_version=RUN_SPEC_VERSION,
        job_id="job",
        attempt=1,
        dataset=dataset,
        recipe={},
        run_dir=str(run_dir),
        model_dir="",
        daemon_pid=os.getpid(),
    )


def facts(spec: RunSpec) -> dict[str, Any]:
    path = Path(spec.run_dir, "facts")
    wait_until(path.exists, what="the trainer to begin")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def ended(executor: LocalExecutor, spec: RunSpec) -> Exit:
    found = wait_until(lambda: executor.poll(Path(spec.run_dir)), 30, "the trainer to end")
    assert found is not None
    return found


def gone(pid: int) -> bool:
    identity = identify(pid)
    return identity is None or not identity.alive


@pytest.mark.parametrize(("script", "code"), [({}, 0), ({"code": 3}, 3), ({"raise": True}, 1)])
def test_the_exit_code_and_the_log_arrive(executor: LocalExecutor, tmp_path: Path, script: Any, code: int) -> None:
    spec = specify(tmp_path / "run", **script)
    executor.launch(spec)
    assert ended(executor, spec) == Exit(code=code)
    log = (tmp_path / "run" / "trainer.log").read_text()
    assert log.startswith("a line for the log")
    assert ("as scripted" in log) is ("raise" in script)


def test_a_trainer_is_the_daemons_child_in_a_group_of_its_own(executor: LocalExecutor, tmp_path: Path) -> None:
    """So the kernel tells it when the daemon dies, and a signal to its group meets nobody else."""
    spec = specify(tmp_path / "run", wait=True)
    executor.launch(spec)
    found = facts(spec)
    assert found["parent"] == os.getpid()
    assert found["group"] == found["pid"]
    assert found["stdin"] == ""
    identity = from_json((tmp_path / "run" / IDENTITY_NAME).read_bytes(), ProcessIdentity)
    assert identity.pid == found["pid"]
    assert identity.alive
    assert executor.poll(Path(spec.run_dir)) is None
    executor.request_stop(Path(spec.run_dir))
    assert ended(executor, spec) == Exit(code=75)
    assert gone(found["pid"])


def test_a_killed_trainer_is_told_by_its_signal_and_its_children_go_too(
    executor: LocalExecutor, tmp_path: Path
) -> None:
    spec = specify(tmp_path / "run", kill=True, child=True)
    executor.launch(spec)
    found = facts(spec)
    assert ended(executor, spec) == Exit(signal=signal.SIGKILL)
    wait_until(lambda: gone(found["child"]), what="the trainer's child to go")


def test_end_kills_the_whole_group(executor: LocalExecutor, tmp_path: Path) -> None:
    spec = specify(tmp_path / "run", wait=True, child=True)
    executor.launch(spec)
    found = facts(spec)
    executor.kill(Path(spec.run_dir))
    assert ended(executor, spec) == Exit(signal=signal.SIGKILL)
    wait_until(lambda: gone(found["child"]), what="the trainer's child to go")


def test_the_next_daemon_adopts_what_this_one_left(executor: LocalExecutor, tmp_path: Path) -> None:
    spec = specify(tmp_path / "run", wait=True)
    run_dir = Path(spec.run_dir)
    executor.launch(spec)
    facts(spec)
    other = LocalExecutor(COLD)
    assert other.adopt(run_dir)
    assert other.poll(run_dir) is None
    other.request_stop(run_dir)
    assert ended(executor, spec) == Exit(code=75)
    assert other.poll(run_dir) == Exit()
    assert not LocalExecutor(COLD).adopt(run_dir)


def test_an_attempt_never_reads_the_results_of_the_one_before(executor: LocalExecutor, tmp_path: Path) -> None:
    spec = specify(tmp_path / "run", wait=True)
    for name in ("result.json", "progress.json"):
        (tmp_path / "run" / name).write_text("{}")
    executor.launch(spec)
    facts(spec)
    assert not (tmp_path / "run" / "result.json").exists()
    assert not (tmp_path / "run" / "progress.json").exists()
    executor.kill(Path(spec.run_dir))
    ended(executor, spec)


def test_odd_folder_names_are_no_obstacle(executor: LocalExecutor, tmp_path: Path) -> None:
    spec = specify(tmp_path / os.fsdecode(os.fsencode(ODD)))
    executor.launch(spec)
    assert ended(executor, spec) == Exit(code=0)


# -- the fork server alone


@pytest.fixture
def warm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ForkedExecutor]]:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    made: list[ForkedExecutor] = []

    def make(**options: Any) -> ForkedExecutor:
        made.append(ForkedExecutor(COLD, server=SERVER, **{"idle_seconds": 60, **options}))
        heat(made[-1], tmp_path)
        return made[-1]

    yield make
    for executor in made:
        executor.close()


def server_pid(executor: ForkedExecutor) -> int:
    assert executor._server is not None
    return executor._server._process.pid


def test_the_servers_death_costs_nothing_but_the_warmth(warm: Callable[..., ForkedExecutor], tmp_path: Path) -> None:
    """A running trainer goes on, the next job starts cold, the one after it warm again."""
    executor = warm()
    running = specify(tmp_path / "running", wait=True)
    executor.launch(running)
    facts(running)
    os.kill(server_pid(executor), signal.SIGKILL)
    wait_until(lambda: not executor.is_ready, what="the server's end to be noticed")
    assert executor.poll(Path(running.run_dir)) is None
    executor.request_stop(Path(running.run_dir))
    assert ended(executor, running) == Exit(code=75)
    cold = specify(tmp_path / "cold")
    executor.launch(cold)
    assert ended(executor, cold) == Exit(code=0)
    wait_until(lambda: executor.is_ready, what="a new server")


def test_an_idle_server_ends_by_itself(warm: Callable[..., ForkedExecutor], tmp_path: Path) -> None:
    executor = warm(idle_seconds=0.3)
    pid = server_pid(executor)
    wait_until(lambda: gone(pid), what="the idle server to end")
    spec = specify(tmp_path / "run", code=4)
    executor.launch(spec)
    assert ended(executor, spec) == Exit(code=4)


def test_a_server_of_other_settings_or_versions_is_replaced(
    warm: Callable[..., ForkedExecutor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from daemon.executors import forked as module

    executor = warm()
    pid = server_pid(executor)
    monkeypatch.setattr(module, "PACKAGES", (*module.PACKAGES, "pytest"))  # as if another version were installed
    spec = specify(tmp_path / "run")
    executor.launch(spec)
    assert gone(pid)
    assert server_pid(executor) != pid
    assert ended(executor, spec) == Exit(code=0)


def test_a_package_upgraded_on_the_disk_replaces_the_server(
    warm: Callable[..., ForkedExecutor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has imported is of yesterday; also a reinstallation of the same version counts."""
    from daemon.executors import forked as module

    def install(version: str) -> None:
        for old in tmp_path.glob("peft-*"):
            shutil.rmtree(old)
        folder = tmp_path / f"peft-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: peft\nVersion: {version}\n")
        (folder / "RECORD").write_text("")

    install("98.0")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(module, "PACKAGES", ("peft",))
    executor = warm()
    for version in ("99.0", "99.0"):
        pid = server_pid(executor)
        unchanged = specify(tmp_path / "run")
        executor.launch(unchanged)
        assert ended(executor, unchanged) == Exit(code=0)
        assert server_pid(executor) == pid
        install(version)
        spec = specify(tmp_path / "run")
        executor.launch(spec)
        assert gone(pid)
        assert server_pid(executor) != pid
        assert ended(executor, spec) == Exit(code=0)


def test_where_nothing_can_be_forked_no_server_is_started_again_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv("QUICK_WARM_THREAD", "1")
    executor = ForkedExecutor(COLD, server=SERVER, idle_seconds=60)
    first = specify(tmp_path / "first")
    executor.launch(first)
    assert ended(executor, first) == Exit(code=0)
    pid = server_pid(executor)
    wait_until(lambda: gone(pid), what="the server to find that it has threads")
    second = specify(tmp_path / "second", code=4)
    executor.launch(second)
    assert ended(executor, second) == Exit(code=4)
    assert server_pid(executor) == pid
    assert not executor.is_ready
    executor.close()


def test_a_process_with_threads_or_cuda_is_never_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    from daemon.trainer.fork_server import unfit

    release = threading.Event()
    thread = threading.Thread(target=release.wait)
    thread.start()
    assert "threads" in unfit()
    release.set()
    thread.join()


def test_the_real_servers_imports_start_neither_threads_nor_cuda() -> None:
    """In a process of its own, as the server is."""
    import subprocess

    from tests.support.root import environment

    done = subprocess.run(
        [
            sys.executable,
            "-P",
            "-c",
            "from daemon.trainer import fork_server; from daemon.trainer.bootstrap import set_library_environment\n"
            "set_library_environment(); fork_server.preload(''); import torch; print(repr(fork_server.unfit()), torch.cuda.is_initialized())",
        ],
        capture_output=True,
        text=True,
        check=True,
        env={**environment(), **QUIET},
    )
    assert done.stdout.strip() == "'' False"


def test_importing_the_trainer_leaves_bitsandbytes_alone_until_a_model_is_loaded(tmp_path: Path) -> None:
    """peft imports it when it can, and it asks each GPU for its kind: CUDA would be up before a process is forked."""
    import subprocess

    from tests.support.root import environment

    package = tmp_path / "bitsandbytes"
    package.mkdir()
    (package / "__init__.py").write_text("print('imported')\n")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from daemon.trainer import fork_server\nfork_server.preload('')\nimport daemon.trainer.train, importlib.util\n"
            "print(importlib.util.find_spec('bitsandbytes') is not None)\nimport bitsandbytes",
        ],
        capture_output=True,
        text=True,
        check=True,
        env={**environment(), "PYTHONPATH": f"{tmp_path}:{environment()['PYTHONPATH']}"},
    )
    assert done.stdout.split() == ["True", "imported"]


def test_a_fork_that_cannot_start_cuda_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the same process, which the daemon knows by its pid."""
    import torch

    from daemon.trainer.fork_server import run_forked

    class Replaced(Exception):
        pass

    def execute(program: str, command: list[str]) -> None:
        raise Replaced(program, command)

    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    monkeypatch.setattr(os, "execv", execute)
    with pytest.raises(Replaced) as caught:
        run_forked(Path("/some/run"))
    command = [sys.executable, "-P", "-m", "daemon.trainer", "/some/run"]
    assert caught.value.args == (sys.executable, command)


def test_libraries_can_say_goodbye(executor: LocalExecutor, tmp_path: Path) -> None:
    """What they registered for the end is called, and the threads that they wait for are waited for."""
    spec = specify(tmp_path / "run", farewell=True)
    executor.launch(spec)
    assert ended(executor, spec) == Exit(code=0)
    assert (tmp_path / "run" / "registered").read_text() == (tmp_path / "run" / "awaited").read_text() == "done"


def test_no_library_can_abort_a_trainer_that_is_done(executor: LocalExecutor, tmp_path: Path) -> None:
    """As gloo's threads do, when the interpreter goes down under them."""
    spec = specify(tmp_path / "run", abort=True)
    executor.launch(spec)
    assert ended(executor, spec) == Exit(code=0)


def test_only_our_own_trainer_is_kept_warm() -> None:
    assert type(make_executor(ExecutorSettings())) is LocalExecutor
    assert type(make_executor(ExecutorSettings(warm_start=True, command=("other",)))) is LocalExecutor
    assert type(make_executor(ExecutorSettings(warm_start=True))) is ForkedExecutor


def test_a_kill_for_want_of_memory_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernel's own count; a kill of ours beside it is no such thing."""
    from daemon.executors import local

    vmstat = tmp_path / "vmstat"
    monkeypatch.setattr(local, "oom_kills", lambda: oom_kills(vmstat))
    executor = LocalExecutor(COLD)
    for number, ours in enumerate((False, True)):
        vmstat.write_text("pgfault 7\noom_kill 2\n")
        spec = specify(tmp_path / f"run{number}", wait=True)
        executor.launch(spec)
        pid = facts(spec)["pid"]
        vmstat.write_text("pgfault 7\noom_kill 3\n")
        if ours:
            executor.kill(Path(spec.run_dir))
        else:
            os.kill(pid, signal.SIGKILL)
        assert ended(executor, spec).out_of_memory is not ours
