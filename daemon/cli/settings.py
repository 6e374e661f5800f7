"""Commands about settings: config, config check, config set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from daemon.cli.app import MACHINE, JsonFlag, app, out, print_json
from daemon.cli.init import toml_value
from daemon.config import CONFIG_NAME
from daemon.errors import ConfigError, InvalidSettings
from daemon.text import escape, printable

if TYPE_CHECKING:  # it is imported by the commands that need it
    from daemon.cli.settings_file import Change

config_app = typer.Typer(help="Show every setting and where it comes from; check or change them.")
app.add_typer(config_app, name="config", rich_help_panel=MACHINE)


@config_app.callback(invoke_without_command=True)
def show_settings(context: typer.Context, as_json: JsonFlag = False) -> None:
    """Show every setting and where it comes from: a line of dropforge.toml, a variable, or its default."""
    if context.invoked_subcommand is not None:
        return
    from daemon.cli.settings_file import effective_settings

    root = context.obj.settings.root
    found = effective_settings(root)
    if as_json:
        listed = [
            {
                "key": item.key,
                "value": _plain(item.value),
                "default": _plain(item.default),
                "source": item.source,
                "line": item.line,
                "variable": item.variable or None,
            }
            for item in found
        ]
        print_json({"root": str(root), "file": str(root / CONFIG_NAME), "settings": listed})
        return
    lines = [(f"{item.key} = {printable(toml_value(item.value), most=1000)}", item.place) for item in found]
    for left, right in lines:
        out.print(f"{left:<52}  # {right}", markup=False)


@config_app.command("check")
def check_settings(context: typer.Context, as_json: JsonFlag = False) -> None:
    """Say what a daemon would say of the settings when it starts. Exit 2 with every fault.

    Example: dropforge config check --json
    """
    from daemon.cli.settings_file import Source, effective_settings

    root = context.obj.root
    place = {"root": str(root), "file": str(root / CONFIG_NAME)}
    try:
        root = context.obj.settings.root
        chosen = [item for item in effective_settings(root) if item.source is not Source.DEFAULT]
    except ConfigError as error:
        if not as_json:
            raise
        found = list(error.faults) if isinstance(error, InvalidSettings) else [error.cause]
        print_json({**place, "valid": False, "faults": found, "hint": error.hint})
        raise typer.Exit(error.exit_code) from error
    if as_json:
        print_json({**place, "valid": True, "faults": [], "hint": "", "not_default": [item.key for item in chosen]})
        return
    count = f"{len(chosen)} {'setting is' if len(chosen) == 1 else 'settings are'} not left at the default"
    missing = "" if (root / CONFIG_NAME).exists() else f"; there is no {CONFIG_NAME}"
    out.print(f"the settings of {escape(str(root))} are valid: {count}{missing}", markup=False)


@config_app.command("unset")
def unset_setting(
    context: typer.Context,
    keys: Annotated[list[str], typer.Argument(metavar="KEY...", help="KEY as training.learning_rate.")],
) -> None:
    """Take settings out of dropforge.toml, so that they have their defaults; comments and order stay.

    Example: dropforge config unset training.learning_rate
    """
    from daemon.cli.settings_file import unset_values

    changes = unset_values(context.obj.root, keys)
    for change in changes:
        if change.setting is None:
            out.print(f"{escape(change.key)} is taken out: there is no such setting", markup=False)
            continue
        in_effect = printable(toml_value(change.setting.value), most=1000)
        out.print(f"{change.key} = {in_effect}  # {change.setting.place}", markup=False)
    if not changes:
        out.print(f"nothing of that is set in {context.obj.root / CONFIG_NAME}: nothing was changed", markup=False)
    else:
        _tell_when(changes)


# A negative number is no option.
@config_app.command("set", context_settings={"ignore_unknown_options": True})
def set_setting(
    context: typer.Context,
    pairs: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY VALUE",
            help='KEY as training.learning_rate, VALUE as in dropforge.toml; text needs no quotes, "" means not set.',
        ),
    ],
) -> None:
    """Change settings in dropforge.toml: comments and order stay, and what is not valid is not written.

    Several pairs are written together, or not at all: settings that only go together.

    Example: dropforge config set training.learning_rate 1e-4
    """
    from daemon.cli.settings_file import Source, set_values

    root = context.obj.root
    if len(pairs) % 2:
        raise ConfigError(
            operation="set",
            subject=escape(pairs[-1]),
            cause="it has no value",
            hint="`dropforge config set KEY VALUE`; a value with spaces stands in quotes",
        )
    changes = set_values(root, list(zip(pairs[::2], pairs[1::2], strict=True)))
    for change in changes:
        setting = change.setting
        out.print(f"{change.key} = {change.written}", markup=False)
        if setting is not None and setting.source is Source.ENVIRONMENT:
            in_effect = printable(toml_value(setting.value), most=1000)
            out.print(f"but the environment variable {setting.variable} outweighs it: {in_effect}", markup=False)
    _tell_when(changes)


def _tell_when(changes: Sequence[Change]) -> None:
    how = "restarted" if any(change.needs_restart for change in changes) else "reloaded (SIGHUP) or restarted"
    out.print(f"a daemon that runs takes it when it is {how}", markup=False)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
