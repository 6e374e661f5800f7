"""`make setup`: what it says, which torch it takes, and when it has nothing to do."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.root import REPOSITORY

NEXT = "Next: make demo"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(REPOSITORY / name, tmp_path)
    return tmp_path


def planned(clone: Path, *arguments: str) -> str:
    """What `make` would do, without doing it."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(
        ["make", "-n", "setup", *arguments], cwd=clone, capture_output=True, text=True, check=True, env=variables
    )
    subprocess.run(["sh", "-n"], input=done.stdout, text=True, check=True)  # what a shell cannot read is no plan
    return done.stdout


def installed(clone: Path, torch: str = "") -> None:
    (clone / ".venv").mkdir()
    (clone / ".venv" / ".installed").write_text(f"{torch}\n")


def test_setup_says_what_it_loads_and_what_comes_next(clone: Path) -> None:
    said = planned(clone)
    assert "2.9 GB" in said
    assert NEXT in said
    assert "--index-url" not in said


def test_a_torch_without_cuda_comes_from_its_own_index_and_nothing_else_does(clone: Path) -> None:
    said = planned(clone, "TORCH=cpu")
    assert "370 MB" in said
    (line,) = [line for line in said.splitlines() if "--index-url" in line]
    assert "--index-url https://download.pytorch.org/whl/cpu torch" in line
    assert "--no-deps" in line
    assert "--index-url https://mirror/simple torch" in planned(clone, "TORCH=cpu", "TORCH_INDEX=https://mirror/simple")


def test_what_was_asked_for_once_is_kept_and_another_torch_is_installed_anew(clone: Path) -> None:
    installed(clone, "cpu")
    for arguments in ((), ("TORCH=cpu",)):
        said = planned(clone, *arguments)
        assert "pip install" not in said
        assert NEXT in said
    assert "whl/cu128 torch" in planned(clone, "TORCH=cu128")
    os.utime(clone / "pyproject.toml", (2**31, 2**31))  # it changed since
    assert "whl/cpu torch" in planned(clone)
