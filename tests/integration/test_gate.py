"""A version that has lost what earlier ones had learned does not become current by itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from daemon import held_versions, versions
from daemon.errors import DropforgeError, NotFound
from daemon.evaluation.gate import with_action
from daemon.evaluation.scores import read_any_scores
from daemon.evaluation.settings import GateSettings
from daemon.evaluation.values import GateAction, GateVerdict
from daemon.job import Outcome, RunResult, RunSpec
from daemon.lineage import read_lineage
from daemon.memory.store import dataset_dir, memory_dir_of, read_memory
from daemon.recipe import layered
from guard import ModelLock
from tests.support.inprocess import StopAfterLoading, events, promote, specify, train
from tests.support.root import Root, wait_until
from tests.support.sound import assert_sound
from tests.support.sound_model import assert_model_dir_sound

MakeRoot = Callable[..., Root]

COLOURS = ("red", "green", "blue", "black")
# The tiny model learns this much: which word follows, of the words that its own rows have.
QUICK = {
    "training": {"learning_rate": 1e-2, "num_train_epochs": 4.0, "save_steps": 1000},
    "data": {"max_length": 64},
    "replay": {"share": 0.0},
}


def rows(words: tuple[str, ...], start: int, count: int = 80) -> list[dict[str, str]]:
    return [
        {"prompt": f"item {n} is ", "completion": f"{words[0]} and {words[0]} and {words[0]} and {words[0]}"}
        for n in range(start, start + count)
    ]


def specified(folder: Path, name: str, base: Path, content: list[dict[str, str]], **gate: Any) -> RunSpec:
    """A run on the model directory and state that all runs in `folder` share."""
    spec = specify(folder / name, content, base, QUICK, format_="prompt_completion")
    shared = {"model_dir": str(folder / "model"), "state_dir": str(folder / "state")}
    for path in shared.values():
        Path(path).mkdir(exist_ok=True)
    return replace(spec, job_id=name, dataset=replace(spec.dataset, name=f"{name}.jsonl"), gate=gate, **shared)


def finished(spec: RunSpec) -> RunResult:
    result = with_action(train(spec), GateSettings.model_validate(spec.gate))
    assert result.outcome is Outcome.SUCCEEDED, result.message
    promote(spec, result)
    return result


@pytest.fixture(scope="module")
def learned(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root that has learned one dataset, `a`, to be copied."""
    folder = tmp_path_factory.mktemp("learned")
    finished(specified(folder, "a", tiny_base, rows(COLOURS[:1], 0)))
    return folder


def copied(learned: Path, folder: Path) -> Path:
    for name in ("model", "state"):
        shutil.copytree(learned / name, folder / name, symlinks=True)
    return folder


@pytest.fixture(scope="module")
def held(tiny_base: Path, learned: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunSpec, RunResult]:
    """A root whose second dataset answers the first one's questions otherwise: its version is held."""
    folder = copied(learned, tmp_path_factory.mktemp("held"))
    spec = specified(folder, "b", tiny_base, rows(COLOURS[1:2], 500), remedies=[])
    return folder, spec, finished(spec)


def test_a_loss_is_measured_told_and_held(held: tuple[Path, RunSpec, RunResult]) -> None:
    folder, spec, result = held
    evaluation = result.evaluation
    assert evaluation is not None
    assert evaluation.verdict is GateVerdict.REGRESSED
    assert evaluation.action is GateAction.HELD
    [one] = evaluation.datasets
    assert one.name == "a.jsonl"
    assert one.loss_after > one.loss_before + 0.05
    assert evaluation.own is not None
    assert evaluation.own.loss == pytest.approx(result.held_out_after)
    assert any("lost of an earlier dataset: a.jsonl" in warning for warning in result.warnings)
    [judged] = events(spec, "run.gate_judged")
    assert judged["verdict"] == "regressed"
    model_dir = folder / "model"
    current = versions.current_version(model_dir)
    assert current is not None
    assert current.name == "0001"
    assert read_lineage(model_dir).held() == ["0002"]
    assert_model_dir_sound(model_dir)


def test_the_parents_scores_are_those_of_its_own_run(held: tuple[Path, RunSpec, RunResult]) -> None:
    """What the parent was scored on at its own end is not scored again, and is the same."""
    folder, _, result = held
    first = versions.find_version(folder / "model", "1")
    known = read_any_scores(memory_dir_of(folder / "state"), str(first.record["adapter_digest"]))
    own = first.record["evaluation"]["own"]
    [scored] = known.datasets.values()
    assert len(scored) == own["rows"] == 16
    memory = read_memory(dataset_dir(memory_dir_of(folder / "state"), str(first.record["dataset_digest"])))
    assert memory is not None
    assert {score.row for score in scored.values()} == {row.digest for row in memory.held_out()}
    assert result.evaluation is not None
    [one] = result.evaluation.datasets
    assert one.loss_before == pytest.approx(own["loss"])


def test_a_version_that_loses_nothing_passes(tiny_base: Path, learned: Path, tmp_path: Path) -> None:
    copied(learned, tmp_path)
    more = specified(tmp_path, "more", tiny_base, rows(COLOURS[:1], 500))
    assert train(more, StopAfterLoading()).outcome is Outcome.INTERRUPTED
    result = finished(more)
    assert result.evaluation is not None
    assert result.evaluation.passes
    assert result.evaluation.alpha is None
    current = versions.current_version(tmp_path / "model")
    assert current is not None
    assert current.name == "0002"
    memory = read_memory(dataset_dir(memory_dir_of(tmp_path / "state"), more.dataset.digest))
    assert memory is not None


