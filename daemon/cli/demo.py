"""`dropforge demo`: the main job on a tiny model and real data, told as it happens.

Nothing is staged: a real daemon runs in a process of its own on a new root, files are dropped into its inbox, a real
trainer is killed. What is printed comes from the daemon's own log, and the claims at the end are checked.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from daemon.cli import render
from daemon.cli.init import examples_dir, init
from daemon.config import Settings
from daemon.errors import DropforgeError
from daemon.job import FINAL_STATES, Job, JobState
from daemon.observability.status import read_status
from daemon.store import JobStore
from daemon.versions import current_version

DROPFORGE = (sys.executable, "-P", "-m", "daemon")
MARGIN = 22  # time and word before each text
PATIENCE_SECONDS = 900.0  # a hang ends; a busy machine does not
TABLES: Mapping[str, Mapping[str, Any]] = {
    "inbox": {"settle_seconds": 0.5},
    "queue": {"retry_seconds": 3.0},
    "status": {"status_interval": 0.5},
    "training": {"num_train_epochs": 1.0},
}
# How each event of the log reads in the story; events that are not named here are left to the log.
STORY: Mapping[str, tuple[str, str]] = {
    "file.settled": ("settled", "{file}: {reason}"),
    "file.claimed": ("claimed", "{file} as job {job}"),
    "dataset.checked": ("checked", "{rows} rows ({format}), {size_bytes} bytes, BLAKE3 {digest:.16}..."),
    "job.started": ("started", "job {job}, attempt {attempt}"),
    "guard.run_decided": ("verdict", "{verdict}{because}"),
    "guard.checkpoints_cleared": ("cleared", "{cleared} of its checkpoints -> {set}"),
    "run.planned": ("planned", "{arithmetic}"),
    "run.started": ("training", "from step {start_step} of {total_steps}"),
    "run.evaluated": ("held out", "loss {when}: {held_out_loss:.4f} over {rows} rows"),
    "checkpoint.sealed": ("sealed", "checkpoint-{step}"),
    "job.requeued": ("requeued", "{reason}"),
    "version.promoted": ("promoted", "version {version}"),
    "job.succeeded": (
        "succeeded",
        "{steps_run} of {steps_planned} steps, held-out loss {held_out_before:.4f} -> {held_out_after:.4f},"
        " {tokens_per_second:,.0f} tokens/s",
    ),
    "job.failed": ("failed", "{reason}"),
    "job.cancelled": ("cancelled", "{reason}"),
    "job.rejected": ("rejected", "{reason}"),
}
STYLES = {
    "succeeded": "bold green",
    "promoted": "green",
    "cleared": "yellow",
    "requeued": "yellow",
    "cancelled": "yellow",
    "failed": "bold red",
}


class Story:
    """Follows the daemon's log and tells it; remembers events for the checks."""

    def __init__(self, console: Console, log_path: Path) -> None:
        self._console = console
        self._path = log_path
        self._read = 0
        self.events: list[dict[str, Any]] = []

    def tell(self) -> Iterator[dict[str, Any]]:
        """Print what is new in the log and yield it."""
        if not self._path.exists():
            return
        with self._path.open("rb") as log:
            log.seek(self._read)
            text = log.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            event = json.loads(line)
            self.events.append(event)
            self._print(event)
            yield event

    def newest_before_requeue(self, job: Job) -> str:
        """The last checkpoint that a job's first attempt sealed."""
        mine = [event for event in self.events if event.get("job") == job.id]
        names = [event["event"] for event in mine]
        if "job.requeued" not in names:
            return ""
        first = mine[: names.index("job.requeued")]
        return f"checkpoint-{max(event['step'] for event in first if event['event'] == 'checkpoint.sealed')}"

    def _print(self, event: Mapping[str, Any]) -> None:
        word, form = STORY.get(str(event["event"]), ("", ""))
        if not word:
            return
        reasons = event.get("reasons") or ()
        because = (
            f" from step {event.get('step')}" if event.get("verdict") == "resume" else f": {'; '.join(reasons[:3])}"
        )
        values = {**event, "because": because}
        try:
            text = form.format(**values).replace("\n", f"\n{' ' * MARGIN}")
        except (KeyError, ValueError, TypeError):
            text = " ".join(
                f"{key}={value}" for key, value in event.items() if key not in ("timestamp", "level", "event")
            )
        self._console.print(
            Text.assemble(f"  {str(event['timestamp'])[11:19]}  ", (f"{word:<10}", STYLES.get(word, "cyan")), text)
        )


