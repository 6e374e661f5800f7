"""The command: units for this machine, completion, errors in one line, screens that fit 80 columns."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from daemon.cli import dashboard, doctor, render
from daemon.cli.app import out
from daemon.cli.doctor import Severity
from daemon.cli.main import main
from daemon.cli.systemd import install
from daemon.cli.systemd.units import DropIn
from daemon.config import Settings
from daemon.errors import ConfigError
from daemon.gpu import GpuLock
from daemon.job import Job, JobState, Outcome, ReplayedDataset, RunResult
from daemon.observability.status import finished_job
from daemon.store import JobStore
from daemon.versions import Version
from tests.support.root import dropforge, environment

NAMES = st.text(alphabet=st.one_of(st.characters(), st.sampled_from("\n\x1b界\u202e")), min_size=1, max_size=80)


def rendered(value: Any, width: int = 80) -> list[str]:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(value)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def run_here(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """The same in this process: exit code, stdout, stderr."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["dropforge", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
    said = capsys.readouterr()
    return int(stop.value.code or 0), said.out, said.err


# -- what is shown


@settings(max_examples=60, deadline=None)
@given(names=st.lists(NAMES, min_size=1, max_size=4), reason=NAMES)
def test_jobs_fit_80_columns_one_line_each(names: list[str], reason: str) -> None:
    found = [
        Job(
            id=f"20261123-041500-000{number}",
            name=name,
            state=JobState.FAILED,
            reason=reason,
            version="0001",
            owner=number,
        )
        for number, name in enumerate(names)
    ]
    lines = rendered(render.job_list(found))
    assert all(cell_len(line) <= 80 for line in lines)
    assert [line.split()[0] for line in lines[1 : len(names) + 1]] == [job.id for job in found]
    assert all("failed" in line and line.rstrip().endswith("0001") for line in lines[1 : len(names) + 1])


NOW = "2026-11-23T05:00:00.000Z"


def test_jobs_say_how_long_they_took_or_wait_and_what_is_a_duplicate() -> None:
    found = [
        Job(id="j1", name="a.jsonl", state=JobState.SUCCEEDED, version="0001",
            started_at="2026-11-23T04:41:07Z", finished_at="2026-11-23T04:41:15Z"),
        Job(id="j2", name="b.jsonl", state=JobState.CANCELLED, duplicate_of="j1", reason="duplicate of job j1"),
        Job(id="j3", name="c.jsonl", state=JobState.CANCELLED, reason="a person said so"),
        Job(id="j4", name="d.jsonl", state=JobState.RUNNING, started_at="2026-11-23T04:50:00Z"),
        Job(id="j5", name="e.jsonl", state=JobState.QUEUED, created_at="2026-11-23T03:00:00Z"),
        Job(id="j6", name="f.jsonl", state=JobState.FAILED, reason="r" * 1000, hint="h"),
    ]  # fmt: skip
    lines = [" ".join(line.split()) for line in rendered(render.job_list(found, now=NOW))]
    assert lines[:7] == [
        "job dataset state time version",
        "j1 a.jsonl succeeded 8 s 0001",
        "j2 b.jsonl duplicate",
        "j3 c.jsonl cancelled",
        "j4 d.jsonl running 10 min",
        "j5 e.jsonl queued 2.0 h",
        "j6 f.jsonl failed",
    ]
    assert "…" in "".join(lines[8:])
    assert len(" ".join(lines[8:])) < 400


def test_the_last_jobs_of_the_status_say_how_long_ago_and_what_is_a_duplicate() -> None:
    job = Job(id="j2", name="b.jsonl", state=JobState.CANCELLED, duplicate_of="j1", updated_at="2026-11-23T04:00:00Z")
    lines = rendered(render.recent_jobs([finished_job(job)], now=NOW))
    assert [" ".join(line.split()) for line in lines] == ["job dataset state ago", "j2 b.jsonl duplicate 60 min"]


