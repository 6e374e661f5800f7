"""A hint names a command that works in the state in which the hint is given: each is followed, as a person would."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

from daemon.job import JobState
from tests.support.root import Root, dropforge, wait_until

MakeRoot = Callable[..., Root]
MENTION = re.compile(r"`dropforge (?:--root \S+ )?([^`]*)`")


def hint_of(said: str, begins: str) -> list[str]:
    """The words of the one command of this beginning that a text tells people to type."""
    found = list(dict.fromkeys(line for line in MENTION.findall(" ".join(said.split())) if line.startswith(begins)))
    assert len(found) == 1, (begins, said)
    return shlex.split(found[0])


def follow(root: Root, said: str, begins: str, **fillings: str) -> None:
    """Type the hint, with what a person fills in for its capitals."""
    words = [fillings.get(word, word) for word in hint_of(said, begins)]
    done = root.run(*words)
    assert done.returncode == 0, (words, done)


def test_what_a_folder_that_is_no_root_is_told_makes_it_one(tmp_path: Path) -> None:
    said = dropforge("--root", str(tmp_path), "run").stderr
    assert dropforge("--root", str(tmp_path), *hint_of(said, "init")).returncode == 0
    # And what a root without a base model is told then is no command that refuses there.
    said = dropforge("--root", str(tmp_path), "run", "--once").stderr
    words = ["base" if word == "NAME" else word for word in hint_of(said, "config set")]
    (tmp_path / "base").mkdir()
    assert dropforge("--root", str(tmp_path), *words).returncode == 0


def test_every_hint_is_followed_in_the_state_in_which_it_is_given(make_root: MakeRoot, tmp_path: Path) -> None:
    root = make_root(behaviour={})
    said = root.run("jobs").stderr
    assert hint_of(said, "run") == ["run"]
    root.start()
    root.drop("a.jsonl", [{"text": "row"}])
    done = root.finished("a.jsonl")
    assert done.state is JobState.SUCCEEDED
    copy = tmp_path / "again.jsonl"
    copy.write_text('{"text": "row"}\n')
    table = tmp_path / "table.csv"
    table.write_text("prompt,completion\na,b\n")
    states: tuple[tuple[tuple[str, ...], str, dict[str, str]], ...] = (
        (("run",), "status", {}),
        (("show", "nosuch"), "jobs", {}),
        (("cancel", "nosuch"), "jobs", {}),
        (("rollback", "9"), "versions", {}),
        (("memory", "forget", "nosuch"), "memory", {}),
        (("config", "set", "nosuch", "1"), "config", {}),
        (("status", "--watch", "--json"), "status --json", {}),
        (("logs", "nosuch"), "jobs", {}),
    )
    for command, begins, fillings in states:
        refused = root.run(*command)
        assert refused.returncode not in (0, 1) or command == ("logs", "nosuch"), refused
        follow(root, refused.stderr, begins, **fillings)
    said = root.run("retry", done.id).stderr
    assert hint_of(said, "submit") == ["submit", "--force"]
    assert root.run("submit", "--force", str(copy), "--no-check").returncode == 0
    follow(root, root.run("check", str(table)).stdout, "submit", **{str(table): str(table)})

    assert root.run("pause").returncode == 0
    status = wait_until(lambda: (now := root.status()) and now["status"] == "paused" and now, what="paused")
    assert status
    follow(root, str(status["reason"]), "resume")
    root.drop("bad.jsonl", b"{")
    bad = root.finished("bad.jsonl")
    report = (root.settings.inbox_dir / "failed" / bad.id / "report.txt").read_text()
    for line in MENTION.findall(report):
        words = [str(copy) if word == "FILE" else word for word in shlex.split(line)]
        assert root.run(*words).returncode == 0, words

    assert root.stop() == 0
    moved = root.settings.inbox_dir.rename(tmp_path / "away")
    said = root.run("run", "--once").stderr
    assert moved.is_dir()
    follow(root, said, "adopt")
    assert root.run("run", "--once").returncode == 0
