"""A Dropforge root in a temporary folder, with the real daemon as a process.

Daemon and commands are forks of one process that has their imports done, except where an interpreter has to be started
with an environment that is read before anything else (`variables`).
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from daemon import config
from daemon.cli.init import render_config
from daemon.config import Settings
from daemon.job import FINAL_STATES, Job, JobState
from daemon.observability.status import read_status
from daemon.processes import ProcessIdentity
from daemon.run_dir import read_identity, run_dir_of
from daemon.store import JobStore
from tests.support.forked import Forked, ForkServer

T = TypeVar("T")
REPOSITORY = Path(__file__).resolve().parents[2]
SLOW_TRAINER = Path(__file__).with_name("slow_trainer.py")
FAKE_TRAINER = Path(__file__).with_name("fake_trainer.py")
DROPFORGE = [sys.executable, "-P", "-m", "daemon"]
CHECKING_COMMANDS = {"submit", "check", "merge"}  # those that start a process which imports torch
# Quick settings: nothing here is what a test is about.
QUICK: Mapping[str, Mapping[str, Any]] = {
    "inbox": {"settle_seconds": 0.1, "rescan_seconds": 0.5},
    "queue": {"retry_seconds": 0.05, "stop_timeout": 20.0},
    "status": {"status_interval": 0.2},
}


def wait_until(condition: Callable[[], T], timeout: float = 60.0, what: str = "") -> T:
    """Poll until `condition` is true and return what it gave; fails with its last value after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout:g} s for {what or condition.__name__}; last value {value!r}")
        time.sleep(0.02)


class Root:
    """A root and what is done to it. `behaviour` makes its trainer the fake one."""

    def __init__(
        self,
        path: Path,
        tables: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        behaviour: Mapping[str, Any] | None = None,
        base_model: Path | None = None,
        through: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
        before: Sequence[Any] = (),
    ) -> None:
        """`through`: a command that the daemon is started by; `variables`: of its environment.

        `before`: a function that the daemon's process calls first, as `module:name` and its arguments.
        """
        self.path = path
        self._through = tuple(through)
        self._variables = dict(variables or {})
        self.before = tuple(before)
        self._training = base_model is not None
        self._daemon: subprocess.Popen[bytes] | Forked | None = None
        self.tables: dict[str, dict[str, Any]] = {name: dict(values) for name, values in QUICK.items()}
        if behaviour is not None:
            base_model = path / "base"
            base_model.mkdir(parents=True, exist_ok=True)  # a cut of a disk has it
            (base_model / "config.json").write_text("{}")
            (base_model / "model.safetensors").write_bytes(b"weights")
            (base_model / "tokenizer.json").write_text("{}")
            self.behave(behaviour)
            self.configure(
                executor={"command": (sys.executable, "-P", str(FAKE_TRAINER), str(path / "behaviour.json"))},
                model={"model_name_or_path": "base"},
            )
        elif base_model is not None:
            self.configure(model={"model_name_or_path": str(base_model)})
        self.configure(**{name: dict(values) for name, values in (tables or {}).items()})
        for folder in (self.settings.inbox_dir, self.settings.model_dir, self.settings.state_dir):
            folder.mkdir(parents=True, exist_ok=True)

    def configure(self, **tables: Mapping[str, Any]) -> None:
        """Lay `tables` over the settings and write dropforge.toml."""
        self.path.mkdir(parents=True, exist_ok=True)
        for name, values in tables.items():
            self.tables.setdefault(name, {}).update(values)
        (self.path / config.CONFIG_NAME).write_text(render_config(self.tables))

    def behave(self, behaviour: Mapping[str, Any]) -> None:
        """Tell the fake trainer how to behave from its next attempt on."""
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "behaviour.json").write_text(json.dumps(behaviour))

    @property
    def settings(self) -> Settings:
        return config.load(self.path)

    # -- the daemon

    def start(self) -> subprocess.Popen[bytes] | Forked:
        """Start the daemon and wait until it watches."""
        arguments = ["--root", str(self.path), "run"]
        env = {**environment(), **self._variables}
        with (self.path / "daemon.err").open("ab") as errors, Path(os.devnull).open("wb") as nothing:
            server = fork_server(self._through, training=self._training)
            if not server.suits(env):
                self._daemon = subprocess.Popen(
                    [*self._through, *DROPFORGE, *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=nothing,
                    stderr=errors,
                    env=env,
                )
            else:
                self._daemon = server.start(
                    arguments, stdout=nothing.fileno(), stderr=errors.fileno(), env=env, before=self.before
                )
        pid = self._daemon.pid

        def watches() -> bool:
            assert self._daemon is not None
            if self._daemon.poll() is not None:
                raise AssertionError(f"the daemon ended: {self.errors()}")
            status = self.status()
            return bool(status and status["pid"] == pid and status["status"] not in ("starting", "stopped"))

        wait_until(watches, what="the daemon to watch")
        return self._daemon

    @property
    def start_pid(self) -> int:
        """The running daemon's pid."""
        assert self._daemon is not None
        return self._daemon.pid

    def stop(self, timeout: float = 60.0) -> int:
        """SIGTERM; returns the exit code."""
        assert self._daemon is not None
        self._daemon.send_signal(signal.SIGTERM)
        code = self._daemon.wait(timeout)
        self._daemon = None
        return code

    def kill(self) -> None:
        """SIGKILL to the daemon."""
        assert self._daemon is not None
        self._daemon.kill()
        self._daemon.wait()
        self._daemon = None

    def close(self) -> None:
        """Leave nothing running."""
        if self._daemon is not None and self._daemon.poll() is None:
            self._daemon.terminate()
            try:
                self._daemon.wait(30)
            except subprocess.TimeoutExpired:
                self._daemon.kill()
        for folder in (self.settings.state_dir / "runs").glob("*"):
            identity = read_identity(folder)
            if identity is not None and identity.alive:
                os.kill(identity.pid, signal.SIGKILL)

    def run(self, *arguments: str, timeout: float = 300.0) -> subprocess.CompletedProcess[str]:
        """Any `dropforge` command on this root."""
        training = bool(CHECKING_COMMANDS.intersection(arguments)) or (self._training and "run" in arguments)
        return dropforge("--root", str(self.path), *arguments, timeout=timeout, training=training)

    # -- the inbox

    def drop(self, name: str, content: bytes | Path | Iterable[Mapping[str, Any]], *, folder: str = "") -> Path:
        """Put a file into the inbox by one rename."""
        target = self.settings.inbox_dir / folder / name
        target.parent.mkdir(exist_ok=True)
        beside = target.with_name(f".{name}.part")
        if isinstance(content, Path):
            shutil.copyfile(content, beside)
        elif isinstance(content, bytes):
            beside.write_bytes(content)
        else:
            beside.write_text("".join(json.dumps(row) + "\n" for row in content))
        beside.rename(target)
        return target

    # -- what is known

    def status(self) -> dict[str, Any] | None:
        return read_status(self.settings.status_path)

    def jobs(self) -> list[Job]:
        if not self.settings.store_path.exists():
            return []
        store = JobStore(self.settings.store_path)
        try:
            return store.jobs()
        finally:
            store.close()

    def job(self, name: str) -> Job | None:
        """The newest job over a file of this name."""
        return next((job for job in reversed(self.jobs()) if job.name == name), None)

    def finished(self, name: str, timeout: float = 120.0) -> Job:
        """Wait until the newest job of this name is in a final state and its file has left processing/."""

        def final() -> Job | None:
            job = self.job(name)
            if job is None or job.state not in FINAL_STATES:
                return None
            return None if (self.settings.inbox_dir / "processing" / job.id).exists() else job

        try:
            job = wait_until(final, timeout, f"{name} to be finished")
        except AssertionError as error:
            raise AssertionError(f"{error}; job {self.job(name)}; status {self.status()}; {self.errors()}") from None
        assert job is not None
        return job

    def running(self, name: str, step: int = 0, timeout: float = 120.0) -> Job:
        """Wait until the job of this name is running and has sealed at least `step`."""

        def sealed() -> Job | None:
            job = self.job(name)
            return job if job and job.state is JobState.RUNNING and job.max_step >= step else None

        job = wait_until(sealed, timeout, f"{name} to run and seal step {step}")
        assert job is not None
        return job

    def trainer(self, job: Job) -> ProcessIdentity:
        """The living trainer of a job."""

        def identity() -> ProcessIdentity | None:
            return read_identity(run_dir_of(self.settings.state_dir, job.id))

        found = wait_until(identity, what="a trainer")
        assert found is not None
        return found

    def trainer_alive(self, folder: Path) -> bool:
        """Whether the trainer of a run directory lives."""
        identity = read_identity(folder)
        return identity is not None and identity.alive

    def log(self) -> list[dict[str, Any]]:
        """The events of the log, oldest first."""
        path = self.settings.log_path
        return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []

    def events(self, name: str) -> list[dict[str, Any]]:
        return [event for event in self.log() if event["event"] == name]

    def errors(self) -> str:
        """The end of the daemon's stderr and of every trainer's log."""
        texts = [self.path / "daemon.err", *(self.settings.state_dir / "runs").glob("*/trainer.log")]
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in texts if path.exists()
        )


