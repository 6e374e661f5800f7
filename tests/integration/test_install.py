"""Installed from its wheel, beside a package that has the import name `daemon` too, as PyPI's python-daemon has."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.support.root import REPOSITORY

# The other package as its wheel has it: python-daemon 3.1 imports a module of its own in `daemon/__init__.py`.
OTHER_FILES = {
    "daemon/__init__.py": "from .daemon import DaemonContext\n__all__ = ['DaemonContext']\n",
    "daemon/daemon.py": "class DaemonContext:\n    pass\n",
    "python_daemon-3.1.2.dist-info/METADATA": "Metadata-Version: 2.1\nName: python-daemon\nVersion: 3.1.2\n",
    "python_daemon-3.1.2.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
}


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Our wheel and the other one, by the import name's owner."""
    folder = tmp_path_factory.mktemp("wheels")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=REPOSITORY, check=True, capture_output=True,
    )  # fmt: skip
    other = folder / "python_daemon-3.1.2-py3-none-any.whl"
    record = "python_daemon-3.1.2.dist-info/RECORD"
    with zipfile.ZipFile(other, "w") as archive:
        for name, text in {**OTHER_FILES, record: "".join(f"{name},,\n" for name in (*OTHER_FILES, record))}.items():
            archive.writestr(name, text)
    return {"ours": next(folder.glob("dropforge-*.whl")), "theirs": other}


class Installation:
    """A virtual environment of its own that shares nothing with this one but our dependencies."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False)
        self.bin = folder / "bin"
        (site,) = folder.glob("lib/python*/site-packages")
        # A path that a .pth file names is searched, and .pth files in it are not read: no checkout comes along.
        (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def pip(self, *arguments: str) -> None:
        subprocess.run(
            [sys.executable, "-m", "pip", "--python", str(self.bin / "python"), *arguments],
            check=True, capture_output=True,
        )  # fmt: skip

    def install(self, *what: str) -> None:
        self.pip("install", "--quiet", "--no-index", "--no-deps", "--ignore-installed", *what)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return subprocess.run(
            [str(self.bin / command[0]), *command[1:]], capture_output=True, text=True, check=False, env=environment
        )


@pytest.mark.parametrize("order", [("ours", "theirs"), ("theirs", "ours")], ids=["ours first", "theirs first"])
def test_dropforge_works_whichever_of_the_two_was_installed_last(
    tmp_path: Path, wheels: dict[str, Path], order: tuple[str, str]
) -> None:
    """Both wheels put files into one folder `daemon`; the doctor says so, since the other one may be what breaks."""
    place = Installation(tmp_path / "venv")
    for owner in order:
        place.install(str(wheels[owner]))
    root = tmp_path / "root"
    for command in ("dropforge", "python"):
        module = ("-P", "-m", "daemon") if command == "python" else ()
        assert place.run(command, *module, "--version").stdout.startswith("dropforge ")
    assert place.run("dropforge", "--root", str(root), "init").returncode == 0
    units = place.run("dropforge", "--root", str(root), "service", "install", "--dry-run")
    assert f"ExecStart={place.bin}/python -P -m daemon" in units.stdout, "the templates are not in the wheel"
    told = " ".join(place.run("dropforge", "--root", str(root), "doctor").stdout.split())
    assert "python-daemon 3.1.2 has the import name `daemon` too" in told

    place.pip("uninstall", "--quiet", "--yes", "python-daemon")
    assert place.run("dropforge", "--root", str(root), "jobs").returncode == 4, (
        "no longer runs after the other one left"
    )


def test_a_package_that_is_found_first_is_named_with_the_way_out(tmp_path: Path, wheels: dict[str, Path]) -> None:
    """An editable install is searched last, so the other package hides it whole."""
    place = Installation(tmp_path / "venv")
    place.install(str(wheels["theirs"]))
    place.install("--no-build-isolation", "--editable", str(REPOSITORY))
    done = place.run("dropforge", "--version")
    sentence, hint = done.stderr.splitlines()
    assert done.returncode == 2
    assert "python-daemon 3.1.2 has the import name `daemon` too" in sentence
    assert str(tmp_path) in sentence
    assert "pip uninstall python-daemon" in hint

    place.pip("uninstall", "--quiet", "--yes", "python-daemon")
    assert place.run("dropforge", "--version").stdout.startswith("dropforge ")
