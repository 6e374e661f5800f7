"""Imports run one way, and each in a clean process: a daemon that loads torch would hold 400 MB for months."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.root import environment


def modules_after(statement: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-P", "-c", f"{statement}\nimport sys\nprint(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
    )
    return set(done.stdout.split())


@pytest.mark.parametrize("module", ["daemon.service", "daemon.cli.main", "daemon.trainer.attempt", "daemon.cli.demo"])
def test_the_daemon_never_loads_the_training_libraries(module: str) -> None:
    loaded = modules_after(f"import {module}")
    assert not loaded & {"torch", "transformers", "peft", "accelerate", "numpy"}


def test_a_command_loads_nothing_that_only_the_daemon_or_the_doctor_uses() -> None:
    """Completion asks for every word that is typed: what a command does not need costs a person's time."""
    loaded = modules_after("import daemon.cli.main")
    assert not {name for name in loaded if name.partition(".")[0] in ("watchdog", "prometheus_client")}
    assert not loaded & {"daemon.cli.doctor", "daemon.service", "daemon.scheduler"}


def test_a_command_loads_nothing_that_only_some_commands_use() -> None:
    """What reads and checks datasets, saves roots and reads variables is loaded by who does one of these."""
    loaded = modules_after("import dropforge, daemon.cli.main")
    packages = ("daemon.backup", "pydantic_settings", "asyncio", "rich.markdown")
    assert not {name for name in loaded if name.startswith(packages)}
    assert not loaded & {
        "daemon.dataset.rows",
        "daemon.dataset.scan",
        "daemon.dataset.validate",
        "daemon.dataset.convert",
    }


def test_the_guard_knows_nothing_of_the_daemon() -> None:
    loaded = modules_after("import guard, guard.cli")
    assert not {name for name in loaded if name.partition(".")[0] in ("daemon", "torch", "transformers", "msgspec")}


def test_the_import_name_daemon_is_ours() -> None:
    """Another distribution owns this import name too; the console script must load this one."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", "import daemon.cli.main, daemon; print(daemon.__doc__)"],
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
    )
    assert "dropping files" in done.stdout
