"""`dropforge check`: what the daemon would say of a file, without a daemon; nothing is moved or queued.

Rows are read in child processes as the daemon does it; tokens are counted in another, which alone loads the trainer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from daemon.config import Settings
from daemon.dataset.requests import Request
from daemon.dataset.rows import Row, Rules, iter_rows
from daemon.dataset.sidecar import ForeignSidecar, RejectedSidecar, Sidecar, read_sidecar
from daemon.dataset.source import SourceError
from daemon.dataset.strict_json import LineError
from daemon.dataset.validate import DatasetReport
from daemon.errors import RejectedData
from daemon.inbox.duplicates import changed_settings
from daemon.inbox.layout import NameKind, name_kind, sidecar_name
from daemon.inbox.other_files import explain_other_file
from daemon.inbox.report import remarks, rows_text
from daemon.inbox.validation_pool import validate_once
from daemon.job import Dataset, to_json
from daemon.limits import LimitSettings, plan_refusal
from daemon.processes import child_environment
from daemon.recipe import Recipe
from daemon.store import JobStore
from daemon.text import LIMITS_HINT, escape

VERDICT_COMMAND = (sys.executable, "-P", "-m", "daemon.trainer.check")
VERDICT_TIMEOUT_SECONDS = 3600.0
REPEATS_ROWS = 5_000_000  # rows among which repeats are counted: each costs about 100 bytes
REPEATS_SHOWN = 5
SHOWN = 20  # lines at fault in the text; the JSON has up to a thousand
_BAR = 40


@dataclass(frozen=True, kw_only=True)
class Repeats:
    """Rows that occur more than once in the file."""

    rows: int  # rows that repeat an earlier one
    examples: tuple[tuple[int, int], ...]  # line, and the earlier line
    counted_rows: int  # only among so many first rows


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """What a run would make of the rows; `reason` says why it is not known."""

    tokens: int | None = None  # before truncation
    trained_tokens: int | None = None  # after it
    samples: int | None = None
    steps: int | None = None  # of a run over these rows; what it rehearses of earlier ones is not counted, as next
    run_tokens: int | None = None  # of the rows that are trained, after truncation, one epoch
    lengths: Any = None  # histogram of tokens a sample: [{"up_to": 32, "rows": 7}, ...], up_to null for the longest
    rows_over_max_length: int = 0
    truncated_lines: tuple[int, ...] = ()  # rows that lose trained tokens to max_length
    unlearned_lines: tuple[int, ...] = ()  # rows of which nothing would be learned
    refused_rows: int = 0
    refused: tuple[Mapping[str, Any], ...] = ()  # {line, reason, hint} of rows that cannot be trained as they should
    warnings: tuple[str, ...] = ()  # what the run would warn of
    failure: str | None = None  # why a run would refuse the dataset
    failure_hint: str = ""
    reason: str = ""

    @property
    def trained_share(self) -> float | None:
        """Share of tokens that get a loss."""
        if not self.tokens or self.trained_tokens is None:
            return None
        return self.trained_tokens / self.tokens


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """One file's verdict and facts."""

    path: str
    accepted: bool
    reason: str = ""  # why it is refused
    hint: str = ""
    dataset: Dataset | None = None
    rows: DatasetReport | None = None
    repeats: Repeats | None = None
    lengths: Mapping[int, int] = field(default_factory=dict)  # rows whose text has 2**(k-1) to 2**k - 1 characters
    tokens: Tokens = Tokens(reason="not asked")
    sidecar: str | None = None  # name of the sidecar that was applied
    sidecar_ignored: str = ""  # why the one that lies there was not
    trained_before: tuple[
        Mapping[str, Any], ...
    ] = ()  # job, version, and settings under which other words were learned

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        value: dict[str, Any] = msgspec.to_builtins(self, str_keys=True)
        value["tokens"]["trained_share"] = self.tokens.trained_share
        return {"file": value.pop("path"), **value}