def test_tables_say_whose_a_job_is_where_several_users_dropped() -> None:
    """By name, or number; of one user's jobs alone nothing is said, as there is nothing to tell apart."""
    mine = Job(id="j1", name="a.jsonl", state=JobState.SUCCEEDED, owner=0)
    theirs = Job(id="j2", name="b.jsonl", state=JobState.SUCCEEDED, owner=3_999_999_999)
    old = Job(id="j3", name="c.jsonl", state=JobState.SUCCEEDED)
    for table in (
        lambda jobs: render.job_list(jobs, now=NOW),
        lambda jobs: render.recent_jobs([finished_job(job) for job in jobs], now=NOW),
    ):
        lines = [line.split() for line in rendered(table([mine, theirs, old]))]
        assert [line[:4] for line in lines] == [
            ["job", "dataset", "owner", "state"],
            ["j1", "a.jsonl", "root", "succeeded"],
            ["j2", "b.jsonl", "3999999999", "succeeded"],
            ["j3", "c.jsonl", "succeeded"],
        ]
        assert "owner" not in rendered(table([mine, mine, old]))[0]


def test_the_owner_is_left_out_where_a_line_has_no_room_for_it() -> None:
    result = RunResult(
        outcome=Outcome.SUCCEEDED, steps_run=12_345, steps_planned=12_345, held_out_before=12.5, held_out_after=10.5
    )
    found = [
        Job(id=f"20261123-041500-000{owner}", name="a.jsonl", state=JobState.SUCCEEDED, owner=owner, version="0001",
            started_at="2026-11-23T04:41:07Z", finished_at="2026-11-23T04:41:15Z", result=result)
        for owner in (0, 1)
    ]  # fmt: skip
    for width in (80, 100):
        lines = rendered(render.job_list(found), width=width)
        assert ("owner" in lines[0]) is (width == 100)
        assert all(cell_len(line) <= width for line in lines)
        assert all(part in lines[1] for part in (found[0].id, "12345/12345", "12.500 -> 10.500", "0001"))


def test_show_prints_settings_and_rows_as_lines_and_the_progress_of_a_running_job(tmp_path: Path) -> None:
    """Nothing of a job's values is printed as JSON or a dict; the log's place is named."""
    log = tmp_path / "state" / "runs" / "j1" / "trainer.log"
    log.parent.mkdir(parents=True)
    log.touch()
    result = RunResult(
        outcome=Outcome.SUCCEEDED,
        verdict="stale",
        reasons=("one", "two"),
        cleared=1,
        base={"name": "./base", "weights": "3" * 64},
        replayed=tuple(ReplayedDataset(name=name, digest="d", rows=2, tokens=5) for name in ("a.jsonl", "b.jsonl")),
    )
    job = Job(
        id="j1", name="c.jsonl", state=JobState.RUNNING, result=result,
        overrides={"training": {"learning_rate": 0.001}, "lora": {"target_modules": ["q_proj"]}},
    )  # fmt: skip
    view = render.job(job, [], Settings(root=tmp_path), running=SNAPSHOT["job"])
    lines = [" ".join(line.split()) for line in rendered(view, 200)]
    for line in (
        "progress training 40/90 loss 1.5000 lr 1.0e-04 1,000,000 tok/s 67 min left",
        "sidecar [training] learning_rate = 0.001",
        '[lora] target_modules = ["q_proj"]',
        "base model ./base",
        "verdict stale",
        "one",
        "two",
        "cleared 1 checkpoint",
        "replayed 4 rows of earlier datasets, 10 trained tokens an epoch",
        "2 of a.jsonl",
        "2 of b.jsonl",
        f"log {log}",
    ):
        assert line in lines
    assert "{" not in "".join(lines)


def test_what_stands_in_brackets_is_shown_as_it_is(tmp_path: Path) -> None:
    """A file's name or a setting's table is no markup to the console of the commands."""
    waiting = {**SNAPSHOT, "waiting": [{"file": "[red]x.jsonl", "reason": "set [data.columns]", "since": ""}]}
    with out.capture() as shown:
        out.print(render.status_view(waiting))
        out.print(render.job(Job(id="j", name="[red]y.jsonl", state=JobState.FAILED), [], Settings(root=tmp_path)))
    assert "[red]x.jsonl: set [data.columns]" in shown.get()
    assert "[red]y.jsonl" in shown.get()


