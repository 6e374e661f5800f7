"""Commands that save a root and bring it back: backup, restore."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from daemon.cli.account import require_whole_view
from daemon.cli.app import MACHINE, JsonFlag, app, out, print_json
from daemon.config import find_root
from daemon.text import escape, format_bytes

if TYPE_CHECKING:  # what saves and restores is imported when one of the two is asked for
    from daemon.backup.create import Backup
    from daemon.backup.manifest import Manifest
    from daemon.backup.restore import Restored, RestorePlan


@app.command("backup", rich_help_panel=MACHINE)
def backup_root(
    context: typer.Context,
    target: Annotated[
        Path, typer.Argument(metavar="FILE|DIR", help="A .tar, .tar.gz or .tar.zst file, or a folder of snapshots.")
    ],
    *,
    checkpoints: Annotated[
        bool, typer.Option("--checkpoints", help="With the checkpoints of the run in progress.")
    ] = False,
    base: Annotated[bool, typer.Option("--base", help="With the base model, where it lies inside the root.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Save queue, versions, datasets and settings, while the daemon runs. Exit 1 when something was damaged already.

    For example: `dropforge backup /mnt/backup/forge.tar.zst`, or a folder, where files that did not change are kept once.

    Example: dropforge backup /mnt/backup/forge.tar.zst
    """
    from daemon.backup.create import back_up
    from daemon.backup.plan import Options

    require_whole_view(context.obj.settings, "back up")
    done = back_up(context.obj.settings, target, options=Options(checkpoints=checkpoints, base=base))
    if as_json:
        print_json(_as_dict(done))
    else:
        out.print(f"backed up and verified: {escape(str(done.path))}", markup=False)
        _print_facts(summary(done.manifest))
        for left in done.manifest.left_out:
            out.print(f"not in it: {escape(left.name)}: {left.reason}", markup=False)
        for warning in done.manifest.warnings:
            out.print(f"damaged already: {warning}; an earlier backup may have it whole", markup=False)
    raise typer.Exit(1 if done.manifest.warnings else 0)


