"""The `dropforge` command line: options that all commands share, exit codes, and how errors are printed."""

from __future__ import annotations

import codecs
import io
import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

import guard
from daemon import config
from daemon.cli.app import RootContext, app, complain, out
from daemon.cli.arguments import in_plain_words, reorder
from daemon.errors import DropforgeError
from daemon.text import plain_characters

# Each adds its commands to the application, in the order in which help shows them.
from daemon.cli import service, jobs, plot, model, pruning, memory, admin, backup, settings, notify  # isort: skip

__all__ = [
    "admin",
    "app",
    "backup",
    "jobs",
    "main",
    "memory",
    "model",
    "notify",
    "plot",
    "pruning",
    "service",
    "settings",
]


def main() -> NoReturn:
    """Run the command line; every foreseeable error is one sentence, a hint and the exit code of its class."""
    prepare_process()
    code = 1
    try:
        application = typer.main.get_command(app)
        arguments = reorder(sys.argv[1:], application)
        code = int(application(arguments, standalone_mode=False, prog_name="dropforge") or 0)
    except DropforgeError as error:
        code = complain(str(error), error.exit_code)
    except guard.GuardError as error:
        code = complain(str(error), error.exit_code)
    except typer.Exit as stop:
        code = stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except BrokenPipeError:  # `dropforge jobs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:  # click's usage errors, which know how to show themselves
        if not hasattr(error, "exit_code") or not hasattr(error, "show"):
            raise
        if isinstance(message := getattr(error, "message", None), str):
            error.message = in_plain_words(message)  # type: ignore[attr-defined]  # its class is not the library's interface
        error.show()
        code = int(error.exit_code)
    sys.exit(code)


def prepare_process() -> None:
    """Make names of any bytes usable and printable, and nothing that we make writable for everybody.

    In a locale that is not UTF-8 the interpreter is started again in its UTF-8 mode: names on disk are bytes, and every
    process of a root has to read the same text in them. The terminal keeps its own encoding.
    """
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        shown = getattr(sys.stdout, "encoding", None) or "ascii"
        environment = {**os.environ, "PYTHONUTF8": "1", "PYTHONIOENCODING": f"{shown}:backslashreplace"}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)  # noqa: S606  our own command line
    codecs.register_error("plain", plain_characters)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="plain")
    os.umask(os.umask(0o077) | 0o002)


def _print_version(requested: bool) -> None:
    if requested:
        from importlib.metadata import version

        out.print(f"dropforge {version('dropforge')}")
        raise typer.Exit


@app.callback()
def root_options(
    context: typer.Context,
    root: Annotated[
        Path | None,
        typer.Option("--root", readable=False, help="Folder with dropforge.toml (DROPFORGE_ROOT; default: here)."),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options that every command shares."""
    context.obj = RootContext(root=config.find_root(root), command=context.invoked_subcommand or "")
