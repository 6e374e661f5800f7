"""Commands about the model directory: versions, merge, guard."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from daemon import show, versions
from daemon.cli.common import JsonFlag, app, print_json
from daemon.cli.common import out as out_console
from daemon.errors import DropforgeError


@app.command("versions")
def list_versions(context: typer.Context, as_json: JsonFlag = False) -> None:
    """List finished adapters, oldest first; the current one is marked."""
    model_dir = context.obj.settings.model_dir
    found = versions.list_versions(model_dir)
    current = versions.current_version(model_dir)
    if as_json:
        print_json(
            [
                {**version.record, "version": version.name, "path": str(version.path), "current": version == current}
                for version in found
            ]
        )
    elif found:
        out_console.print(show.versions(found, current))
    else:
        out_console.print("no versions yet: nothing has been trained to its end")


@app.command("merge")
def merge(
    context: typer.Context,
    version: Annotated[str, typer.Argument(help="A version's number, or `latest`.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; it must not exist.")],
) -> None:
    """Write a version merged into its base model, in bfloat16, for programs that know no adapters."""
    settings = context.obj.settings
    found = versions.current_version(settings.model_dir) if version == "latest" else None
    found = found or versions.find_version(settings.model_dir, version)
    # In a process of its own: only the trainer's package imports torch.
    done = subprocess.run(
        [
            *(sys.executable, "-P", "-m", "daemon.trainer.merge"),
            *(str(found.path), str(out.absolute()), settings.recipe.model.model_dump_json()),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        told = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        told = {"error": (done.stderr.strip().splitlines() or ["it ended without a word"])[-1], "hint": ""}
    if "error" in told:
        raise DropforgeError(
            operation="merge", subject=f"version {found.name}", cause=told["error"], hint=told.get("hint", "")
        )
    out_size = f"{told['parameters']:,} parameters, {told['size_bytes'] / 1e6:,.1f} MB"
    out_console.print(f"version {found.name} merged into {out}: {out_size}")


@app.command(
    "guard",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def guard_command(context: typer.Context) -> None:
    """Fingerprints, verdicts, seals and clearing by hand: fingerprint | check | verify | clear | seal."""
    from guard.cli import main as guard_main

    raise typer.Exit(guard_main(context.args))