@app.command("restore", rich_help_panel=MACHINE)
def restore_root(
    context: typer.Context,
    source: Annotated[
        Path,
        typer.Argument(metavar="FILE|DIR", help="A file of `dropforge backup`, a folder of snapshots, or one of them."),
    ],
    *,
    root: Annotated[
        Path | None, typer.Option("--root", help="Where to (default: the root that every command works on).")
    ] = None,
    move_aside: Annotated[bool, typer.Option("--move-aside", help="Rename what is there; nothing is deleted.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Verify the backup and say what would be done; change nothing.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Verify a backup and put the root back from it. Exit 5 where a daemon lives; what is there is refused, or moved aside.

    For example: `dropforge restore /mnt/backup/forge.tar.zst --root /var/lib/dropforge`

    Example: dropforge restore /mnt/backup/forge.tar.zst --root /var/lib/dropforge
    """
    from daemon.backup.restore import execute, plan_restore

    plan = plan_restore(find_root(root) if root is not None else context.obj.root, source)
    done = None if dry_run else execute(plan, move_aside=move_aside)
    if as_json:
        print_json(_plan_as_dict(plan, done))
        return
    out.print(
        f"{'verified' if done is None else 'restored'}: {escape(str(plan.root))} from {escape(str(plan.source))}",
        markup=False,
    )
    _print_facts(summary(plan.manifest))
    _print_aside(plan, is_done=done is not None)
    if done is not None:
        _print_done(done)


def _print_aside(plan: RestorePlan, *, is_done: bool) -> None:
    from daemon.backup.restore import JOURNAL

    newer = plan.newer
    for obstacle in plan.obstacles:
        verb = "moved aside" if is_done else "in the way"
        where = f" -> {obstacle.aside}" if is_done else f": {obstacle.what}"
        out.print(escape(f"{verb}: {obstacle.path}{where}", most=2000), markup=False)
    if newer.versions:
        first, last = newer.versions[0], newer.versions[-1]
        out.print(
            f"newer here than the backup: version {first if first == last else f'{first} to {last}'}", markup=False
        )
    for job in newer.jobs:
        out.print(f"newer here than the backup: job {job.id}, {escape(job.name)}, {job.state}", markup=False)
    for name in newer.dropped:
        out.print(f"newer here than the backup: {escape(name)}", markup=False)
    if newer and is_done:
        out.print(
            f"what is newer was moved aside as well: {plan.root / JOURNAL} says where; drop again what shall be trained",
            markup=False,
        )
    if newer.versions:
        out.print(f"no number is used twice: the next version is {newer.used + 1:04d}", markup=False)


def _print_done(done: Restored) -> None:
    plan = done.plan
    for job in done.requeued:
        out.print(f"queued again: job {job.id}, {escape(job.name)}, ran when the backup was taken", markup=False)
    if done.brought_forward:
        out.print(f"brought forward: {done.brought_forward} jobs whose versions the backup has", markup=False)
    for left in plan.manifest.left_out:
        out.print(f"was not in the backup: {escape(left.name)}: {left.reason}", markup=False)
    for warning in plan.manifest.warnings:
        out.print(f"was damaged when it was saved: {warning}", markup=False)
    if done.missing_base:
        out.print(
            escape(f"missing: the base model {done.missing_base}; bring it there before `dropforge run`", most=2000),
            markup=False,
        )
    if plan.copy_of:
        out.print(
            f"two roots have one id now, this one and that of {plan.copy_of}: `dropforge --root {plan.root} adopt` makes"
            " this one a root of its own; nothing is trained here before",
            markup=False,
        )
    out.print("next: `dropforge doctor`, then `dropforge run` or `systemctl start dropforge`", markup=False)


def _plan_as_dict(plan: RestorePlan, done: Restored | None) -> dict[str, Any]:
    return {
        "restored": done is not None,
        "path": str(plan.source),
        "into": str(plan.root),
        **facts(plan.manifest),
        "in_the_way": [
            {"path": str(obstacle.path), "what": obstacle.what, "moved_to": str(obstacle.aside) if done else None}
            for obstacle in plan.obstacles
        ],
        "newer": {
            "versions": list(plan.newer.versions),
            "jobs": [{"id": job.id, "name": job.name, "state": job.state} for job in plan.newer.jobs],
            "dropped": list(plan.newer.dropped),
        },
        "requeued": [job.id for job in done.requeued] if done else [],
        "missing_base": done.missing_base or None if done else None,
        "copy_of": plan.copy_of or None,
        "left_out": [{"name": left.name, "reason": left.reason} for left in plan.manifest.left_out],
        "warnings": list(plan.manifest.warnings),
    }


def _as_dict(done: Backup) -> dict[str, Any]:
    manifest = done.manifest
    return {
        "path": str(done.path),
        **facts(manifest),
        "left_out": [{"name": left.name, "reason": left.reason} for left in manifest.left_out],
        "warnings": list(manifest.warnings),
    }


def facts(manifest: Manifest) -> dict[str, Any]:
    """What a backup holds, for programs."""
    return {
        "root": manifest.root,
        "root_id": manifest.root_id,
        "created_at": manifest.created_at,
        "versions": list(manifest.versions),
        "current_version": manifest.current_version,
        "jobs": dict(manifest.jobs),
        "files": len(manifest.files),
        "size_bytes": manifest.size_bytes,
        "checkpoints": manifest.with_checkpoints,
        "base": bool(manifest.base_path),
    }


def summary(manifest: Manifest) -> list[tuple[str, str]]:
    """What a backup holds, for people."""
    jobs = ", ".join(f"{number} {state}" for state, number in manifest.jobs.items()) or "none"
    count = len(manifest.versions)
    current = f", {manifest.current_version} is current" if manifest.current_version else ""
    return [
        ("root", f"{escape(manifest.root)}, at {manifest.created_at}"),
        ("versions", f"{count}{current}"),
        ("jobs", jobs),
        ("files", f"{len(manifest.files):,}, {format_bytes(manifest.size_bytes)}"),
    ]


def _print_facts(rows: Iterable[tuple[str, str]]) -> None:
    for name, value in rows:
        out.print(f"  {name:<9} {value}", markup=False)