def test_nothing_is_scored_where_the_administrator_says_so(tiny_base: Path, learned: Path, tmp_path: Path) -> None:
    copied(learned, tmp_path)
    result = finished(specified(tmp_path, "b", tiny_base, rows(COLOURS[1:2], 500), action="off"))
    assert result.evaluation is not None
    assert result.evaluation.verdict is GateVerdict.UNMEASURED
    assert result.evaluation.datasets == ()


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"training": {"start_from": "base"}}, "without what version 0001 has learned"),
        ({"data": {"max_length": 4}}, "a.jsonl"),
        ({"replay": {"supersedes": ["a.jsonl"]}}, "a.jsonl"),
    ],
    ids=["base", "max_length", "supersedes"],
)
def test_no_sidecar_switches_its_own_gate_off(
    held: tuple[Path, RunSpec, RunResult], tmp_path: Path, overrides: dict[str, dict[str, Any]], told: str
) -> None:
    """Also not by what it may say of its own dataset: where it begins, how long rows are, what it takes the place of."""
    folder, spec, _ = held
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True, symlinks=True)
    shared = {name: str(tmp_path / Path(getattr(spec, name)).name) for name in ("model_dir", "state_dir")}
    root_recipe = {table: spec.recipe[table] for table in ("data", "replay")}
    recipe = layered(spec.recipe, overrides)
    spec = replace(
        spec, job_id="d", recipe=recipe, overrides=overrides, root_recipe=root_recipe, run_dir=str(tmp_path), **shared
    )
    evaluation = train(spec).evaluation
    assert evaluation is not None
    assert not evaluation.passes
    assert told in evaluation.reasons[0]


def test_a_held_version_is_promoted_or_discarded_by_a_person(held: tuple[Path, RunSpec, RunResult]) -> None:
    folder, spec, _ = held
    model_dir, state_dir = folder / "model", folder / "state"
    with ModelLock(model_dir, owner="test"):
        with pytest.raises(DropforgeError, match="promote 2"):
            versions.rollback(model_dir, "2")
        held_versions.promote_held(model_dir, "2")
        held_versions.promote_held(model_dir, "2")
        assert_model_dir_sound(model_dir)
        assert (model_dir / "latest").readlink().name == "0002"
        with pytest.raises(DropforgeError, match="current"):
            held_versions.discard_held(model_dir, state_dir, "2")
        versions.rollback(model_dir, "1")
    other = specified(
        folder, "c", Path(spec.recipe["model"]["model_name_or_path"]), rows(COLOURS[2:3], 900), remedies=[]
    )
    assert finished(other).evaluation is not None
    with ModelLock(model_dir, owner="test"):
        versions.rollback(model_dir, "2")
        with pytest.raises(DropforgeError, match="continues version 0001"):
            held_versions.promote_held(model_dir, "3")
        held_versions.discard_held(model_dir, state_dir, "3")
        assert held_versions.discard_held(model_dir, state_dir, "3")["dataset"] == "c.jsonl"
        with pytest.raises(NotFound):
            held_versions.discard_held(model_dir, state_dir, "4")
    assert read_memory(dataset_dir(memory_dir_of(state_dir), other.dataset.digest)) is None
    assert versions.newest_number(model_dir) == 3
    assert_model_dir_sound(model_dir)


def test_the_daemon_tells_of_a_held_version_and_goes_on_from_its_parent(make_root: MakeRoot, tiny_base: Path) -> None:
    """Exit code, hook, status, `show`; a person decides; and no sidecar has a say in it."""
    root = make_root(base_model=tiny_base, tables=QUICK)
    told = root.path / "told.json"
    root.configure(hooks={"on_gate": ("/bin/sh", "-c", f"cat > {told}")}, gate={"remedies": ()})
    root.start()
    for name, content in (("a", rows(COLOURS[:1], 0)), ("b", rows(COLOURS[1:2], 500))):
        (root.path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    assert root.run("submit", "--wait", str(root.path / "a.jsonl")).returncode == 0
    (root.path / "sidecar.toml").write_text('[gate]\naction = "off"\n')
    shutil.copy(root.path / "b.jsonl", root.path / "c.jsonl")
    shutil.copy(root.path / "sidecar.toml", root.path / "c.job.toml")
    assert root.run("submit", "--wait", "--no-check", str(root.path / "c.jsonl")).returncode == 3  # refused
    done = root.run("submit", "--wait", str(root.path / "b.jsonl"))
    assert done.returncode == 3, done.stdout + done.stderr
    assert "held: a.jsonl" in done.stdout
    assert "dropforge promote" in done.stdout
    wait_until(told.exists, what="the hook")
    lost = wait_until(lambda: json.loads(told.read_bytes() or b"null"), what="the hook's facts")
    assert lost["evaluation"]["version"] == "0002"
    status = wait_until(lambda: (found := root.status()) and found["held"] and found, what="the status to tell")
    assert status["held"] == ["0002"]
    assert status["model"]["version"] == "0001"
    assert status["evaluation"]["version"] == "0001"
    shown = json.loads(root.run("versions", "--matrix", "--json").stdout)
    assert [(row["version"], row["held"]) for row in shown["rows"]] == [("0001", False), ("0002", True)]
    assert root.run("rollback", "2").returncode != 0
    assert root.run("compare", "1", "2").returncode == 0
    assert_sound(root)
    assert root.run("promote", "2").returncode == 0
    status = wait_until(lambda: (found := root.status()) and not found["held"] and found, what="the promotion")
    assert status["evaluation"]["backward_transfer"] < 0
    assert status["evaluation"]["datasets"][0]["dataset"] == "a.jsonl"
    assert_sound(root)
