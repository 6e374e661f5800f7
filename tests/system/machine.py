"""A machine of its own for a test: a real systemd, booted as PID 1 on an overlay of this one's root."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from daemon.processes import die_with_parent
from tests.support.documents import OPERATIONS, commands_of
from tests.support.root import REPOSITORY, wait_until

PROGRAMS = ("unshare", "nsenter", "mount", "systemctl", "journalctl", "systemd-analyze", "runuser", "useradd")
PACKAGES = "systemd util-linux passwd"
SYSTEMD = Path("/lib/systemd/systemd")
HOME = Path("/opt/dropforge")  # where the documents install Dropforge, from a checkout that lies there
PYTHON_HOME = Path("/opt/python")
PACKAGES_HOME = Path("/opt/packages")  # what a package index would give
PARTS = (
    "daemon",
    "guard",
    "dropforge.py",
    "docs",
    "examples",
    "systemd",
    "tests",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
BOOT_SECONDS = 60.0
STATES = {"started": "running", "requeued": "queued"}  # what an event says of a job, where it is not the state's name


def missing() -> str:
    """Why no machine can be booted here; empty when it can."""
    if os.geteuid() != 0:
        return "booting a systemd needs root"
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent or not SYSTEMD.exists():
        return f"{', '.join(absent) or SYSTEMD} is not installed (Debian packages: {PACKAGES})"
    if importlib.util.find_spec("hatchling") is None:
        return "hatchling, which builds what is installed there, is not installed (extra: test)"
    if cgroup_parent() is None:
        return "there is no cgroup v2 hierarchy that may be written to"
    with tempfile.TemporaryDirectory() as scratch:
        tried = subprocess.run(
            ["unshare", "--fork", "--pid", "--mount", "--net", "--cgroup", "--propagation", "private", "bash", "-ec",
             'mount -t tmpfs tmpfs "$1"; mkdir "$1"/u "$1"/w "$1"/r;'
             'mount -t overlay overlay -o "lowerdir=/,upperdir=$1/u,workdir=$1/w" "$1/r"; mount -t proc proc "$1/r/proc"',
             "bash", scratch],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    return f"name spaces and overlays are not permitted here: {tried.stderr.strip()}" if tried.returncode else ""


def cgroup_parent() -> Path | None:
    """The folder of the cgroup v2 hierarchy, also on a machine that has both."""
    for path in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified")):
        if (path / "cgroup.procs").is_file() and os.access(path, os.W_OK):
            return path
    return None


class Machine:
    """Boots at `start`, and is gone without a trace at `stop`."""

    def __init__(self) -> None:
        self._unshare: subprocess.Popen[bytes] | None = None
        self._leader = 0
        self._scratch = Path(tempfile.mkdtemp(prefix="dropforge-machine-", dir="/run"))
        parent = cgroup_parent()
        assert parent is not None
        self._cgroup = parent / self._scratch.name
        # What the moved interpreter needs, also in a unit: its own libpython, where it was built as a shared library.
        self.python_environment = {"LD_LIBRARY_PATH": f"{PYTHON_HOME}/lib"}
        # The document's `pip install` builds and installs a wheel, with neither network nor index.
        pip = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        self.environment = {"PATH": PATH, "LANG": "C.UTF-8", "TERM": "dumb", **self.python_environment, **pip}

    def start(self) -> None:
        """Boot, and install Dropforge; returns when it can be used."""
        self._cgroup.mkdir()
        base = Path(sys.base_prefix)
        python_home = base if base == Path("/usr") else PYTHON_HOME
        packages = [Path(sysconfig.get_path("purelib"))]
        packages += [Path(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
        packages = [folder for folder in packages if folder.is_dir() and folder.resolve() != REPOSITORY]
        places = {PACKAGES_HOME / str(number): folder for number, folder in enumerate(packages)}
        shown = [(REPOSITORY / part, HOME / part) for part in PARTS]
        shown += [(base, python_home)] if python_home != base else []
        shown += [(folder, place) for place, folder in places.items()]
        parent, cgroup = os.getpid(), self._cgroup / "cgroup.procs"

        def enter() -> None:
            die_with_parent(parent)
            cgroup.write_text(str(os.getpid()))

        self._unshare = subprocess.Popen(
            ["unshare", "--fork", "--kill-child=SIGKILL", "--pid", "--mount", "--uts", "--ipc", "--net", "--cgroup",
             "--propagation", "private", "bash", str(Path(__file__).with_name("boot.sh")), str(self._scratch),
             *(f"{source}={target}" for source, target in shown)],
            stdin=subprocess.DEVNULL,
            stdout=(log := tempfile.TemporaryFile()),  # noqa: SIM115  it lives as long as the machine
            stderr=subprocess.STDOUT,
            preexec_fn=enter,  # noqa: PLW1509  no thread of ours holds a lock that this needs
        )  # fmt: skip

        def booted() -> bool:
            assert self._unshare is not None
            if self._unshare.poll() is not None:
                log.seek(0)
                raise AssertionError(f"the machine did not boot: {log.read().decode(errors='replace')}")
            children = Path(f"/proc/{self._unshare.pid}/task/{self._unshare.pid}/children").read_text().split()
            if not children or Path(f"/proc/{children[0]}/comm").read_text().strip() != "systemd":
                return False
            self._leader = int(children[0])
            return self.run("systemctl", "is-active", "--quiet", "sysinit.target", check=False).returncode == 0

        wait_until(booted, BOOT_SECONDS, "the machine to boot")
        self._install(python_home / "bin" / "python3", places)

    def _install(self, python: Path, places: Iterable[Path]) -> None:
        """The document's own commands, which build a wheel; a list of folders stands in for the package index."""
        (block,) = commands_of(OPERATIONS, "Install")
        make, *install = block.splitlines()
        self.run("sh", "-euc", make, env={"PATH": f"{python.parent}:{PATH}"})
        (packages,) = self.path(HOME / ".venv" / "lib").glob("python*/site-packages")
        self.shell(f"rm -rf /{packages.relative_to(self.path('/'))}/setuptools*")  # an index would have a newer one
        (packages / "index.pth").write_text("".join(f"{place}\n" for place in places))
        self.shell("\n".join(install))

    def stop(self) -> None:
        """Power off; what does not go is ended."""
        if self._unshare is not None:
            if self._leader:
                os.kill(self._leader, signal.SIGRTMIN + 4)  # poweroff.target
            try:
                self._unshare.wait(10)
            except subprocess.TimeoutExpired:
                if self._leader:
                    os.kill(self._leader, signal.SIGKILL)
                self._unshare.kill()
                self._unshare.wait()
        for folder in sorted(self._cgroup.rglob("*"), reverse=True):
            if folder.is_dir():
                folder.rmdir()
        if self._cgroup.exists():
            wait_until(self._remove_cgroup, 10, "the machine's cgroup to be empty")
        self._scratch.rmdir()

    def _remove_cgroup(self) -> bool:
        try:
            self._cgroup.rmdir()
        except OSError:
            return False
        return True

    @property
    def unit_environment(self) -> str:
        """Environment= for a unit of this interpreter."""
        return "Environment=" + " ".join(f"{key}={value}" for key, value in self.python_environment.items())

    def path(self, inner: str | Path) -> Path:
        """A file of the machine, as this process reaches it."""
        return Path(f"/proc/{self._leader}/root") / str(inner).lstrip("/")

    def run(
        self,
        *command: str,
        user: str = "",
        check: bool = True,
        timeout: float = 120.0,
        stdin: str = "",
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside, as root or `user`; with `check`, it has to succeed."""
        variables = [f"{key}={value}" for key, value in {**self.environment, **(env or {})}.items()]
        become = ["runuser", "-u", user, "--"] if user else []
        done = subprocess.run(
            ["nsenter", "-t", str(self._leader), "-m", "-u", "-i", "-n", "-p", "-C", "-r", "-w",
             "env", "-i", *variables, *become, *command],
            capture_output=True, text=True, check=False, timeout=timeout, input=stdin,
        )  # fmt: skip
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def shell(self, script: str, *, user: str = "", check: bool = True) -> str:
        """Run a script inside and return what it printed."""
        return self.run("bash", "-euc", script, user=user, check=check).stdout

    def write(self, inner: str, text: str) -> None:
        """Put a file there."""
        target = self.path(inner)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)


class Service:
    """One Dropforge service on a machine."""

    def __init__(self, machine: Machine, unit: str = "dropforge.service", root: str = "/var/lib/dropforge") -> None:
        self.machine = machine
        self.unit = unit
        self.root = root

    def show(self, *names: str) -> dict[str, str]:
        """Properties of the unit."""
        text = self.machine.run("systemctl", "show", self.unit, f"--property={','.join(names)}").stdout
        return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)

    def value(self, name: str) -> str:
        return self.show(name)[name]

    def systemctl(self, verb: str, *, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = self.machine.run("systemctl", verb, self.unit, check=False)
        if check and done.returncode:
            raise AssertionError(f"systemctl {verb} {self.unit}: {done.stderr}\n{self.journal_text()}")
        return done

    def configure(self, drop_in: str) -> None:
        """Lay a drop-in of the test over the unit."""
        self.machine.write(f"/etc/systemd/system/{self.unit}.d/50-test.conf", drop_in)
        self.machine.run("systemctl", "daemon-reload")

    def status(self) -> dict[str, Any] | None:
        try:
            found = json.loads(self.machine.path(f"{self.root}/state/status.json").read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
        return dict(found)

    def jobs(self) -> dict[str, str]:
        """State of the newest job of each file name, as the log tells it: SQLite would not find its way to the store."""
        names: dict[str, str] = {}
        states: dict[str, str] = {}
        for event in self.log():
            if event["event"] == "file.claimed":
                names[event["job"]] = event["file"]
            noun, _, verb = event["event"].partition(".")
            if noun == "job":
                states[names[event["job"]]] = STATES.get(verb, verb)
        return states

    def drop(self, name: str, rows: int, *, user: str = "") -> None:
        """Drop a file as a person does: written beside, then renamed."""
        text = "".join(json.dumps({"text": f"{name} {number}"}) + "\n" for number in range(rows))
        inbox = f"{self.root}/inbox"
        self.machine.run(
            "sh", "-c", f'cat > "{inbox}/.{name}.part" && mv "{inbox}/.{name}.part" "{inbox}/{name}"',
            user=user, stdin=text,
        )  # fmt: skip

    def wait_for(self, name: str, state: str, timeout: float = 120.0) -> None:
        try:
            wait_until(lambda: self.jobs().get(name) == state, timeout, f"{name} to be {state}")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.jobs()}\n{self.status()}\n{self.journal_text()}") from None

    def wait_active(self, state: str = "active", timeout: float = 60.0) -> None:
        wait_until(lambda: self.value("ActiveState") == state, timeout, f"{self.unit} to be {state}")

    def training_step(self, at_least: int, timeout: float = 120.0) -> int:
        """Wait until the running job is at this step; returns its step."""

        def step() -> int:
            job = (self.status() or {}).get("job") or {}
            return int(job.get("step") or 0) if int(job.get("step") or 0) >= at_least else 0

        return wait_until(step, timeout, f"step {at_least}")

    def processes(self) -> list[str]:
        """Command names of what is in the service's cgroup."""
        folder = self.value("ControlGroup")
        if not folder:
            return []
        listed = self.machine.run("cat", f"/sys/fs/cgroup{folder}/cgroup.procs", check=False)
        return [
            self.machine.run("cat", f"/proc/{pid}/comm", check=False).stdout.strip() for pid in listed.stdout.split()
        ]

    def journal(self, *arguments: str) -> list[dict[str, Any]]:
        """The journal entries of what the unit runs now, oldest first."""
        invocation = f"_SYSTEMD_INVOCATION_ID={self.value('InvocationID')}"
        done = self.machine.run("journalctl", "--output=json", "--no-pager", invocation, *arguments)
        return [json.loads(line) for line in done.stdout.splitlines()]

    def journal_text(self) -> str:
        return self.machine.run("journalctl", f"--unit={self.unit}", "--no-pager", "-n", "60", check=False).stdout

    def log(self) -> list[dict[str, Any]]:
        """The events of the log, oldest first; whole lines only."""
        found = self.machine.path(f"/var/log/{Path(self.root).name}/dropforge.jsonl")
        return (
            [json.loads(line) for line in found.read_bytes().splitlines(True) if line.endswith(b"\n")]
            if found.exists()
            else []
        )

    def main_pid(self) -> int:
        return int(self.value("MainPID"))

    def signal_main(self, number: signal.Signals) -> None:
        self.machine.run("kill", f"-{number.value}", str(self.main_pid()))


def elapsed(started: float) -> float:
    return time.monotonic() - started


def as_toml(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """A dropforge.toml of just these settings."""
    from daemon.cli.init import toml_value

    lines: list[str] = []
    for table, values in tables.items():
        lines += [f"[{table}]", *(f"{key} = {toml_value(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"
