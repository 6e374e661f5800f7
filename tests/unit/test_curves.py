"""Curves: read from a trainer's events, drawn in characters, written as a picture."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from daemon.cli import plot_file
from daemon.cli.chart import Series, legend, line_chart, uses_ascii
from daemon.cli.job_curves import JobCurves, terminal_plot
from daemon.cli.run_screen import RunScreen
from daemon.curves import Curves, read_curves
from daemon.errors import ConfigError, DropforgeError
from daemon.job import Dataset, Job, JobState
from daemon.store import JobStore
from tests.support.root import dropforge

FINITE = st.floats(min_value=-1e9, max_value=1e9)
CURVES = Curves(
    total_steps=10,
    loss=((1, 4.0), (5, 3.0), (10, 2.0)),
    held_out_loss=((0, 4.2), (10, 2.5)),
    learning_rate=((5, 1e-3), (10, 1e-5)),
    tokens_per_second=((5, 900.0), (10, 1000.0)),
)


def said(folder: Path, *events: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def of_job(name: str = "monday.jsonl", version: str | None = "0001", curves: Curves = CURVES) -> JobCurves:
    job = Job(id="20261125-101010-ab12", name=name, state=JobState.SUCCEEDED, version=version)
    return JobCurves(job=job, curves=curves)


def drawn(value: Any, width: int = 80) -> list[str]:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(value)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


# -- read


def test_curves_are_what_the_trainer_logged_over_all_attempts(tmp_path: Path) -> None:
    """An attempt that begins at an earlier step takes back what came after it."""
    run_dir = said(
        tmp_path,
        {"event": "run.planned", "total_steps": 30},
        {"event": "run.evaluated", "when": "before", "held_out_loss": 5.0},
        {"event": "run.started", "start_step": 0},
        {"event": "run.first_step", "step": 1, "loss": 4.9},
        {"event": "run.stepped", "step": 10, "loss": 4.0, "learning_rate": 1e-3, "tokens_per_second": 100.0},
        {"event": "run.stepped", "step": 20, "loss": 9.0, "learning_rate": 9e-4, "tokens_per_second": 100.0},
        {"event": "run.started", "start_step": 10},
        {"event": "run.first_step", "step": 11, "loss": 3.9},
        {"event": "run.stepped", "step": 20, "loss": 3.0, "learning_rate": 5e-4},
        {"event": "run.evaluated", "when": "during", "step": 20, "held_out_loss": 3.5},
        {"event": "run.stepped", "step": 30, "loss": 2.0, "learning_rate": 0.0, "tokens_per_second": None},
        {"event": "run.evaluated", "when": "after", "held_out_loss": 2.5},
    )
    assert read_curves(run_dir) == Curves(
        total_steps=30,
        loss=((1, 4.9), (10, 4.0), (11, 3.9), (20, 3.0), (30, 2.0)),
        held_out_loss=((0, 5.0), (20, 3.5), (30, 2.5)),
        learning_rate=((10, 1e-3), (20, 5e-4), (30, 0.0)),
        tokens_per_second=((10, 100.0),),
    )


def test_what_is_no_number_or_torn_is_passed_over(tmp_path: Path) -> None:
    run_dir = said(
        tmp_path,
        {"event": "run.planned", "total_steps": "many"},
        *({"event": "run.stepped", "step": 5, "loss": loss} for loss in ("x", True, None, float("nan"), [1])),
        {"event": "run.evaluated", "when": "after", "held_out_loss": {}},
        {"event": "run.stepped", "step": 7, "loss": 1.5},
    )
    with (run_dir / "events.jsonl").open("a") as events:
        events.write('{"event": "run.stepped", "step": 9, "lo')
    assert read_curves(run_dir) == Curves(loss=((7, 1.5),))
    assert not read_curves(tmp_path / "nowhere")


# -- drawn in characters


@settings(max_examples=80, deadline=None)
@given(
    lines=st.lists(st.lists(st.tuples(st.integers(0, 10**7), FINITE), max_size=40), max_size=4),
    width=st.integers(20, 200),
    height=st.integers(1, 12),
    plain=st.booleans(),
)
def test_a_chart_of_any_numbers_fits_its_size(
    lines: list[list[tuple[int, float]]], width: int, height: int, plain: bool
) -> None:
    series = [Series(name="a", points=sorted(dict(line).items()), is_joined=number % 2 == 0)
              for number, line in enumerate(lines)]  # fmt: skip
    chart = line_chart(series, width=width, height=height, ascii_only=plain)
    assert len(chart) == (height + 2 if any(lines) else 0)
    assert all(cell_len(line.plain) <= max(width, 8 + 12) for line in chart)  # a curve of 8 columns, and its labels
    if plain:
        assert all(line.plain.isascii() for line in chart)


def test_a_falling_loss_is_drawn_falling() -> None:
    chart = [line.plain for line in line_chart([Series(name="loss", points=[(0, 4), (9, 1)])], width=12, height=4,
                                               ascii_only=True)]  # fmt: skip
    assert chart[:4] == ["4|**", " |  ***", " |     ***", "1|        **"]
    assert chart[-1].split() == ["0", "step", "9"]


def test_a_curve_stands_out_from_its_axis() -> None:
    series = [Series(name="a", points=[(0, 1), (9, 1)]), Series(name="b", points=[(0, 2), (9, 2)])]
    shown = io.StringIO()
    for line in line_chart(series, width=20, height=2):
        Console(file=shown, force_terminal=True, color_system="standard", width=20).print(line)
    top, bottom = shown.getvalue().splitlines()[:2]
    assert re.findall(r"\x1b\[([0-9;]+)m", top) == ["2", "0", "33", "0"]  # dim label and axis, then yellow in one piece
    assert re.findall(r"\x1b\[([0-9;]+)m", bottom) == ["2", "0", "36", "0"]


def test_points_that_are_not_joined_claim_nothing_between_them() -> None:
    held_out = Series(name="held out", points=[(0, 4), (9, 1)], is_joined=False)
    chart = [line.plain for line in line_chart([held_out], width=12, height=4, ascii_only=True)]
    assert "".join(chart[:4]).count("*") == 2


@pytest.mark.parametrize(
    ("encoding", "environment", "plain"),
    [
        ("utf-8", {"TERM": "xterm-256color", "LANG": "en_GB.UTF-8"}, False),
        ("utf-8", {}, False),
        ("latin-1", {}, True),
        ("ascii", {}, True),
        ("no such", {}, True),
        ("utf-8", {"TERM": "linux"}, True),
        ("utf-8", {"TERM": "dumb"}, True),
        ("utf-8", {"LC_ALL": "C", "LANG": "en_GB.UTF-8"}, True),
    ],
)
def test_braille_is_drawn_only_where_it_can_be_shown(encoding: str, environment: dict[str, str], plain: bool) -> None:
    assert uses_ascii(encoding, environment) is plain


def test_a_plot_has_a_panel_for_each_curve_and_fits_the_terminal() -> None:
    lines = drawn(terminal_plot([of_job()], width=80))
    assert all(cell_len(line) <= 80 for line in lines)
    assert lines[0].startswith("0001 monday.jsonl, succeeded")
    text = "\n".join(lines)
    assert [name for name in ("loss", "held-out loss", "learning rate", "tokens/s") if name not in text] == []


def test_several_jobs_are_named_and_losses_of_different_rows_not_held_against_each_other() -> None:
    jobs = [
        JobCurves(
            job=Job(id=f"j{digest}", name=f"{digest}.jsonl", state=JobState.FAILED,
                    dataset=Dataset(name=f"{digest}.jsonl", path="x", digest=digest, size_bytes=1, rows=1, format="text")),
            curves=CURVES,
        )
        for digest in "ab"
    ]  # fmt: skip
    lines = drawn(terminal_plot(jobs, width=80, ascii_only=True))
    assert lines[0] == "* ja a.jsonl   o jb b.jsonl"
    assert "Held-out losses are each of that dataset's own rows" in lines[-2]
    assert legend([Series(name="a", points=())]).plain == "━━ a"


# -- the command


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with a failed job that logged two steps, and a newer one that logged none."""
    (tmp_path / "dropforge.toml").write_text("")
    store = JobStore(tmp_path / "state" / "queue.sqlite3")
    for name in ("20261125-101010-aaaa", "20261125-101010-bbbb"):
        store.add(Job(id=name, name=f"{name[-4:]}.jsonl", state=JobState.CLAIMED))
    store.close()
    said(
        tmp_path / "state" / "runs" / "20261125-101010-aaaa",
        {"event": "run.stepped", "step": 1, "loss": 4.0},
        {"event": "run.stepped", "step": 2, "loss": 3.0},
    )
    return tmp_path


