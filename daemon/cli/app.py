"""What every command shares: the application, the place it works on, how it prints and how it fails."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from daemon import config
from daemon.cli.account import access_to, require_own_account, require_reader
from daemon.errors import NotFound
from daemon.store import JobStore, is_made, open_for_reading

app = typer.Typer(
    name="dropforge",
    help="Drop a dataset, forge a model: continuous LoRA training of every .jsonl file that is dropped into a folder.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# The parts of `dropforge --help`, in their order.
BEGIN, DATA, WATCH, QUEUE, MODEL, MACHINE = "Begin", "Data", "Watch", "Queue", "Model", "Machine"
# What goes into a file or a pipe is not cut to a terminal's width.
out = Console(
    highlight=False,
    markup=False,
    soft_wrap=True,
    width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 1000,
)
# Commands that write nothing into the root, or drop a file as anybody does; config, guard and memory decide for themselves.
READERS = frozenset(
    {
        *(
            "backup",
            "check",
            "completion",
            "config",
            "demo",
            "doctor",
            "evals",
            "guard",
            "jobs",
            "logs",
            "memory",
            "merge",
        ),
        *("notify", "plot", "preview", "service", "show", "status", "submit", "versions"),
    }
)
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


@dataclass(frozen=True, kw_only=True)
class RootContext:
    """Which root a command works on."""

    root: Path
    command: str = ""

    @property
    def settings(self) -> config.Settings:
        """The root's settings, read when a command needs them.

        Raises NotFound when there is no such folder, ConfigError when this account may not read it, or the command changes it
        and this account may not do that.
        """
        if not self.root.is_dir():
            raise NotFound(
                operation="use",
                subject=self.root,
                cause="there is no such folder",
                hint="`dropforge init` makes a root",
            )
        require_reader(self.root)
        settings = config.load(self.root)
        if self.command not in READERS:
            require_own_account(settings)
        return settings

    def not_yet(self, operation: str, path: Path, cause: str) -> NotFound:
        """The error for what a daemon makes and none has made; in a folder that is no root, it says that."""
        hint = access_to(config.load(self.root)).run_hint
        if not (self.root / config.CONFIG_NAME).exists():
            hint = f"{self.root} has no {config.CONFIG_NAME}: is it the root? --root or DROPFORGE_ROOT names another"
        return NotFound(operation=operation, subject=path, cause=cause, hint=hint)


@contextmanager
def existing_store(context: typer.Context) -> Iterator[JobStore]:
    """The root's job store, for a command that reads also where this account may not write.

    Raises NotFound when no daemon has made one yet, or the one that it made is emptied.
    """
    path = context.obj.settings.store_path
    if not is_made(path):
        cause = "it is empty: what it held is lost" if path.exists() else "there is no queue on this root yet"
        raise context.obj.not_yet("open", path, cause)
    store = open_for_reading(path)
    try:
        yield store
    finally:
        store.close()


def print_json(value: object) -> None:
    """Plain JSON to stdout, never coloured or wrapped."""
    print(json.dumps(value, indent=1, ensure_ascii=True))


def complain(text: str, code: int) -> int:
    """Print an error to stderr; returns its exit code."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)
    return code
