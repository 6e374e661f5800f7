"""What the documents tell people to type is typed here, or in tests/system where it takes a machine of its own."""

from __future__ import annotations

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer.main

from daemon import config
from daemon.cli.main import app
from daemon.config import Settings
from daemon.holds import HoldKind
from daemon.job import JobState
from daemon.observability.status import read_status
from tests.support.documents import OPERATIONS, README, blocks, commands_of
from tests.support.root import REPOSITORY, Root, environment, wait_until
from tests.support.sound import assert_sound

DOCUMENTS = (README, *sorted((REPOSITORY / "docs").glob("*.md")), REPOSITORY / "examples" / "README.md")
# Every section that tells people to type something, and where that is done. A new one belongs here, and into a test.
TYPED = {
    (README, "Try it"): "the makefile's own targets: whoever runs this has run `make test`, and CI runs it",
    (README, "Quick start on a GPU machine"): "below",
    (README, "As a service"): "tests/system/test_first_hour.py",
    (README, "The guard on its own"): "below",
    (OPERATIONS, "Install"): "tests/system/machine.py",
    (OPERATIONS, "First hour"): "tests/system/test_first_hour.py",
    (OPERATIONS, "Upgrade"): "tests/system/test_first_hour.py",
    (OPERATIONS, "Uninstall"): "tests/system/test_first_hour.py",
    (OPERATIONS, "Backup and restore"): "below",
    (OPERATIONS, "Moving a root"): "below",
    (OPERATIONS, "Completion"): "tests/unit/test_cli_operations.py runs the scripts; this file looks at the paths",
}
# What a quick start has that cannot be done here, each with its reason.
NOT_HERE = {
    "git clone": "needs the network; this is the clone",
    "make setup": "it made the environment that this runs in",
    "export PATH": "this environment is on the path",
    "hf download": "needs the network",
    "dropforge run": "does not return; it is started beside",
    "dropforge status --watch": "does not return; tests/integration/test_ops.py draws it on a terminal",
}


@pytest.fixture
def path_with_dropforge(tmp_path: Path) -> str:
    """A PATH on which `dropforge` and `python` are this checkout's."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, words in (("dropforge", "-P -m daemon"), ("python", "-P")):
        (folder / name).write_text(f'#!/bin/sh\nexec {sys.executable} {words} "$@"\n')
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def type_in(script: str, folder: Path, path: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-euc", script], capture_output=True, text=True, check=False, cwd=folder,
        env={**environment(), "PATH": path, **variables},
    )  # fmt: skip


def possible_here(script: str) -> str:
    return "\n".join(line for line in script.splitlines() if not line.startswith(tuple(NOT_HERE)))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_block_says_what_it_is_and_every_command_is_typed_somewhere(path: Path) -> None:
    commands = re.compile(
        r"^\s*(dropforge|python\S*|pip|make|git|systemctl|journalctl|cp|sudo|useradd|hf) ", re.MULTILINE
    )
    for block in blocks(path):
        text = "\n".join(block.lines)
        assert block.kind in ("sh", "python", "logrotate", "text", "toml"), (
            f"a block of {block.heading} does not say what it is"
        )
        if block.kind == "toml":
            Settings.model_validate(tomllib.loads(text))
        if block.kind == "sh":
            assert (path, block.heading) in TYPED
        elif block.kind == "python":
            ast.parse(text)
        elif block.kind == "text":  # tests/system/test_service.py has logrotate read the other kind
            assert not commands.search(text), text


def test_what_is_said_to_be_typed_is_there() -> None:
    told = {(path, block.heading) for path in DOCUMENTS for block in blocks(path) if block.kind == "sh"}
    assert told == set(TYPED)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_command_that_a_text_names_exists_with_its_options(path: Path) -> None:
    known: Any = typer.main.get_command(app)
    for told in re.findall(r"`dropforge ([^`]+)`", path.read_text()):
        words = told.split()
        command = known
        while words and words[0].startswith("-"):  # of dropforge itself
            words = words[2:]
        while words and hasattr(command, "commands") and not words[0].startswith("-"):
            assert words[0] in command.commands, told
            command = command.commands[words.pop(0)]
        options = {option for parameter in command.params for option in parameter.opts} | {"-h", "--help"}
        if command.name != "guard":  # it has a parser of its own
            assert {word for word in words if re.match("--?[a-z]", word)} <= options, told


def test_the_readme_s_quick_start(
    tmp_path: Path, path_with_dropforge: str, make_root: Callable[..., Root], tiny_base: Path
) -> None:
    """A new root, its model set, a daemon on it; then what is typed in another terminal, on a root that trains quickly."""
    begin, use = commands_of(README, "Quick start on a GPU machine")
    done = type_in(possible_here(begin), tmp_path, path_with_dropforge, HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    forge = tmp_path / "forge"
    assert config.load(forge).model.model_name_or_path == "Qwen/Qwen2.5-0.5B-Instruct"
    daemon = subprocess.Popen(
        ["bash", "-euc", "exec dropforge run"], cwd=forge, env={**environment(), "PATH": path_with_dropforge},
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_until(
            lambda: (read_status(forge / "state" / "status.json") or {}).get("status") == "idle", what="a daemon"
        )
        daemon.send_signal(signal.SIGINT)
        assert daemon.wait(30) == 0
    finally:
        daemon.kill()
        daemon.wait()

    root = make_root(behaviour={})
    root.configure(model={"model_name_or_path": str(tiny_base)})  # a preview asks its tokenizer
    (root.path / "data.jsonl").write_text('{"text": "a row"}\n' * 5)
    root.start()
    done = type_in(possible_here(use), root.path, path_with_dropforge)
    assert done.returncode == 0, done.stderr
    assert "5 rows" in done.stdout
    assert "the queue is paused" in done.stdout
    assert (root.status() or {}).get("status") in ("idle", "training", "waiting", "paused")


def test_the_readme_s_guard_commands(tmp_path: Path, path_with_dropforge: str) -> None:
    (script,) = commands_of(README, "The guard on its own")
    (tmp_path / "data.jsonl").write_text('{"text": "a row"}\n')
    (tmp_path / "out" / "checkpoint-10").mkdir(parents=True)  # somebody else's, without a seal
    (tmp_path / "out" / "checkpoint-10" / "trainer_state.json").write_text("{}")
    codes = {}
    for command in script.splitlines():
        done = type_in(command, tmp_path, path_with_dropforge)
        assert done.stdout, done.stderr
        codes[command.split()[3]] = done.returncode
    assert codes == {"fingerprint": 0, "check": 3, "verify": codes["verify"], "clear": 0, "purge": 0}
    assert (tmp_path / "out" / "checkpoint-10").is_dir()  # --dry-run


@pytest.fixture
def installed(tmp_path: Path, make_root: Callable[..., Root], path_with_dropforge: str) -> Root:
    """A root with a version and a queued job where the document has /var/lib/dropforge; its engine lies outside."""
    (tmp_path / "bin" / "systemctl").write_text("#!/bin/sh\n")
    (tmp_path / "bin" / "systemctl").chmod(0o755)
    for name in ("carry", "backup", "new"):
        (tmp_path / "mnt" / name).mkdir(parents=True)
    root = make_root("var/lib/dropforge", behaviour={})
    (tmp_path / "behaviour.json").write_text("{}")
    root.configure(executor={"command": (*root.tables["executor"]["command"][:-1], str(tmp_path / "behaviour.json"))})
    root.drop("a.jsonl", [{"text": f"a {number}"} for number in range(8)])
    assert root.run("run", "--once").returncode == 0
    root.start()
    assert root.run("pause").returncode == 0
    root.drop("b.jsonl", [{"text": f"b {number}"} for number in range(8)])
    wait_until(lambda: (job := root.job("b.jsonl")) and job.state is JobState.QUEUED, what="the job to be queued")
    assert root.stop() == 0
    assert root.run("resume").returncode == 0
    return root


def placed(script: str, tmp_path: Path) -> str:
    """A script of the document with its places below a folder; doctor's verdict is about this machine."""
    here = script.replace("/var/lib/", f"{tmp_path}/var/lib/").replace("/mnt/", f"{tmp_path}/mnt/")
    return re.sub(r"^(.* doctor)$", r"\1 || true", here, flags=re.MULTILINE)


