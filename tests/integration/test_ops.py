"""Operations on a running daemon: its status file, its log, its screen, rollback, metrics."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from daemon.job import JobState
from daemon.observability.events import EVENTS
from daemon.status_writer import write_holding
from daemon.versions import current_version
from tests.support.root import DROPFORGE, REPOSITORY, Root, environment, wait_until
from tests.support.sound import assert_sound

MakeRoot = Callable[..., Root]
ONE_ROW_A_STEP = {"training": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "save_steps": 500}}
SCHEMA = jsonschema.Draft202012Validator(json.loads((REPOSITORY / "docs" / "status.schema.json").read_text()))


def texts(count: int, word: str = "row") -> list[dict[str, str]]:
    return [{"text": f"{word} {number}"} for number in range(count)]


# In a process of its own, so that nothing but the file system is between the reader and the daemon.
READER = """
import json, os, sys
path, kept, last, different = sys.argv[1], open(sys.argv[2], "wb"), b"", 0
for _ in range(int(sys.argv[3])):
    fd = os.open(path, os.O_RDONLY)
    text = os.read(fd, 1 << 20)
    os.close(fd)
    if text != last:
        last = text
        different += 1
        kept.write(json.dumps(json.loads(text)).encode() + b"\\n")
"""


@pytest.mark.parametrize("reads", [60_000, pytest.param(1_000_000, marks=pytest.mark.chaos)])
def test_every_read_of_the_status_file_meets_one_whole_file_or_another(
    make_root: MakeRoot, tmp_path: Path, reads: int
) -> None:
    """Every one that differs from the one before is parsed at once, and checked against the schema afterwards."""
    root = make_root(
        behaviour={"*": {"step_seconds": 0.002}}, tables={**ONE_ROW_A_STEP, "status": {"status_interval": 0.05}}
    )
    root.start()
    kept = tmp_path / "kept"
    command = [sys.executable, "-c", READER, str(root.settings.status_path), str(kept), str(reads)]
    reader = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    number = 0
    while reader.poll() is None:
        number += 1
        root.drop(f"{number}.jsonl", texts(60, str(number)))
        root.drop(f"bad{number}.jsonl", b"x")
        root.finished(f"{number}.jsonl")
        wait_until(lambda: (root.status() or {}).get("status") == "idle", what="an idle daemon")
    assert reader.wait() == 0, reader.stderr.read() if reader.stderr else ""
    found = [json.loads(line) for line in kept.read_bytes().splitlines()]
    for content in found[::10]:
        SCHEMA.validate(content)
    assert len(found) > 10, "it was replaced while it was read"
    assert {"training", "idle"} <= {content["status"] for content in found}
    assert root.stop() == 0


def test_the_status_is_of_its_schema_in_every_state_and_has_the_losses(make_root: MakeRoot) -> None:
    root = make_root(
        behaviour={"*": {"step_seconds": 0.004}}, tables={**ONE_ROW_A_STEP, "queue": {"stop_timeout": 20.0}}
    )
    seen: dict[str, dict[str, Any]] = {}
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.002):
            try:
                content = json.loads(root.settings.status_path.read_bytes())
            except FileNotFoundError:
                continue
            SCHEMA.validate(content)
            seen[content["status"]] = content

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        daemon = root.start()
        wait_until(lambda: "idle" in seen, what="an idle daemon")
        root.drop("odd \x1b[31m\n.jsonl", texts(3000))
        wait_until(lambda: len(((seen.get("training") or {}).get("job") or {}).get("losses", ())) > 8, what="losses")
        training = seen["training"]
        assert root.run("pause").returncode == 0
        wait_until(lambda: "paused" in seen, what="a paused queue")
        root.configure(queue={"min_free_bytes": 2**60})
        daemon.send_signal(signal.SIGHUP)
        assert root.run("resume").returncode == 0
        wait_until(lambda: "free space" in (seen.get("waiting") or {}).get("reason", ""), what="a held queue")
        root.configure(queue={"min_free_bytes": 0})
        daemon.send_signal(signal.SIGHUP)
        wait_until(lambda: (root.status() or {}).get("status") == "training", what="the run to go on")
        root.drop("half.jsonl", b'{"text": "no end')
        root.stop()
    finally:
        done.set()
        watcher.join()
    # A start may be over before anybody looks.
    assert seen.keys() | {"starting"} == {"starting", "idle", "training", "waiting", "paused", "stopping", "stopped"}
    write_holding(root.settings, "recovering", status="starting")
    SCHEMA.validate(root.status())
    losses = training["job"]["losses"]
    assert len(losses) <= 200
    assert losses == sorted(losses)
    assert losses[0][1] > losses[-1][1]  # the trainer's loss is 1 / step
    assert "\x1b" not in json.dumps(training, ensure_ascii=False)


def test_a_status_that_cannot_be_written_is_told_once_and_training_goes_on(make_root: MakeRoot) -> None:
    root = make_root(behaviour={}, tables=ONE_ROW_A_STEP)
    daemon = root.start()
    root.settings.status_path.unlink()
    root.settings.status_path.mkdir()  # a rename onto a folder fails, whoever we are
    root.drop("a.jsonl", texts(5))
    assert root.finished("a.jsonl").state is JobState.SUCCEEDED
    wait_until(lambda: root.events("status.not_written"), what="the log")
    time_at = len(root.log())
    root.drop("b.jsonl", texts(6, "b"))
    root.finished("b.jsonl")
    assert len(root.events("status.not_written")) == 1
    assert len(root.log()) > time_at
    root.settings.status_path.rmdir()
    wait_until(lambda: root.events("status.written_again"), what="the status to be back")
    assert daemon.poll() is None


def test_a_daemon_that_hangs_or_died_is_told_from_one_that_lives(make_root: MakeRoot) -> None:
    root = make_root(behaviour={})
    root.start()
    alive = root.run("status")
    assert (alive.returncode, alive.stdout.split()[0]) == (0, "idle")
    root.kill()
    dead = root.run("status")
    assert (dead.returncode, dead.stdout.split()[0]) == (1, "dead")
    root.start()
    root.stop()
    stopped = root.run("status")
    assert (stopped.returncode, stopped.stdout.split()[0]) == (0, "stopped")


def follow(root: Root, *arguments: str) -> tuple[subprocess.Popen[str], list[str]]:
    told: list[str] = []
    process = subprocess.Popen(
        [*DROPFORGE, "--root", str(root.path), "logs", *arguments], stdout=subprocess.PIPE, text=True, env=environment()
    )

    def read() -> None:
        assert process.stdout is not None
        told.extend(process.stdout)

    threading.Thread(target=read, daemon=True).start()
    return process, told


def test_logs_follow_across_rotation_and_reload_and_end_on_ctrl_c(make_root: MakeRoot) -> None:
    root = make_root(behaviour={}, tables={**ONE_ROW_A_STEP, "logging": {"max_bytes": 3000, "backups": 50}})
    daemon = root.start()
    process, told = follow(root, "-f", "--json", "-n", "1000")
    for number in range(3):
        root.drop(f"{number}.jsonl", texts(5, str(number)))
        root.finished(f"{number}.jsonl")
    path = root.settings.log_path
    for number in range(len(list(path.parent.iterdir())) - 1, 0, -1):  # as somebody else would rotate it
        path.with_name(f"{path.name}.{number}").rename(path.with_name(f"{path.name}.{number + 1}"))
    path.rename(path.with_name(f"{path.name}.1"))
    daemon.send_signal(signal.SIGHUP)
    wait_until(lambda: path.exists() and root.events("daemon.reloaded"), what="the log to be opened again")
    root.drop("last.jsonl", texts(5, "last"))
    root.finished("last.jsonl")
    wait_until(lambda: sum('"job.succeeded"' in line for line in told) == 4, what="four jobs")
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0
    events = [json.loads(line) for line in told]
    assert [event["event"] for event in events].count("daemon.started") == 1
    assert [event["timestamp"] for event in events] == sorted(event["timestamp"] for event in events)
    assert len(list(path.parent.iterdir())) > 3
    job = root.job("1.jsonl")
    assert job is not None
    of_job = root.run("logs", job.id[-9:], "--json").stdout.splitlines()
    assert {json.loads(line)["job"] for line in of_job} == {job.id}
    assert json.loads(of_job[-1])["event"] == "job.succeeded"
    assert root.run("logs", "--level", "error").stdout == ""


def test_each_job_ends_with_one_line_that_has_everything(make_root: MakeRoot, tmp_path: Path) -> None:
    """Whoever ended it: the trainer, the pass over its rows, the guard against doubles, a person with or without a daemon."""
    ended = tmp_path / "ended"
    root = make_root(
        behaviour={}, tables={**ONE_ROW_A_STEP, "hooks": {"on_job_finished": ("sh", "-c", f"(cat; echo) >> {ended}")}}
    )
    root.drop("a.jsonl", texts(20))
    root.drop("bad \x1b[31m.jsonl", b"{}\n")
    root.run("run", "--once")
    root.drop("again.jsonl", texts(20))  # the content of a.jsonl
    root.run("pause")
    root.start()
    duplicate, waiting = root.finished("again.jsonl"), root.drop("waits.jsonl", texts(5, "w"))
    wait_until(lambda: not waiting.exists() and root.job("waits.jsonl").state is JobState.QUEUED, what="the queue")  # type: ignore[union-attr]
    root.run("cancel", root.job("waits.jsonl").id)  # type: ignore[union-attr]
    wait_until(lambda: len(root.events("job.cancelled")) == 2, what="the daemon to tell of it")
    root.drop("later.jsonl", texts(5, "l"))
    wait_until(lambda: (job := root.job("later.jsonl")) and job.state is JobState.QUEUED, what="the queue")
    root.stop()
    root.run("cancel", root.job("later.jsonl").id)  # type: ignore[union-attr]
    root.start()
    wait_until(lambda: len(root.events("job.cancelled")) == 3, what="the next daemon to tell of it")
    root.stop()

    (trained,) = root.events("job.succeeded")
    always = {"job", "dataset", "was", "reason", "attempt", "priority", "size_bytes", "created_at", "total_seconds"}
    of_data = {"digest", "format", "dataset_rows", "skipped_rows"}
    of_run = {
        "base_model", "version", "started_at", "max_step", "verdict", "cleared", "start_step", "steps_run", "steps_planned",
        "rows", "held_out_rows", "train_loss", "held_out_before", "held_out_after", "wall_seconds", "tokens_trained", "warnings",
    }  # fmt: skip
    assert always | of_data | of_run <= trained.keys()
    (rejected,) = root.events("job.rejected")
    assert always <= rejected.keys()
    assert (rejected["was"], rejected["dataset"]) == ("claimed", "bad \\x1b[31m.jsonl")
    assert "line 1" in rejected["reason"]
    doubled, by_person, by_nobody = root.events("job.cancelled")
    for event in (doubled, by_person, by_nobody):
        assert always | of_data <= event.keys()
    assert (doubled["job"], doubled["duplicate_of"]) == (duplicate.id, trained["job"])
    assert (by_person["was"], by_person["reason"]) == ("queued", "a person cancelled the job")
    assert by_nobody["dataset"] == "later.jsonl"
    for event in (trained, rejected, doubled, by_person, by_nobody):
        assert event.keys() - {"timestamp", "level", "event"} <= set(EVENTS[event["event"]].keys)
        assert event["level"] == EVENTS[event["event"]].level
    hooked = [json.loads(line)["job"]["id"] for line in ended.read_text().splitlines()]
    assert sorted(hooked) == sorted(event["job"] for event in (trained, rejected, doubled, by_person, by_nobody))
    assert_sound(root)


class Terminal:
    """A command on a terminal of 80 columns, and everything that it drew."""

    def __init__(self, *command: str) -> None:
        self.drawn = b""
        self.pid, self._fd = pty.fork()
        if self.pid == 0:  # the child
            variables = {key: value for key, value in environment().items() if key != "NO_COLOR"}
            os.execve(command[0], list(command), {**variables, "TERM": "xterm-256color"})
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 0, 0))
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                block = os.read(self._fd, 65_536)
            except OSError:
                return
            if not block:
                return
            self.drawn += block

    def type(self, keys: bytes) -> None:
        os.write(self._fd, keys)

    def wait(self) -> int:
        try:
            wait_until(lambda: os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT), 30, "its end")
        except AssertionError:
            os.kill(self.pid, signal.SIGKILL)
            raise
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    made: list[Terminal] = []

    def make(*command: str) -> Terminal:
        made.append(Terminal(*command))
        return made[-1]

    yield make
    for each in made:
        try:
            os.kill(each.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def test_the_live_screen_shows_the_run_and_ends_on_ctrl_c(
    make_root: MakeRoot, terminal: Callable[..., Terminal]
) -> None:
    root = make_root(behaviour={"*": {"step_seconds": 0.01}}, tables=ONE_ROW_A_STEP)
    root.start()
    root.drop("a.jsonl", texts(3000))
    root.running("a.jsonl")
    screen = terminal(sys.executable, "-P", "-m", "daemon", "--root", str(root.path), "status", "--watch")
    wait_until(lambda: b"/3000" in screen.drawn and "└".encode() in screen.drawn, what="a bar and a chart")
    screen.type(b"\x03")
    assert screen.wait() == 0
    text = screen.drawn.decode()
    assert "\x1b[?1049h" in text  # drawn on the terminal's other page, which is given back
    assert text.rindex("\x1b[?1049l") > text.rindex("/3000")
    text = text.replace("^C", "")  # the terminal's own echo
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", re.sub(r"\x1b\[[0-9;?]*[A-Hh]", "\n", text))
    assert max(len(line) for line in re.split(r"[\r\n]+", plain)) <= 80
    root.behave({})


def test_run_on_a_terminal_shows_the_job_in_place_below_its_log(
    make_root: MakeRoot, terminal: Callable[..., Terminal]
) -> None:
    """Log lines scroll above; each step is a new number in the same lines, which are gone at the end."""
    root = make_root(behaviour={"*": {"step_seconds": 0.01}}, tables=ONE_ROW_A_STEP)
    screen = terminal(sys.executable, "-P", "-m", "daemon", "--root", str(root.path), "run")
    root.drop("a.jsonl", texts(3000))
    wait_until(lambda: b"/3000" in screen.drawn and "└".encode() in screen.drawn, what="a bar and a chart")
    sealed = screen.drawn.count(b"checkpoint.sealed")
    wait_until(lambda: screen.drawn.count(b"checkpoint.sealed") > sealed, what="a line of the log above them")
    screen.type(b"\x03")
    assert screen.wait() == 0
    text = screen.drawn.decode()
    assert text.rindex("daemon.stopped") > text.rindex("/3000")
    assert text.endswith("\n")
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l")  # the cursor is there


def test_a_large_copy_shows_its_progress_on_a_terminal_alone(
    make_root: MakeRoot, terminal: Callable[..., Terminal], tmp_path: Path
) -> None:
    root = make_root(behaviour={})
    large = tmp_path / "large.jsonl"
    with large.open("wb") as file:
        file.write(b'{"text": "%s"}\n' % (b"x" * 1000) * 40_000)  # more than PROGRESS_BYTES
    submit = terminal(sys.executable, "-P", "-m", "daemon", "--root", str(root.path), "submit", str(large))
    assert submit.wait() == 0
    assert b"copying" in submit.drawn
    assert (root.settings.inbox_dir / "large.jsonl").stat().st_size == large.stat().st_size
    quiet = root.run("submit", str(large))
    assert (quiet.returncode, quiet.stderr) == (0, "")
    assert sorted(entry.name for entry in root.settings.inbox_dir.iterdir() if entry.is_file()) == [
        "large-2.jsonl",
        "large.jsonl",
    ]


def test_rollback_makes_an_earlier_version_current_and_the_next_job_continues_from_it(make_root: MakeRoot) -> None:
    root = make_root(behaviour={}, tables=ONE_ROW_A_STEP)
    root.start()
    for name in ("a", "b"):
        root.drop(f"{name}.jsonl", texts(5, name))
        root.finished(f"{name}.jsonl")
    done = root.run("rollback", "1")
    assert done.returncode == 0, done.stderr
    assert (root.settings.model_dir / "latest").resolve().name == "0001"
    wait_until(lambda: root.status()["model"]["version"] == "0001", 90, "the status to follow")  # type: ignore[index]
    root.drop("c.jsonl", texts(5, "c"))
    root.finished("c.jsonl")
    version = current_version(root.settings.model_dir)
    assert version is not None
    assert (version.name, version.record["parent"]) == ("0003", "0001")
    lineage = [json.loads(line) for line in (root.settings.model_dir / "lineage.jsonl").read_text().splitlines()]
    assert [(entry["event"], entry["version"]) for entry in lineage] == [
        ("promoted", "0001"), ("promoted", "0002"), ("rolled_back", "0001"), ("promoted", "0003"),
    ]  # fmt: skip
    assert root.run("rollback", "9").returncode == 4
    assert root.run("versions").stdout.index("0002") < root.run("versions").stdout.index("0003")
    root.stop()
    assert_sound(root)


def test_rollback_is_refused_while_a_job_runs_and_waits_for_its_end_when_asked(make_root: MakeRoot) -> None:
    root = make_root(behaviour={}, tables=ONE_ROW_A_STEP)
    root.start()
    root.drop("a.jsonl", texts(5, "a"))
    root.finished("a.jsonl")
    root.behave({"*": {"step_seconds": 0.02}})
    root.drop("b.jsonl", texts(150, "b"))
    job = root.running("b.jsonl")
    refused = root.run("rollback", "1")
    assert refused.returncode == 75
    assert job.id in refused.stderr
    waited = root.run("rollback", "1", "--after-job")
    assert waited.returncode == 0, waited.stderr
    assert f"waiting: job {job.id} is running" in waited.stdout
    finished = root.job("b.jsonl")
    assert finished is not None
    assert (finished.state, finished.version) == (JobState.SUCCEEDED, "0002")
    assert (root.settings.model_dir / "latest").resolve().name == "0001"
    root.stop()
    assert_sound(root)


def test_metrics_are_served_on_loopback_and_written_to_a_file(make_root: MakeRoot) -> None:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = make_root(
        behaviour={}, tables={**ONE_ROW_A_STEP, "metrics": {"port": port, "textfile": "state/dropforge.prom"}}
    )
    root.start()
    root.drop("a.jsonl", texts(20))
    root.finished("a.jsonl")

    def read() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
            return str(answer.read().decode())

    wait_until(lambda: 'dropforge_jobs{state="succeeded"} 1.0' in read(), what="the metrics")
    for line in ('outcome="succeeded"} 1.0', "dropforge_steps_trained_total 20.0", "dropforge_current_version 1.0"):
        assert line in read()
    wait_until(
        lambda: 'dropforge_jobs{state="succeeded"} 1.0' in (root.settings.state_dir / "dropforge.prom").read_text()
    )
    assert "dropforge_job_seconds_to_start_count 1.0" in read()
