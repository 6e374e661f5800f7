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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, cast

from rich.console import Console
from rich.text import Text

from daemon.cli import render
from daemon.cli.init import examples_dir, init
from daemon.cli.job_curves import JobCurves, is_plain, terminal_plot
from daemon.cli.plot_file import write_plot
from daemon.config import Settings
from daemon.curves import read_curves
from daemon.errors import DropforgeError
from daemon.job import FINAL_STATES, Job, JobState
from daemon.observability.status import read_status
from daemon.run_dir import read_identity, run_dir_of
from daemon.store import JobStore
from daemon.versions import current_version, list_versions

_T = TypeVar("_T")
DROPFORGE = (sys.executable, "-P", "-m", "daemon")
PICTURE = "curves.png"
MARGIN = 22  # time and word before each text
HANG_SECONDS = 900.0  # a hang ends; a busy machine does not
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
    console = Console(highlight=False, markup=False, soft_wrap=True)
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


class _Stage:
    """The running daemon as the demonstration waits for it: its log, its queue, its process."""

    def __init__(self, console: Console, settings: Settings, daemon: subprocess.Popen[bytes]) -> None:
        self._settings, self._daemon = settings, daemon
        self._deadline = time.monotonic() + HANG_SECONDS
        self.story = Story(console, settings.log_path)

    def until(self, condition: Callable[[], _T]) -> _T:
        """Print the log until `condition` is true; returns its value. Raises DropforgeError when it cannot become so."""
        while True:
            for _ in self.story.tell():
                pass
            value = condition()
            if value:
                return value
            if self._daemon.poll() is not None:
                raise DropforgeError(
                    operation="show the demonstration",
                    cause="the daemon ended",
                    hint=f"see {self._settings.root / 'daemon.err'}",
                )
            if time.monotonic() > self._deadline:
                raise DropforgeError(
                    operation="show the demonstration",
                    cause=f"it took longer than {HANG_SECONDS:.0f} s",
                    hint=f"is the machine very busy? The log is {self._settings.log_path}",
                )
            time.sleep(0.05)

    def wait_finished(self, name: str, *, after: Job | None = None) -> Job:
        """Wait for the end of the newest job over `name`, of one that is newer than `after`."""

        def finished() -> Job | None:
            job = self._newest(name)
            return job if job and job.state in FINAL_STATES and (after is None or job.id != after.id) else None

        return cast(Job, self.until(finished))

    def wait_sealed(self, name: str, steps: int) -> Job:
        """Wait until the run over `name` has sealed a checkpoint at `steps` or later."""

        def sealed() -> Job | None:
            job = self._newest(name)
            return job if job and job.state is JobState.RUNNING and job.max_step >= steps else None

        return cast(Job, self.until(sealed))

    def _newest(self, name: str) -> Job | None:
        store = JobStore(self._settings.store_path)
        try:
            return next((job for job in reversed(store.jobs()) if job.name == name), None)
        finally:
            store.close()


def _play(console: Console, settings: Settings, daemon: subprocess.Popen[bytes]) -> int:
    stage = _Stage(console, settings, daemon)
    examples = examples_dir()
    stage.until(lambda: any(event["event"] == "daemon.started" for event in stage.story.events))

    console.rule("1. A dataset of conversations is dropped")
    drop(settings, examples / "gsm8k_messages.jsonl", "monday.jsonl")
    first = stage.wait_finished("monday.jsonl")

    console.rule("2. A dataset of prompts and completions; its trainer is killed on the way")
    drop(settings, examples / "gsm8k_pairs.jsonl", "tuesday.jsonl")
    kill_trainer(console, settings, stage.wait_sealed("tuesday.jsonl", 10))
    second = stage.wait_finished("tuesday.jsonl")

    console.rule("3. Killed again, and its dataset is replaced by another of the same name")
    drop(settings, examples / "gsm8k_more_messages.jsonl", "wednesday.jsonl")
    job = stage.wait_sealed("wednesday.jsonl", 10)
    kill_trainer(console, settings, job)
    dropforge(console, settings, "cancel", job.id)
    cancelled = stage.wait_finished("wednesday.jsonl")
    drop(settings, half_of(settings, examples / "gsm8k_messages.jsonl"), "wednesday.jsonl")
    third = stage.wait_finished("wednesday.jsonl", after=cancelled)

    stage.until(lambda: (read_status(settings.status_path) or {}).get("status") == "idle")  # and all of it is told
    console.rule("What has to be true")
    claims = check_claims(stage.story, first, second, third)
    for claim, held in claims.items():
        console.print(Text.assemble(("  yes  " if held else "  NO   ", "green" if held else "bold red"), claim))
    console.rule("dropforge plot: the loss of each job")
    draw_curves(console, settings, (first, second, third))
    console.rule("dropforge versions: which came from which")
    found = list_versions(settings.model_dir)
    console.print(render.version_list(found, current_version(settings.model_dir)))
    console.rule("dropforge status")
    console.print(render.status_view(read_status(settings.status_path) or {}))
    console.rule("Where to look next")
    console.print(where_to_look(settings), markup=False)
    return 0 if all(claims.values()) else 1


def check_claims(story: Story, first: Job, second: Job, third: Job) -> dict[str, bool]:
    """Whether each claim about the three jobs holds, by its sentence."""
    cleared = [e for e in story.events if e["event"] == "guard.checkpoints_cleared" and e.get("job") == third.id]
    return {
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
            and any(reason.startswith("Dataset changed: ") for reason in third.result.reasons)
        ),
    }


def draw_curves(console: Console, settings: Settings, jobs: Sequence[Job]) -> None:
    """Draw the losses in the terminal, and all curves into a file where matplotlib is installed."""
    found = [JobCurves(job=job, curves=read_curves(run_dir_of(settings.state_dir, job.id))) for job in jobs]
    drawn = [one for one in found if one.curves]
    if not drawn:  # a claim above has said so
        return
    plain = is_plain(console, drawn)
    console.print(terminal_plot(drawn, width=console.width, ascii_only=plain, only=("loss",)))
    try:
        console.print(f"all curves: {write_plot(settings.root / PICTURE, drawn)}")
    except DropforgeError as error:
        console.print(Text(f"no picture in a file: {error.cause}; {error.hint}", style="dim"))


def where_to_look(settings: Settings) -> str:
    """The files that the demonstration leaves, and how to load the adapter."""
    version = current_version(settings.model_dir)
    base_model = str(settings.root / "base_model")
    return (
        f"  status file  {settings.status_path}\n  log          {settings.log_path}\n"
        f"  adapter      {settings.model_dir} (version {version.name if version else '?'})\n"
        f"  jobs         dropforge --root {settings.root} jobs\n"
        f"  load it      PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base_model!r}), "
        f"{str(settings.model_dir)!r})"
    )


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