SNAPSHOT: dict[str, Any] = {
    "status": "training",
    "reason": "j",
    "pid": 1,
    "timestamp": "2026-11-23T04:41:07Z",
    "alive": True,
    "liveness": "alive",
    "age_seconds": 0.3,
    "watch_mode": "inotify",
    "queue": {"queued": 3, "running": 1},
    "model": {"version": "0007", "dataset": "d.jsonl", "created_at": None},
    "gpu": [{"name": "NVIDIA H200", "used_bytes": 2**35, "total_bytes": 2**37, "utilization": 0.9}],
    "warnings": ["w" * 300],
    "waiting": [{"file": "f" * 200, "reason": "r" * 200, "since": ""}] * 30,
    "left_alone": [{"file": "f", "reason": "r"}],
    "recent": [
        {"id": "20261123-041500-9f3a", "dataset": "x" * 100, "state": "succeeded", "steps": 10, "version": "0007",
         "held_out_before": 3.0, "held_out_after": 2.5}
    ] * 20,
    "job": {
        "id": "20261123-041500-9f3a", "dataset": "n" * 100, "attempt": 1, "phase": "training", "step": 40, "total_steps": 90,
        "loss": 1.5, "learning_rate": 1e-4, "tokens_per_second": 1e6, "eta_seconds": 4000.0,
        "losses": [[n, 5.0 / (n + 1)] for n in range(200)],
    },
}  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(40, 140), name=NAMES, step=st.integers(0, 90), losses=st.lists(st.floats(0, 1e6), max_size=200)
)
def test_the_live_screen_fits_its_width(width: int, name: str, step: int, losses: list[float]) -> None:
    job = {**SNAPSHOT["job"], "dataset": name, "step": step, "losses": [[n, loss] for n, loss in enumerate(losses)]}
    lines = rendered(dashboard.screen({**SNAPSHOT, "job": job, "reason": name}, width), width)
    assert all(cell_len(line) <= width for line in lines)
    assert len(lines) < 45


def test_the_live_screen_shows_what_matters() -> None:
    text = "\n".join(rendered(dashboard.screen(SNAPSHOT, 80)))
    for word in (
        "training",
        "40/90",
        "44%",
        "67 min left",
        "5.000 -> 0.025",
        "NVIDIA H200  32.0 of 128.0 GiB",
        "3 queued",
        "waiting (30)",
    ):
        assert word in text
    assert any("⣀" <= character <= "⣿" for character in text)  # a chart
    assert "⣀" not in "".join(rendered(dashboard.screen(SNAPSHOT, 80, ascii_only=True)))
    evaluated = {**SNAPSHOT["job"], "held_out_losses": [[50, 3.0], [100, 2.5]]}
    assert "o held out 3.000 -> 2.500" in "\n".join(rendered(dashboard.screen({**SNAPSHOT, "job": evaluated}, 80)))
    dead = "\n".join(rendered(dashboard.screen({**SNAPSHOT, "alive": False, "liveness": "dead"}, 80)))
    assert dead.startswith("dead")
    assert "40/90" not in dead


def test_a_loss_that_became_worse_is_marked_wherever_it_is_shown() -> None:
    result = RunResult(outcome=Outcome.SUCCEEDED, steps_run=9, steps_planned=9, held_out_before=3.0, held_out_after=3.5)
    worse = Job(id="20261123-041500-0001", name="x" * 90, state=JobState.SUCCEEDED, result=result, version="0001")
    better = replace(worse, result=replace(result, held_out_after=2.0))
    for shown in (
        render.job_list([worse, better]),
        render.recent_jobs([finished_job(worse), finished_job(better)]),
        render.job(worse, [], Settings()),
    ):
        lines = rendered(shown)
        assert sum("3.000 -> 3.500 worse" in line for line in lines) == 1
        assert all(cell_len(line) <= 80 for line in lines)


def test_the_log_shows_what_a_person_needs_and_all_of_it_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "dropforge.toml").write_text("")
    path = tmp_path / "state" / "logs" / "dropforge.jsonl"
    path.parent.mkdir(parents=True)
    event = {"timestamp": "2026-11-23T04:41:07Z", "level": "info", "event": "job.succeeded", "job": "j1",
             "dataset": "a.jsonl", "digest": "5" * 64, "steps_run": 9, "base": {"name": "x"}}  # fmt: skip
    path.write_text(json.dumps(event) + "\n")
    code, brief, _ = run_here(capsys, "--root", str(tmp_path), "logs")
    assert (code, brief) == (0, "2026-11-23 04:41:07 info    job.succeeded  dataset=a.jsonl steps_run=9 job=j1\n")
    full = run_here(capsys, "--root", str(tmp_path), "logs", "--full")[1]
    assert "5" * 64 in full
    assert json.loads(run_here(capsys, "--root", str(tmp_path), "logs", "--json")[1]) == event


