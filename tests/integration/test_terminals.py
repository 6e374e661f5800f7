"""Where a command is started from: a terminal that cannot show a name, a locale without UTF-8, any umask, no home."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import typer.main

from daemon.cli.main import app
from daemon.job import JobState
from tests.support.forked import ForkServer
from tests.support.root import DROPFORGE, Root, environment

NAME = os.fsdecode("Grüße-日本-\u202e-".encode() + b"\xff.jsonl")
LOCALES = {
    "a terminal of ASCII": {"PYTHONIOENCODING": "ascii"},
    "the C locale": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}
# Of every command a call that prints the names that it knows. LAST: the newest job.
CALLS = {
    "init": "init",
    "demo": "demo --help",
    "status": "status",
    "jobs": "jobs",
    "show": "show LAST",
    "logs": "logs",
    "submit": "submit --no-check NAME",
    "check": "check NAME",
    "preview": "preview NAME",
    "cancel": "cancel LAST",
    "retry": "retry LAST",
    "run": "run --once",  # what was retried and submitted is found by its name
    "move": "move LAST --first",
    "pause": "pause --reason NAME",
    "resume": "resume",
    "plot": "plot NAME",
    "evals": "evals",
    "versions": "versions",
    "merge": "merge NAME",
    "rollback": "rollback NAME",
    "promote": "promote NAME",
    "discard": "discard NAME",
    "compare": "compare NAME NAME",
    "adopt": "adopt",
    "guard": "guard fingerprint NAME",
    "doctor": "doctor",
    "completion": "completion bash",
    "config": "config",
    "memory": "memory",
    "notify": "notify test",
    "backup": "backup NAME",
    "restore": "restore NAME --root NAME",
    "service": "service install --dry-run --user",
}


def commands() -> Iterator[str]:
    return iter(typer.main.get_group(app).commands)


# Each of them starts two interpreters in the C locale: those that print the names of files, in a quick run.
PRINTING = ("status", "jobs", "show", "logs", "submit", "retry", "run")


def test_every_command_is_called_here() -> None:
    missing = set(commands()) - CALLS.keys()
    assert not missing, f"commands without a call here: {missing}"


@pytest.mark.parametrize(
    ("where", "called"),
    [
        pytest.param("a terminal of ASCII", tuple(CALLS), id="a terminal of ASCII"),
        pytest.param("the C locale", PRINTING, id="the C locale"),
        pytest.param("the C locale", tuple(CALLS), id="the C locale, every command", marks=pytest.mark.chaos),
    ],
)
def test_no_command_ends_in_a_traceback_over_a_name_that_cannot_be_shown(
    make_root: Callable[..., Root], tmp_path: Path, where: str, called: Sequence[str]
) -> None:
    root = make_root(behaviour={})
    beside = tmp_path / NAME
    beside.write_bytes(b'{"text": "a"}\nno row\n')
    root.drop(NAME, beside)
    assert root.run("run", "--once").returncode == 3
    job = root.job(NAME)
    assert job is not None
    env = {**environment(), **LOCALES[where]}
    in_locale = (
        ForkServer(env, training=True) if "LC_ALL" not in LOCALES[where] else None
    )  # there a command starts anew
    shown = {}
    for command in called:
        words = [word.replace("LAST", job.id).replace("NAME", str(beside)) for word in CALLS[command].split()]
        arguments = ["--root", str(root.path), *words]
        done: subprocess.CompletedProcess[str] = (
            in_locale.run(arguments, env=env, timeout=120)
            if in_locale is not None
            else subprocess.run(
                [*DROPFORGE, *arguments],
                env=env, capture_output=True, check=False, timeout=120, encoding="latin-1",
            )
        )  # fmt: skip
        told = done.stdout + done.stderr
        assert "Traceback" not in told, f"{command}: {told}"
        assert "Encode" not in told, f"{command}: {told}"
        shown[command] = told
    assert "Gr\\xfc" in shown["jobs"] or "Grü" in shown["jobs"], shown["jobs"]
    assert [job.state for job in root.jobs()] == [JobState.REJECTED] * 2


@pytest.mark.parametrize("umask", ["000", "077"])
def test_nothing_is_writable_by_everybody_whatever_the_umask(make_root: Callable[..., Root], umask: str) -> None:
    """A job goes its whole way, and no folder or file that it made may be written by others."""
    root = make_root(behaviour={}, through=("sh", "-c", f'umask {umask}; exec "$@"', "sh"))
    for folder in (root.settings.inbox_dir, root.settings.model_dir, root.settings.state_dir):
        folder.rmdir()
    root.start()
    root.drop("a.jsonl", [{"text": "a"}, {"text": "b"}])
    assert root.finished("a.jsonl").state is JobState.SUCCEEDED
    root.drop("bad.jsonl", b"no row\n")
    assert root.finished("bad.jsonl").state is JobState.REJECTED
    assert root.stop() == 0
    made = [path for path in root.path.rglob("*") if not path.is_symlink()]
    assert len(made) > 40
    open_to_all = [str(path) for path in made if stat.S_IMODE(path.stat().st_mode) & 0o002]
    assert not open_to_all


def test_a_service_without_a_home_trains(make_root: Callable[..., Root], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    root = make_root(behaviour={})
    root.start()
    root.drop("a.jsonl", [{"text": "a"}])
    assert root.finished("a.jsonl").state is JobState.SUCCEEDED
    assert root.run("doctor", "--json").stderr == ""
    assert root.stop() == 0


def test_a_service_of_few_descriptors_trains(make_root: Callable[..., Root]) -> None:
    """64 are enough for daemon, children and trainer."""
    root = make_root(behaviour={}, through=("sh", "-c", 'ulimit -n 64; exec "$@"', "sh"))
    root.start()
    for number in range(12):
        root.drop(f"{number}.jsonl", [{"text": f"row {number}"}])
    assert {root.finished(f"{number}.jsonl").state for number in range(12)} == {JobState.SUCCEEDED}
    assert root.stop() == 0