class Prepared:
    """A root whose daemon has stopped, kept as it is now: `again` puts it back at its place, for one test each."""

    def __init__(self, root: Root) -> None:
        self._root = root
        self._image = root.path.with_name(f"{root.path.name} as it was")
        self._used = 0
        root.path.rename(self._image)

    def again(self) -> Root:
        """Put it back; what the test before has left is moved out of the way."""
        self._used += 1
        if self._root.path.exists():
            self._root.path.rename(self._root.path.with_name(f"used {self._used}"))
        shutil.copytree(self._image, self._root.path, symlinks=True)
        return copy.deepcopy(self._root)


def slowed(root: Root) -> None:
    """Make each step wait until the test says `go`, so that a signal always finds the trainer in mid-run."""
    root.configure(executor={"command": (sys.executable, "-P", str(SLOW_TRAINER))})


def allow(root: Root, steps: int) -> None:
    """Let the slowed trainer go on up to this step."""
    beside = root.path / ".allowed"
    beside.write_text(str(steps))
    beside.rename(root.path / "allowed")


def children_of(pid: int) -> Iterator[tuple[int, str]]:
    """Children and grandchildren with their command lines."""
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                with suppress(OSError):
                    yield int(child), Path(f"/proc/{child}/cmdline").read_text(errors="replace")
                yield from children_of(int(child))


def environment() -> dict[str, str]:
    """This process's environment with the checkout importable and one thread a process: two cores, many processes."""
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


ENVIRONMENT = environment()  # before any test changes it


@cache
def fork_server(through: tuple[str, ...] = (), *, training: bool = False) -> ForkServer:
    """The one of this test process, started by a command that its forks shall descend from; ends with this process."""
    return ForkServer(ENVIRONMENT, through, training=training)


def dropforge(*arguments: str, timeout: float = 300.0, training: bool = False) -> subprocess.CompletedProcess[str]:
    """Any `dropforge` command, in a process of its own; `training`: what it starts finds torch imported."""
    env = environment()
    server = fork_server(training=training)
    if server.suits(env):
        return server.run(arguments, env=env, timeout=timeout)
    return subprocess.run(
        [*DROPFORGE, *arguments], capture_output=True, text=True, timeout=timeout, check=False, env=env
    )