def test_the_status_breaks_its_lines_at_the_width_of_the_terminal() -> None:
    console = Console(width=80, file=io.StringIO(), color_system=None, soft_wrap=True)  # as the commands print
    console.print(render.status_view({**SNAPSHOT, "reason": "the reason is a long one; " * 10}))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(cell_len, lines)) <= 80


def test_jobs_and_status_say_where_the_running_one_is_and_when_the_queue_is_done() -> None:
    jobs = [Job(id="j1", name="a.jsonl", state=JobState.RUNNING), Job(id="j2", name="b.jsonl", state=JobState.RUNNING)]
    lines = rendered(render.job_list(jobs, running={"id": "j1", "step": 12, "total_steps": 90}))
    assert ["12/90" in line for line in lines[1:3]] == [True, False]
    queued = {**SNAPSHOT, "queue": {"queued": 2, "duplicate": 1}}
    assert "2 queued, 1 duplicate; all done in about 12 min" in "\n".join(
        rendered(render.status_view(queued, queue_seconds=720.0))
    )
    assert "done in" not in "\n".join(rendered(render.status_view(queued)))
    waiting = rendered(render.job(Job(id="j", name="a", state=JobState.QUEUED), [], Settings(), eta_seconds=40.0))
    assert any(line.split()[:5] == ["done", "in", "about", "40", "s"] for line in waiting)


def version(name: str, parent: str | None, after: float | None = 2.0, dataset: str = "d.jsonl") -> Version:
    record = {
        "parent": parent, "held_out_before": 3.0, "held_out_after": after, "dataset": dataset,
        "dataset_digest": dataset, "steps": 5, "created_at": "2026-11-23T04:41:07Z",
    }  # fmt: skip
    return Version(name=name, path=Path(name), record=record)


def test_versions_are_a_flat_list_that_says_who_continued_another_than_the_one_above() -> None:
    found = [
        version("0001", None),
        version("0002", "0001", 3.5),
        version("0003", "0001", None),
        version("0004", None, dataset="e.jsonl"),
    ]
    lines = [line.rstrip() for line in rendered(render.version_list(found, found[2]))]
    assert lines[:5] == [
        "version  from        dataset  steps  held-out loss         trained (UTC)",
        "0001                 d.jsonl      5  3.000 -> 2.000        2026-11-23 04:41",
        "0002                 d.jsonl      5  3.000 -> 3.500 worse  2026-11-23 04:41",
        "0003 *   0001        d.jsonl      5  not measured          2026-11-23 04:41",
        "0004     base model  e.jsonl      5  3.000 -> 2.000        2026-11-23 04:41",
    ]
    assert "compare within a line, not between lines" in " ".join(lines)


def test_losses_of_one_dataset_may_be_compared_and_a_line_of_versions_names_no_parents() -> None:
    lines = rendered(render.version_list([version("0001", None), version("0002", "0001")], None))
    assert [line.split()[1] for line in lines] == ["dataset", "d.jsonl", "d.jsonl"]


@settings(max_examples=40, deadline=None)
@given(names=st.lists(NAMES, min_size=1, max_size=5), parents=st.booleans())
def test_forty_versions_fit_80_columns_one_line_each(names: list[str], parents: bool) -> None:
    found = [
        version(f"{number:04}", f"{number - 1:04}" if number > 1 and parents else None, 3.5, names[number % len(names)])
        for number in range(1, 41)
    ]
    lines = rendered(render.version_list(found, found[-1]))
    assert all(cell_len(line) <= 80 for line in lines)
    assert [line.split()[0] for line in lines[1:41]] == [item.name for item in found]


# -- the command


def test_errors_are_one_line_with_a_hint_and_their_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "dropforge.toml").write_text("[training]\nlearning_rat = 1\n")
    code, _, told = run_here(capsys, "--root", str(tmp_path), "status")
    assert code == 2
    assert told.count("\n") == 2
    assert "hint: " in told
    (tmp_path / "dropforge.toml").write_text("")
    for command, expected in (
        ("status", 4),
        ("jobs", 4),
        ("logs", 4),
        ("rollback 1", 4),
        ("rollback", 2),
        ("nonsense", 2),
        ("--root nowhere jobs", 4),
        ("--root nowhere run", 4),
    ):
        code, _, told = run_here(capsys, "--root", str(tmp_path), *command.split())
        assert code == expected, command
        assert told


