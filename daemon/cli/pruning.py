"""`dropforge versions prune`: what would be moved aside, and moving it."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from daemon import version_pruning
from daemon.cli.account import require_own_account
from daemon.cli.app import JsonFlag, out, print_json
from daemon.cli.gate import change_version
from daemon.cli.model import versions_app
from daemon.cli.render import counted
from daemon.config import Settings
from daemon.errors import ConfigError
from daemon.text import escape, format_bytes
from daemon.version_pruning import PrunePlan


@versions_app.command("prune")
def prune_versions(
    context: typer.Context,
    *,
    keep: Annotated[
        int | None,
        typer.Option("--keep", min=1, help="How many of the newest stay (default: versions.keep of the settings)."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and change nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do it without asking.")] = False,
    after_job: Annotated[bool, typer.Option("--after-job", help="Wait until the running job has ended.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Move old versions aside. Never the current one, what it continues, or what the gate holds.

    `dropforge rollback N` brings one back until it is deleted, versions.keep_pruned_days later.

    Example: dropforge versions prune --keep 5 --dry-run
    """
    settings: Settings = context.obj.settings
    most = keep or settings.versions.keep
    if not most:
        raise ConfigError(
            operation="prune versions",
            cause="all are kept: [versions] keep is not set",
            hint="say how many, for example `dropforge versions prune --keep 5 --dry-run`",
        )
    plan = version_pruning.plan_prune(settings.model_dir, keep=most)
    if as_json:
        print_json(_as_object(plan, dry_run=dry_run or not yes))
    else:
        out.print(_shown(plan))
    if dry_run or not plan.moved or (as_json and not yes):
        return
    require_own_account(settings)
    if not yes:
        if not sys.stdin.isatty():
            raise ConfigError(
                operation="prune versions",
                cause="nobody is there to be asked",
                hint="--yes does it without asking, --dry-run shows the plan alone",
            )
        typer.confirm("Move them aside?", abort=True)
    moved = change_version(
        settings, "prune", lambda: version_pruning.execute_prune(settings.model_dir, plan), after_job=after_job
    )
    if not as_json:
        days = settings.versions.keep_pruned_days
        out.print(
            f"moved {counted(len(moved), 'version')} aside; `dropforge rollback N` brings one back"
            f" within {days:g} days",
            markup=False,
        )


def _as_object(plan: PrunePlan, *, dry_run: bool) -> dict[str, object]:
    return {
        "dry_run": dry_run,
        "moved": [
            {"version": version.name, "dataset": escape(version.dataset), "size_bytes": version.size_bytes}
            for version in plan.moved
        ],
        "kept": [{"version": name, "reason": reason} for name, reason in plan.kept.items()],
        "size_bytes": plan.size_bytes,
    }


def _shown(plan: PrunePlan) -> RenderableType:
    """The plan for people: what goes, and why the older of the others stay."""
    if not plan.moved:
        return Text(f"nothing to move aside: the {counted(len(plan.kept), 'version')} that are here stay")
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in ("version", "size", ""):
        table.add_column(name, no_wrap=name != "", justify="right" if name == "size" else "left")
    for version in plan.moved:
        dataset = f"from {escape(version.dataset, most=60)}" if version.dataset else ""
        table.add_row(version.name, format_bytes(version.size_bytes), Text(dataset))
    stays = [f"{name} stays: {reason}" for name, reason in plan.kept.items() if reason != "one of the newest"]
    head = f"move {counted(len(plan.moved), 'version')} aside, {format_bytes(plan.size_bytes)}"
    return Group(Text(head), table, *(Text(line, style="dim") for line in stays))