def test_plot_draws_the_newest_job_that_has_curves(root: Path) -> None:
    done = dropforge("--root", str(root), "plot")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("20261125-101010-aaaa aaaa.jsonl")
    shown = json.loads(dropforge("--root", str(root), "plot", "aaaa", "--json").stdout)
    assert [job["loss"] for job in shown["jobs"]] == [[[1, 4.0], [2, 3.0]]]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("last",), 4, "no run directory"),
        (("0007",), 4, "no such job"),
        (("latest",), 4, "there is no version yet"),
        (("aaaa", "-o", "curves.txt"), 2, "ends in none of .png, .svg, .pdf"),
        (("aaaa", "--json", "-o", "curves.png"), 2, "two ways out"),
    ],
)
def test_plot_says_why_it_draws_nothing(root: Path, arguments: tuple[str, ...], code: int, said: str) -> None:
    done = dropforge("--root", str(root), "plot", *arguments)
    assert (done.returncode, said in done.stderr) == (code, True), done.stderr


# -- a picture


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ConfigError, match="matplotlib, which is not installed") as stop:
        plot_file.write_plot(tmp_path / "curves.png", [of_job()])
    assert "pip install 'dropforge[plot]'" in stop.value.hint
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("kind", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_a_picture_is_of_the_kind_that_its_name_says(tmp_path: Path, kind: str, magic: bytes) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"curves.{kind.upper()}"
    path.write_text("of before")
    plot_file.write_plot(path, [of_job(name="$\\frac{1}{_evil 漢\n.jsonl"), of_job(version=None)])
    assert path.read_bytes().startswith(magic)


def test_a_picture_shows_each_curve_and_names_no_formula() -> None:
    pytest.importorskip("matplotlib")
    losses, rates, speeds = plot_file.figure([of_job(name="a$b$.jsonl"), of_job(curves=Curves(loss=((1, 2.0),)))]).axes
    assert [len(axes.lines) for axes in (losses, rates, speeds)] == [3, 1, 1]
    names = losses.get_legend().get_texts()
    assert names[0].get_text() == "0001 a$b$.jsonl"
    assert not names[0].get_parse_math()
    assert names[1].get_text() == "held out: 4.200 to 2.500"


def test_a_picture_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(DropforgeError, match=r"cannot write .*: No such file or directory"):
        plot_file.write_plot(tmp_path / "nowhere" / "curves.png", [of_job()])


# -- `run` on a terminal

RUNNING = {
    "id": "j1", "dataset": "a.jsonl", "attempt": 1, "phase": "training", "step": 4, "total_steps": 10, "loss": 2.5,
    "tokens_per_second": 900.0, "eta_seconds": 6.0, "losses": [[1, 4.0], [4, 2.5]],
}  # fmt: skip


class GoneTerminal(io.StringIO):
    """A terminal whose other end was closed."""

    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")


def test_the_job_of_a_run_is_drawn_below_the_log_and_taken_away() -> None:
    drawn = io.StringIO()
    screen = RunScreen(Console(file=drawn, force_terminal=True, width=60, height=30), ascii_only=True)
    screen.show(RUNNING)
    assert "4/10" in drawn.getvalue()
    assert "6 s left" in drawn.getvalue()
    before = len(drawn.getvalue())
    screen.show(RUNNING)  # at once again: nothing is drawn
    assert len(drawn.getvalue()) == before
    screen.write("a line of the log\n")
    assert drawn.getvalue().index("a line of the log") < drawn.getvalue().rindex("4/10")
    screen.show(None)
    after = drawn.getvalue()[drawn.getvalue().rindex("4/10") :]
    assert "\x1b[2K" in after  # erased
    screen.close()


def test_a_small_terminal_gets_no_chart() -> None:
    small = io.StringIO()
    RunScreen(Console(file=small, force_terminal=True, width=60, height=10), ascii_only=True).show(RUNNING)
    assert "4/10" in small.getvalue()
    assert "+---" not in small.getvalue()


def test_a_terminal_that_is_gone_costs_its_lines_alone() -> None:
    screen = RunScreen(Console(file=GoneTerminal(), force_terminal=True, width=60, height=30))
    screen.show(RUNNING)
    screen.show({**RUNNING, "phase": "saving"})
    screen.show(None)
    screen.close()