def check_files(
    paths: Sequence[str | Path],
    settings: Settings,
    store: JobStore | None,
    *,
    verdict_command: Sequence[str] = VERDICT_COMMAND,
) -> list[CheckReport]:
    """Check each file under the settings and the sidecar beside it.

    `store` tells what was trained before. `verdict_command` gets a file, its format and a recipe as JSON, and prints what
    `daemon.trainer.check.verdict` returns; without a configured model it is not run.
    """
    return [check_file(Path(path), settings, store, verdict_command=verdict_command) for path in paths]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A file to read, and the rules that its sidecar leaves in force."""

    request: Request
    recipe: Recipe
    sidecar: str | None = None  # name of the sidecar that was applied
    sidecar_ignored: str = ""  # why the one that lies there was not
    force: bool = False


def prepare(path: Path, settings: Settings, *, content: Path | None = None) -> Prepared:
    """Look at a file's name and sidecar as the daemon does. Raises RejectedData, RejectedSidecar.

    `content` has the rows of a file that is not there under its name yet.
    """
    if not os.path.lexists(content or path):
        raise RejectedData(operation="read", subject=escape(str(path)), cause="there is no such file")
    if content is None and name_kind(path.name) is not NameKind.DATA and path.is_file():
        reason, hint = explain_other_file(path)
        raise RejectedData(operation="read", subject=escape(str(path)), cause=reason, hint=hint)
    sidecar, sidecar_path = Sidecar(), path.with_name(sidecar_name(path.name))
    beside, ignored = os.path.lexists(sidecar_path), ""
    if beside:
        try:
            owner = (content or path).lstat().st_uid
            sidecar = read_sidecar(sidecar_path, settings.recipe, settings.limits, data_owner=owner)
        except ForeignSidecar as error:
            beside, ignored = False, str(error)
    recipe = settings.recipe.with_overrides(sidecar.overrides)
    request = Request(
        job_id="check", path=str((content or path).absolute()), rules=Rules.of(recipe.data, settings.limits)
    )
    applied = sidecar_path.name if beside else None
    return Prepared(request=request, recipe=recipe, sidecar=applied, sidecar_ignored=ignored, force=sidecar.force)


def check_file(
    path: Path,
    settings: Settings,
    store: JobStore | None,
    *,
    content: Path | None = None,
    force: bool = False,
    verdict_command: Sequence[str] = VERDICT_COMMAND,
) -> CheckReport:
    """Check one file, whose rows may lie in `content` until it is dropped, as if its sidecar asked for `force`."""
    try:
        prepared = prepare(path, settings, content=content)
    except RejectedSidecar as error:
        return CheckReport(path=str(path), accepted=False, reason=error.sentence, hint=error.hint)
    except RejectedData as error:
        return CheckReport(path=str(path), accepted=False, reason=error.cause, hint=error.hint)
    recipe, rules, applied, ignored = (
        prepared.recipe, prepared.request.rules, prepared.sidecar, prepared.sidecar_ignored
    )  # fmt: skip
    reply = validate_once(prepared.request)
    if reply.dataset is None:
        found = reply.report
        return CheckReport(
            path=str(path),
            accepted=False,
            reason=found.reason if found else reply.message,
            hint=found.hint if found else "",
            rows=found,
            sidecar=applied,
            sidecar_ignored=ignored,
        )
    try:
        repeats, lengths = _read_rows(content or path, reply.dataset.format, rules)
    except (LineError, SourceError, OSError) as error:
        return CheckReport(path=str(path), accepted=False, reason=f"it changed while it was read: {error}")
    root = [str(settings.state_dir), *(["force"] if prepared.force or force else [])]
    tokens = _within_limits(
        _ask_trainer(content or path, reply.dataset.format, recipe, verdict_command, root), settings.limits
    )
    trained = store.trained(reply.dataset.digest) if store is not None else []
    return CheckReport(
        path=str(path),
        accepted=tokens.failure is None,
        reason=tokens.failure or "",
        hint=tokens.failure_hint,
        dataset=reply.dataset,
        rows=reply.report,
        repeats=repeats,
        lengths=lengths,
        tokens=tokens,
        sidecar=applied,
        sidecar_ignored=ignored,
        trained_before=tuple(
            {
                "job": job.id,
                "version": job.version,
                "changed_settings": changed_settings(job, reply.dataset, recipe.data),
            }
            for job in trained
        ),
    )


def _read_rows(path: Path, format_: str, rules: Rules) -> tuple[Repeats, Mapping[int, int]]:
    """Repeated rows, and the distribution of the rows' lengths in characters."""
    first_lines: dict[int, int] = {}  # 64 bits of a row's digest -> its line
    examples: list[tuple[int, int]] = []
    repeated = counted = 0
    lengths: Counter[int] = Counter()
    for row in iter_rows(path, format_, rules):
        lengths[_characters(row).bit_length()] += 1
        if counted >= REPEATS_ROWS:
            continue
        counted += 1
        earlier = first_lines.setdefault(int(row.content_digest[:16], 16), row.line)
        if earlier != row.line:
            repeated += 1
            if len(examples) < REPEATS_SHOWN:
                examples.append((row.line, earlier))
    return Repeats(rows=repeated, examples=tuple(examples), counted_rows=counted), dict(sorted(lengths.items()))