def run_demo(folder: Path | None) -> int:
    """Run the demonstration in `folder` (new, kept) or a temporary one (kept as well); 0 when every claim held."""
    console = Console(highlight=False, soft_wrap=True)
    root = (folder or Path(tempfile.mkdtemp(prefix="dropforge-demo-"))).resolve()
    console.rule("Dropforge: drop a dataset, forge a model")
    console.print(f"building a tiny Llama and its tokenizer from the example data in {root}", markup=False)
    settings = init(root, tiny=True, tables=TABLES)
    daemon = subprocess.Popen(
        [*DROPFORGE, "--root", str(root), "run"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=(root / "daemon.err").open("wb"),
    )
    try:
        return _play(console, settings, daemon)
    finally:
        daemon.send_signal(signal.SIGTERM)
        try:
            daemon.wait(timeout=settings.queue.stop_timeout + 10)
        except subprocess.TimeoutExpired:
            daemon.kill()


def _play(console: Console, settings: Settings, daemon: subprocess.Popen[bytes]) -> int:
    story = Story(console, settings.log_path)
    deadline = time.monotonic() + PATIENCE_SECONDS
    examples = examples_dir()

    def until(condition: Callable[[], Any]) -> Any:
        while True:
            for _ in story.tell():
                pass
            value = condition()
            if value:
                return value
            if daemon.poll() is not None:
                raise DropforgeError(
                    operation="show the demonstration",
                    cause="the daemon ended",
                    hint=f"see {settings.root / 'daemon.err'}",
                )
            if time.monotonic() > deadline:
                raise DropforgeError(
                    operation="show the demonstration",
                    cause=f"it took longer than {PATIENCE_SECONDS:.0f} s",
                    hint=f"is the machine very busy? The log is {settings.log_path}",
                )
            time.sleep(0.05)

    until(lambda: any(event["event"] == "daemon.started" for event in story.events))
    with_store = JobStore(settings.store_path)
    try:

        def named(name: str) -> Job | None:
            return next((job for job in reversed(with_store.jobs()) if job.name == name), None)

        def finished(name: str) -> Job | None:
            job = named(name)
            return job if job is not None and job.state in FINAL_STATES else None

        def sealed_by(name: str, steps: int) -> Job | None:
            job = named(name)
            return job if job is not None and job.state is JobState.RUNNING and job.max_step >= steps else None

        console.rule("1. A dataset of conversations is dropped")
        drop(settings, examples / "gsm8k_messages.jsonl", "monday.jsonl")
        first = until(lambda: finished("monday.jsonl"))

        console.rule("2. A dataset of prompts and completions; its trainer is killed on the way")
        drop(settings, examples / "gsm8k_pairs.jsonl", "tuesday.jsonl")
        job = until(lambda: sealed_by("tuesday.jsonl", 10))
        kill_trainer(console, settings, job)
        second = until(lambda: finished("tuesday.jsonl"))

        console.rule("3. Killed again, and its dataset is replaced by another of the same name")
        drop(settings, examples / "gsm8k_more_messages.jsonl", "wednesday.jsonl")
        job = until(lambda: sealed_by("wednesday.jsonl", 10))
        kill_trainer(console, settings, job)
        dropforge(console, settings, "cancel", job.id)
        cancelled = until(lambda: finished("wednesday.jsonl"))
        drop(settings, half_of(settings, examples / "gsm8k_messages.jsonl"), "wednesday.jsonl")
        third = until(lambda: (last := finished("wednesday.jsonl")) and last.id != cancelled.id and last)
    finally:
        with_store.close()

    console.rule("What has to be true")
    cleared = [e for e in story.events if e["event"] == "guard.checkpoints_cleared" and e.get("job") == third.id]
    claims = {
        "every job ran exactly the steps that were planned": all(
            job.state is JobState.SUCCEEDED and job.result and job.result.steps_run == job.result.steps_planned >= 1
            for job in (first, second, third)
        ),
        "held-out loss fell in every job": all(
            job.result and (job.result.held_out_after or 1e9) < (job.result.held_out_before or 0)
            for job in (first, second, third)
        ),
        "the killed job came back as attempt 2 and resumed from its newest intact checkpoint": bool(
            second.attempt == 2 and second.result and second.result.resumed_from == story.newest_before_requeue(second)
        ),
        "the checkpoints of the replaced dataset were cleared, and the run started at step 0": bool(
            cleared
            and third.result
            and third.result.start_step == 0
            and any(reason.startswith("dataset.digest: ") for reason in third.result.reasons)
        ),
    }
    for claim, held in claims.items():
        console.print(Text.assemble(("  yes  " if held else "  NO   ", "green" if held else "bold red"), claim))
    console.rule("dropforge status")
    until(lambda: (read_status(settings.status_path) or {}).get("status") == "idle")
    console.print(render.status(read_status(settings.status_path) or {}))
    console.rule("Where to look next")
    version = current_version(settings.model_dir)
    console.print(
        f"  status file  {settings.status_path}\n  log          {settings.log_path}\n"
        f"  adapter      {settings.model_dir} (version {version.name if version else '?'})\n"
        f"  jobs         dropforge --root {settings.root} jobs\n"
        f"  load it      PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({str(settings.root / 'base_model')!r}), "
        f"{str(settings.model_dir)!r})",
        markup=False,
    )
    return 0 if all(claims.values()) else 1


def drop(settings: Settings, file: Path, name: str) -> None:
    """Copy beside under a hidden name, then rename: how a file should be dropped."""
    hidden = settings.inbox_dir / f".{name}.part"
    shutil.copyfile(file, hidden)
    hidden.rename(settings.inbox_dir / name)


def dropforge(console: Console, settings: Settings, *arguments: str) -> None:
    """A command as a person would give it."""
    console.print(Text(f"  $ dropforge {' '.join(arguments)}", style="bold"))
    subprocess.run([*DROPFORGE, "--root", str(settings.root), *arguments], stdout=subprocess.DEVNULL, check=True)


def half_of(settings: Settings, file: Path) -> Path:
    """The second half of a dataset, as one of its own."""
    lines = file.read_bytes().splitlines(keepends=True)
    half = settings.root / "half.jsonl"
    half.write_bytes(b"".join(lines[len(lines) // 2 :]))
    return half


def kill_trainer(console: Console, settings: Settings, job: Job) -> None:
    """SIGKILL to the trainer of a running job."""
    from daemon.run_dir import read_identity, run_dir_of

    identity = read_identity(run_dir_of(settings.state_dir, job.id))
    if identity is None:
        raise DropforgeError(operation="kill the trainer of", subject=job.id, cause="its trainer.json cannot be read")
    with suppress(ProcessLookupError):  # it was quicker than we: then the claims at the end do not hold
        os.kill(identity.pid, signal.SIGKILL)
    console.print(
        Text(
            f"  kill -9 {identity.pid}   the trainer of job {job.id}, after checkpoint-{job.max_step}", style="bold red"
        )
    )