def test_version_help_and_completion_for_each_shell(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert dropforge("--version").stdout.startswith("dropforge ")
    monkeypatch.setenv("COLUMNS", "80")
    text = dropforge("--help").stdout
    assert "\x1b" not in text
    for command in ("init", "run", "status", "logs", "rollback", "doctor", "service"):
        assert command in text
    assert all(len(line) <= 80 for line in text.splitlines())
    for shell in ("bash", "zsh", "fish"):
        assert "_DROPFORGE_COMPLETE" in run_here(capsys, "completion", shell)[1]
    assert run_here(capsys, "completion", "tcsh")[0] == 2


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """`dropforge` on a PATH of its own, over a root with jobs and versions."""
    root = tmp_path / "root"
    (root / "current_model").mkdir(parents=True)
    (root / "dropforge.toml").write_text("")
    store = JobStore(root / "state" / "queue.sqlite3")
    for number, (name, state) in enumerate(
        (("$(touch harm)'`touch harm`.jsonl", "queued"), ("b.jsonl", "rejected"), ("c.jsonl", "claimed"))
    ):
        store.add(Job(id=f"20261123-041500-000{number}", name=name, state=JobState(state)))
    store.close()
    for number in ("0001", "0002"):
        version = root / "current_model" / "versions" / number
        version.mkdir(parents=True)
        (version / "training_record.json").write_text(json.dumps({"dataset": "d'.jsonl"}))
    script = tmp_path / "bin" / "dropforge"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -P -c "from daemon.cli.main import main; main()" "$@"\n')
    script.chmod(0o755)
    return script


def complete(program: Path, shell: str, line: str) -> list[str]:
    """What the shell offers at the end of a line, by its own means."""
    script = program.with_name(f"completion.{shell}")
    if not script.exists():
        script.write_text(dropforge("completion", shell).stdout)
    words = line.split(" ")
    asked = {
        "bash": f"source {script}; COMP_WORDS=({' '.join(words[:-1])} {words[-1] or chr(34) * 2}); COMP_CWORD={len(words) - 1};"
        ' _dropforge_completion dropforge; printf "%s\\n" "${COMPREPLY[@]}"',
        # What it hands to _arguments, which draws; evaluated as zsh does it.
        "zsh": f"compdef() {{ : }}; _files() {{ : }}; _arguments() {{ print -r -- $1 }}; source {script};"
        f" words=({' '.join(words[:-1])} '{words[-1]}'); CURRENT={len(words)}; _dropforge_completion",
        "fish": f"source {script}; complete -C '{line}'",
    }[shell]
    done = subprocess.run(
        [shell, *(["-f"] if shell == "zsh" else []), "-c", asked], capture_output=True, text=True, check=False,
        cwd=program.parent, env={**environment(), "PATH": f"{program.parent}:{os.environ['PATH']}",
                                 "DROPFORGE_ROOT": str(program.parents[1] / "root"), "HOME": str(program.parent)},
    )  # fmt: skip
    assert done.stderr == ""
    assert not (program.parent / "harm").exists()
    if shell == "zsh":  # "WORD":"HELP" ...
        return re.findall(r'(?<=[( ])"([^"]+)"(?=[: )])', done.stdout)
    return [word.split("\t")[0] for word in done.stdout.split("\n") if word]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_commands_jobs_and_versions(program: Path, shell: str) -> None:
    """Each argument with what it may be now; a file's name that is a command is not run."""
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed (Debian package: {shell})")

    def offered(line: str) -> set[str]:
        return set(complete(program, shell, line))

    queued, rejected, claimed = (f"20261123-041500-000{end}" for end in "012")
    assert offered("dropforge roll") == {"rollback"}
    assert offered("dropforge rollback ") == {"0002", "0001"}
    assert offered("dropforge retry ") == {rejected}
    assert offered("dropforge cancel 2026") == {queued, claimed}
    assert offered("dropforge jobs --state ca") == {"cancelled"}
    assert offered("dropforge retry zzz") == set()


def test_completion_says_nothing_when_something_is_wrong(program: Path) -> None:
    root = program.parents[1] / "root"
    (root / "state" / "queue.sqlite3").write_bytes(b"no database")
    assert complete(program, "bash", "dropforge show ") == []
    (root / "dropforge.toml").write_text("[training\n")
    assert complete(program, "bash", "dropforge rollback ") == []


# -- service install


def test_a_dry_run_shows_the_unit_and_writes_nothing(tmp_path: Path) -> None:
    done = dropforge("--root", str(tmp_path), "service", "install", "--dry-run", "--directory", str(tmp_path / "units"))
    assert done.returncode == 0
    assert f"--root {tmp_path} run" in done.stdout
    assert f"ReadWritePaths={tmp_path}" in done.stdout
    assert "systemctl enable --now dropforge.service" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_units_are_written_for_this_interpreter_and_root(tmp_path: Path) -> None:
    units = tmp_path / "units"
    settings_ = Settings(root=Path("/var/lib/dropforge-b"), queue={"stop_timeout": 500.0}, metrics={"port": 9000})
    planned = install.plan_install(
        settings_, instance="b", drop_ins=install.wanted_drop_ins(settings_), directory=units
    )
    planned.execute()
    template = (units / "dropforge@.service").read_text()
    assert "--root /var/lib/dropforge-%i run" in template
    assert "TimeoutStopSec=530" in template
    assert f"ExecStart={sys.prefix}/bin/python" in template
    assert (units / "dropforge@b.service.d" / "metrics.conf").exists()
    assert any("dropforge@b.service" in command for command in planned.commands)


def test_an_instance_with_a_root_elsewhere_gets_a_drop_in_of_its_own(tmp_path: Path) -> None:
    planned = install.plan_install(Settings(root=tmp_path / "forge"), instance="b", directory=tmp_path)
    text = dict(planned.files)[tmp_path / "dropforge@b.service.d" / "root.conf"]
    assert f"ReadWritePaths={tmp_path / 'forge'}" in text
    assert "ExecStart=\nExecStart=" in text
    assert f"--root {tmp_path / 'forge'} config check" in text.partition("ExecReload=\n")[2]


@pytest.mark.parametrize("request_", [{"user": True, "instance": "a"}, {"instance": "../a"}, {"instance": "a b"}])
def test_what_makes_no_sense_is_refused(tmp_path: Path, request_: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        install.plan_install(Settings(root=tmp_path), directory=tmp_path, **request_)


def test_drop_ins_follow_from_the_settings(tmp_path: Path) -> None:
    wanted = install.wanted_drop_ins(Settings(root=tmp_path, model={"allow_downloads": True}, metrics={"port": 9101}))
    assert {DropIn.DOWNLOADS, DropIn.METRICS} <= set(wanted)
    assert not {DropIn.DOWNLOADS, DropIn.METRICS} & set(install.wanted_drop_ins(Settings(root=tmp_path)))


# -- doctor


def verdicts(found: list[doctor.Finding]) -> dict[str, Severity]:
    return {finding.name: finding.verdict for finding in found}


def test_the_doctor_finds_what_is_wrong_and_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "CHECKS", {name: check for name, check in doctor.CHECKS.items() if name != "gpu"})
    (tmp_path / "dropforge.toml").write_text(
        '[model]\nmodel_name_or_path = "nobody/nothing"\n[guard]\nkey_file = "key"\n'
    )
    (tmp_path / "dropforge.toml").chmod(0o666)
    (tmp_path / "key").write_text("secret")
    (tmp_path / "key").chmod(0o644)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    found = doctor.examine(tmp_path)
    assert verdicts(found)["model"] is Severity.FAIL
    assert verdicts(found)["key"] is Severity.FAIL
    assert verdicts(found)["settings"] is Severity.WARN
    assert all(finding.hint for finding in found if finding.verdict is Severity.FAIL)
    assert all(len(line) <= 80 for line in rendered(render.findings(found)))
    (tmp_path / "dropforge.toml").write_text("[training]\nlearning_rat = 1\n")
    assert verdicts(doctor.examine(tmp_path))["settings"] is Severity.FAIL


def test_the_doctor_tells_packages_that_are_too_old_and_whose_view_this_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "CHECKS", {name: doctor.CHECKS[name] for name in ("packages", "permissions")})
    monkeypatch.setattr(doctor, "version", lambda name: {"peft": "0.9.1", "torch": "2.13.0+cpu"}.get(name, "99"))
    (tmp_path / "dropforge.toml").write_text("")
    found = doctor.examine(tmp_path)
    assert [finding.message for finding in found if finding.verdict is Severity.FAIL] == [
        "peft 0.9.1 is older than 0.18"
    ]
    if os.geteuid() != 0:
        return
    (tmp_path / "state").mkdir()
    os.chown(tmp_path / "state", 65534, -1)
    assert any(
        "root's view" in finding.message and "runuser -u" in finding.hint for finding in doctor.examine(tmp_path)
    )


