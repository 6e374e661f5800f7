"""What is generated is up to date; what a document names exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from daemon.cli.init import sections
from daemon.cli.main import app
from daemon.config import Settings
from daemon.recipe import Section
from tests.support.root import REPOSITORY, environment


def test_generated_parts_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, "docs/generate.py", "--check"],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_every_command_that_the_readme_names_exists() -> None:
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}  # type: ignore[union-attr]
    commands |= {str(group.name) for group in app.registered_groups}
    named = set(re.findall(r"^dropforge (\w+)", (REPOSITORY / "README.md").read_text(), re.MULTILINE))
    assert named
    assert named <= commands


@pytest.mark.parametrize("word", ["mock", "TODO", "FIXME", "for now"])
def test_the_product_has_nothing_that_only_pretends(word: str) -> None:
    done = subprocess.run(
        ["git", "grep", "-nIw", word, "--", "daemon", "guard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == ""


@pytest.mark.parametrize(
    "path",
    [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))],
    ids=lambda path: path.name,
)
def test_every_file_that_a_document_links_to_exists(path: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", path.read_text())
    assert [link for link in links if "://" not in link and not (path.parent / link).exists()] == []


def test_every_setting_is_documented() -> None:
    text = (REPOSITORY / "docs" / "configuration.md").read_text()
    for name, section in sections(Settings):
        assert f"## [{name}]" in text
        assert all(
            field.description for field in section.model_fields.values() if not isinstance(field.default, Section)
        )


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_every_module_and_test_that_a_builder_s_document_names_exists(name: str) -> None:
    paths = re.findall(r"\b(?:daemon|guard|tests|docs)/[\w/.-]*\w/?", (REPOSITORY / name).read_text())
    assert len(paths) > 10
    assert [path for path in paths if not (REPOSITORY / path).exists()] == []