def _characters(row: Row) -> int:
    total = len(row.text or "")
    for part in (row.prompt, row.completion, row.messages):
        if isinstance(part, str):
            total += len(part)
        elif part is not None:
            total += sum(len(message["content"] or "") for message in part)
    return total


def _ask_trainer(path: Path, format_: str, recipe: Recipe, command: Sequence[str], root: Sequence[str]) -> Tokens:
    """Ask the trainer's side; whatever goes wrong there is a reason, not an error."""
    if not recipe.model.model_name_or_path:
        return Tokens(reason="no base model is configured")
    arguments = [*command, str(path.absolute()), format_, to_json(recipe.model_dump(mode="json")), *root]
    try:
        child = subprocess.run(
            arguments,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=child_environment(),
            timeout=VERDICT_TIMEOUT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Tokens(reason=f"the trainer could not be asked: {error}")
    if child.returncode != 0 and not child.stdout.strip():
        lines = child.stderr.decode("utf-8", "replace").strip().splitlines()
        return Tokens(reason=f"the trainer could not say: {escape(lines[-1]) if lines else child.returncode}")
    try:
        value = json.loads(child.stdout)
        if "error" in value:
            return Tokens(reason=escape(str(value["error"])))
        failure = value.pop("failure", None)
        if failure is not None:
            value |= {"failure": failure["message"], "failure_hint": failure["hint"]}
        return msgspec.convert(value, Tokens)
    except (ValueError, KeyError, TypeError, msgspec.ValidationError) as error:
        return Tokens(reason=f"the trainer's answer was not understood: {error!r}")


def _within_limits(tokens: Tokens, limits: LimitSettings) -> Tokens:
    """The same, refused where the run would be more than [limits] allows."""
    if tokens.failure is not None or tokens.steps is None or tokens.run_tokens is None:
        return tokens
    beyond = plan_refusal(tokens.steps, tokens.run_tokens, limits)
    return replace(tokens, failure=beyond, failure_hint=LIMITS_HINT) if beyond else tokens


def render_text(report: CheckReport) -> str:
    """The same for people: plain text, safe on any terminal, without a last newline."""
    lines = [f"{escape(report.path)}: {_headline(report)}"]
    if report.reason:
        lines.append(f"  {escape(report.reason, most=1000)}")
    if report.hint:
        lines.append(f"  hint: {escape(report.hint, most=1000)}")
    if report.rows is not None and (report.rows.problems or not report.accepted):
        lines += [f"  {line}" for line in rows_text(report.rows)]
    if report.sidecar:
        lines.append(f"  sidecar     {escape(report.sidecar)}")
    if report.sidecar_ignored:
        lines.append(f"  warning     {report.sidecar_ignored}")
    if report.dataset is not None:
        found = report.dataset
        skipped = f", {found.skipped_rows:,} left out" if found.skipped_rows else ""
        lines.append(f"  rows        {found.rows:,} ({found.format}){skipped}, {found.size_bytes:,} bytes")
        lines.append(f"  BLAKE3      {found.digest}")
        lines += [f"  {label:<11} {text}" for label, text in remarks(found)]
    if report.repeats is not None:
        lines.append(f"  repeats     {_repeats_text(report.repeats)}")
    lines += [
        f"  refused     line {row['line']}: {escape(row['reason'], most=300)}" for row in report.tokens.refused[:SHOWN]
    ]
    if report.tokens.refused_rows > SHOWN:
        lines.append(f"  refused     and {report.tokens.refused_rows - SHOWN:,} more lines")
    lines += [f"  warning     {escape(warning, most=500)}" for warning in report.tokens.warnings]
    if report.accepted:
        lines.append(f"  tokens      {_tokens_text(report.tokens)}")
        lines.append(f"  trained     {_trained_text(report.trained_before)}")
    if report.tokens.lengths:
        lines.append("  tokens a row")
        lines += _plot([(_bin(found["up_to"]), found["rows"]) for found in report.tokens.lengths])
    elif report.lengths:
        lines.append("  characters a row")
        bins = range(min(report.lengths), max(report.lengths) + 1)
        lines += _plot([(f"up to {2**bits - 1:,}", report.lengths.get(bits, 0)) for bits in bins])
    return "\n".join(lines)


def _headline(report: CheckReport) -> str:
    if not report.accepted:
        return "refused"
    if report.tokens.trained_share is None:
        return f"rows good, tokens not checked: {report.tokens.reason or 'there are none'}"
    return "good"


def _trained_text(before: Sequence[Mapping[str, Any]]) -> str:
    if not before:
        return "not before"
    jobs = [
        f"job {item['job']} (version {item['version'] or '?'}"
        f"{', with other settings: ' + '; '.join(item['changed_settings']) if item['changed_settings'] else ''})"
        for item in before
    ]
    again = "" if any(not item["changed_settings"] for item in before) else "; so it would be trained again"
    return f"before, in {', '.join(jobs)}{again}"


def _repeats_text(repeats: Repeats) -> str:
    if not repeats.rows:
        return f"none among {repeats.counted_rows:,} rows"
    shown = "; ".join(f"line {line} repeats line {earlier}" for line, earlier in repeats.examples)
    more = "; …" if repeats.rows > len(repeats.examples) else ""
    return f"{repeats.rows:,} of {repeats.counted_rows:,} rows: {shown}{more}"


def _tokens_text(tokens: Tokens) -> str:
    if tokens.trained_share is None:
        return f"not checked: {tokens.reason or 'there are none'}"
    text = f"{tokens.tokens:,}, of them {tokens.trained_tokens:,} trained ({tokens.trained_share:.1%})"
    many = tokens.rows_over_max_length
    return f"{text}; {many:,} {'row is' if many == 1 else 'rows are'} longer than max_length" if many else text


def _bin(up_to: int | None) -> str:
    return "longer" if up_to is None else f"up to {up_to:,}"


def _plot(bins: Sequence[tuple[str, int]]) -> list[str]:
    """A bar for each bin, the longest `_BAR` characters wide."""
    most = max(count for _, count in bins)
    lines = []
    for label, count in bins:
        bar = "█" * round(_BAR * count / most) or ("▏" if count else "")
        lines.append(f"  {label:>16}  {count:>9,}  {bar}".rstrip())
    return lines
