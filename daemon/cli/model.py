"""Commands about the model directory: versions, guard."""

from __future__ import annotations

import typer

from daemon import show, versions
from daemon.cli.common import JsonFlag, app, out, print_json


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
        out.print(show.versions(found, current))
    else:
        out.print("no versions yet: nothing has been trained to its end")


@app.command(
    "guard",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def guard_command(context: typer.Context) -> None:
    """Fingerprints, verdicts, seals and clearing by hand: fingerprint | check | verify | clear | seal."""
    from guard.cli import main as guard_main

    raise typer.Exit(guard_main(context.args))
