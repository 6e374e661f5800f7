"""`dropforge preview`: rows exactly as the trainer would see them, learned tokens in colour; no weights, no daemon.

The file is read as `check` reads it; its rows are made samples by the trainer's own code, in a child process that loads the
tokenizer alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.text import Text

from daemon.cli.check import Prepared, prepare
from daemon.config import Settings
from daemon.errors import ConfigError, DropforgeError, RejectedData
from daemon.inbox.report import keys_text
from daemon.inbox.validation_pool import validate_once
from daemon.job import to_json
from daemon.processes import child_environment
from daemon.text import escape, escape_block

PREVIEW_COMMAND = (sys.executable, "-P", "-m", "daemon.trainer.preview")
TIMEOUT_SECONDS = 600.0
MARKS = ("⟦", "⟧")  # around learned text where no colour can tell
LEARNED, CONTROL, FAINT = "bold green", "magenta", "dim"


def preview(
    path: Path, settings: Settings, *, rows: int, line: int | None, command: Sequence[str] = PREVIEW_COMMAND
) -> dict[str, Any]:
    """The first `rows` rows of a file, or the row on `line`: the object that `--json` prints.

    Raises RejectedData for a file whose rows cannot be told from one another, ConfigError without a base model.
    """
    prepared = prepare(path, settings)
    if not prepared.recipe.model.model_name_or_path:
        raise ConfigError(
            operation="preview",
            subject=escape(str(path)),
            cause="no base model is configured, so there is no tokenizer to show the rows with",
            hint="set model_name_or_path under [model] in dropforge.toml",
        )
    reply = validate_once(prepared.request)
    report = reply.report
    if report is None or report.format is None:
        raise RejectedData(
            operation="preview",
            subject=escape(str(path)),
            cause=report.reason if report else reply.message,
            hint=report.hint if report else "",
        )
    shown = _ask_trainer(prepared, report.format, rows=rows, line=line, command=command)
    refused = {problem.line: problem.reason for problem in report.problems}
    refused |= {found["line"]: found["reason"] for found in shown["refused"]}
    return {
        "file": str(path),
        "format": report.format,
        "rows": shown["rows"],
        "unused_keys": dict(report.unused_keys),
        "refused": [{"line": number, "reason": refused[number]} for number in sorted(refused)],
    }


def _ask_trainer(
    prepared: Prepared, format_: str, *, rows: int, line: int | None, command: Sequence[str]
) -> Mapping[str, Any]:
    request = {
        "path": prepared.request.path,
        "format": format_,
        "recipe": prepared.recipe.model_dump(mode="json"),
        "rows": rows,
        "line": line,
    }
    done = subprocess.run(
        list(command),
        input=to_json(request).encode(),
        capture_output=True,
        env=child_environment(),
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        answer = {"error": f"the trainer could not say: {last[0]}"}
    if "error" in answer:
        raise DropforgeError(
            operation="preview",
            subject=escape(prepared.request.path),
            cause=escape(str(answer["error"]), most=1000),
            hint=escape(str(answer.get("hint", "")), most=1000),
        )
    return answer


def render(shown: Mapping[str, Any], *, colour: bool) -> Text:
    """The same for people. Learned text is green, or where there is no colour stands between ⟦ and ⟧."""
    text = Text()
    text.append(f"{escape(shown['file'])}: {shown['format']}\n")
    text.append(
        "learned text is green\n" if colour else f"learned text stands between {MARKS[0]} and {MARKS[1]}\n", FAINT
    )
    for row in shown["rows"]:
        samples = row["samples"]
        for number, sample in enumerate(samples, start=1):
            part = f", sample {number} of {len(samples)}" if len(samples) > 1 else ""
            counts = f"{sample['tokens']:,} tokens, {sample['learned_tokens']:,} learned"
            text.append(f"\n── line {row['line']}{part} ── {counts}\n", FAINT)
            for segment in sample["segments"]:
                text.append_text(_segment(segment, colour=colour))
            text.append("\n")
        for warning in row["warnings"]:
            text.append(f"  ! line {row['line']}: {escape(warning, most=500)}\n", "yellow")
    if shown["unused_keys"]:
        text.append(f"\nnot used: {keys_text(shown['unused_keys'])}\n")
    for refused in shown["refused"]:
        text.append(f"refused: line {refused['line']}: {escape(refused['reason'], most=500)}\n", "red")
    return text


def _segment(segment: Mapping[str, Any], *, colour: bool) -> Text:
    """One run of text; a control token and what max_length cut off look unlike anything that a row can hold."""
    shown = escape_block(segment["text"])
    if segment.get("truncated"):
        return Text(f"[cut off by max_length: {shown}]", "red strike" if colour else "")
    if not colour:
        return Text(f"{MARKS[0]}{shown}{MARKS[1]}" if segment["learned"] else shown)
    text = Text(shown, LEARNED if segment["learned"] else FAINT)
    text.highlight_words(segment.get("control", ()), CONTROL)
    return text