def assert_goes_on(root: Root) -> None:
    done = root.run("run", "--once")
    assert done.returncode == 0, done.stderr
    assert root.job("b.jsonl").version == "0002"  # type: ignore[union-attr]
    assert_sound(root)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_root_is_moved_as_the_document_tells(
    installed: Root, tmp_path: Path, path_with_dropforge: str, number: int
) -> None:
    """By backup and restore, rsync and tar: the new place trains what was queued in the old one, on from its version."""
    script = commands_of(OPERATIONS, "Moving a root")[number]
    if "rsync" in script and shutil.which("rsync") is None:
        pytest.skip("rsync is not installed")
    done = type_in(placed(script, tmp_path), tmp_path, path_with_dropforge)
    assert done.returncode == 0, done.stderr
    installed.path = tmp_path / "mnt" / "new" / "dropforge"
    assert_goes_on(installed)


def test_a_root_is_backed_up_and_restored_as_the_document_tells(
    installed: Root, tmp_path: Path, path_with_dropforge: str
) -> None:
    begin, back = commands_of(OPERATIONS, "Backup and restore")
    done = type_in(placed(begin, tmp_path), tmp_path, path_with_dropforge)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(installed.settings.model_dir)
    done = type_in(placed(back, tmp_path), tmp_path, path_with_dropforge)
    assert done.returncode == 0, done.stderr
    assert_goes_on(installed)


def test_every_kind_of_hold_is_told_of(tmp_path: Path) -> None:
    section = OPERATIONS.read_text().split("## What holds the queue")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == {kind.value for kind in HoldKind}


def test_completion_is_put_where_a_shell_looks_for_it(tmp_path: Path, path_with_dropforge: str) -> None:
    (script,) = commands_of(OPERATIONS, "Completion")
    for folder in (".config/fish/completions", "etc/bash_completion.d"):
        (tmp_path / folder).mkdir(parents=True)
    done = type_in(script.replace("/etc/", f"{tmp_path}/etc/"), tmp_path, path_with_dropforge, HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "complete -o default -F" in (tmp_path / "etc" / "bash_completion.d" / "dropforge").read_text()
    assert "completion zsh" in (tmp_path / ".zshrc").read_text()
    assert "complete --command dropforge" in (tmp_path / ".config/fish/completions/dropforge.fish").read_text()