def test_the_doctor_names_what_a_moved_root_does_not_take_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Absolute paths of the settings, and the base model that the current adapter names."""
    monkeypatch.setattr(doctor, "CHECKS", {"places": doctor.CHECKS["places"]})
    root, gone = tmp_path / "root", tmp_path / "gone"
    version = root / "current_model" / "versions" / "0001"
    version.mkdir(parents=True)
    (root / "current_model" / "latest").symlink_to("versions/0001")
    (version / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(gone / "base")}))
    (root / "dropforge.toml").write_text(
        f'[paths]\ninbox = "{gone}/inbox"\nstate = "{tmp_path}"\n[guard]\nkey_file = "key"\n'
    )
    found = {finding.message: finding for finding in doctor.examine(root) if finding.name == "places"}
    outside = "lies outside the root, and does not move along with it"
    assert found[f"[paths] inbox = {gone}/inbox {outside}; nothing is there"].verdict is Severity.WARN
    assert found[f"[paths] state = {tmp_path} {outside}"].verdict is Severity.OK
    named = found[f"the adapter of version 0001 names its base model {gone}/base, which is not here"]
    assert named.verdict is Severity.WARN
    assert len(found) == 3


def test_the_doctor_s_json_is_what_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "CHECKS", {name: check for name, check in doctor.CHECKS.items() if name != "gpu"})
    run_here(capsys, "--root", str(tmp_path), "init")
    code, told, _ = run_here(capsys, "--root", str(tmp_path), "doctor", "--json")
    found = {entry["name"]: entry["verdict"] for entry in json.loads(told)["findings"]}
    assert found["model"] == "fail"  # none is configured yet
    assert found["packages"] == "ok"
    assert code == 1


# -- one GPU, several daemons


def test_the_lock_is_one_daemon_s_until_it_and_its_trainer_have_let_go(tmp_path: Path) -> None:
    path = tmp_path / "run" / "gpu.lock"
    first, second, alone = GpuLock(path), GpuLock(path), GpuLock(None)
    assert first.acquire("a") == ""
    assert first.acquire("a") == ""  # it has it already
    assert "in use by b" not in (told := second.acquire("b"))
    assert "in use by a" in told
    trainer = subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=first.descriptors)
    first.release()
    assert "in use by a" in second.acquire("b")  # the trainer still has it
    trainer.communicate(b"")
    assert second.acquire("b") == ""
    second.release()
    assert alone.acquire("c") == ""
    assert alone.descriptors == ()


def test_the_doctor_tells_what_lies_in_the_inbox_and_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Datasets under other names or half done, links, files that may not be read, and those in the folders of jobs."""
    inbox = tmp_path / "inbox"
    for name in ("x.csv", "ok.jsonl", "done/y.jsonl", "failed/notes.txt", "high/z.jsonl.part", "high/new.jsonl.part"):
        (inbox / name).parent.mkdir(parents=True, exist_ok=True)
        (inbox / name).write_text("")
    (inbox / "done" / "20261123-041500-9f3a").mkdir()
    (inbox / "link.jsonl").symlink_to(inbox / "ok.jsonl")
    (inbox / "secret.jsonl").write_text("")
    os.utime(inbox / "high" / "z.jsonl.part", (0, 0))
    monkeypatch.setattr(doctor, "CHECKS", {"dropped": doctor.CHECKS["dropped"]})
    monkeypatch.setattr(os, "access", lambda path, _: Path(path).name != "secret.jsonl")
    told = {
        found.message.partition(": ")[0]: found.message for found in doctor.examine(tmp_path) if found.name == "inbox"
    }
    assert set(told) == {"x.csv", "done/y.jsonl", "failed/notes.txt", "high/z.jsonl.part", "link.jsonl", "secret.jsonl"}
    assert "dropforge submit" in told["x.csv"]
    assert "move it into the inbox itself" in told["done/y.jsonl"]
    assert "may not read it" in told["secret.jsonl"]
    assert "rename it" in told["high/z.jsonl.part"]
