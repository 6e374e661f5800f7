"""The `dropforge` command's entry point: load our package `daemon`, or say which other one is in its place.

PyPI's python-daemon has the import name `daemon` too. Side by side in one folder both load; this module has a name that is
ours alone, so it can answer when the other one is found first.
"""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import NoReturn

EXIT_USAGE = 2


def main() -> NoReturn:
    """Run the command line; exits with code 2 and one sentence when another package is found as `daemon`."""
    folders = daemon_folders()
    if folders and not any((folder / "cli" / "app.py").is_file() for folder in folders):
        sys.exit(complain(folders[0]))
    from daemon.cli.main import main as run

    run()


def daemon_folders() -> list[Path]:
    """Where Python finds the package `daemon`; empty when it finds none."""
    spec = PathFinder.find_spec("daemon")
    return [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec is not None else []


def complain(folder: Path) -> int:
    """Name the package in `folder` and the way out on stderr; returns the exit code."""
    from importlib.metadata import packages_distributions, version  # a tenth of a command's start, else for nothing

    others = sorted(set(packages_distributions().get("daemon", ())) - {"dropforge"})
    owner = f"the package {others[0]} {version(others[0])}" if others else "another package"
    print(
        f"cannot start dropforge: {owner} has the import name `daemon` too and is found first, in {folder}\n"
        "hint: install dropforge into a virtual environment of its own"
        + (f", or take the other one out of this one: `pip uninstall {others[0]}`" if others else ""),
        file=sys.stderr,
    )
    return EXIT_USAGE


if __name__ == "__main__":
    main()
