"""A version is continued as it was promoted, on the base that it was trained on, or the queue is held with the ways out."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from daemon import versions
from daemon.base_identity import BasePart, base_change, find_base, hub_folder, identify_base, recorded_base
from daemon.job import FailureKind, JobState
from daemon.lineage import LINEAGE, read_lineage
from daemon.recipe import ModelSettings
from tests.support.root import Prepared, Root, wait_until
from tests.support.sound import assert_sound

MakeRoot = Callable[..., Root]
Change = Callable[[Path], object]


def rows(name: str) -> list[dict[str, str]]:
    return [{"text": f"{name} {number}"} for number in range(8)]


def reason_to_wait(root: Root, *parts: str) -> str:
    """Wait until status says that it waits and all `parts`; returns the whole sentence."""

    def told() -> str:
        status = root.status() or {}
        reason = str(status.get("reason"))
        return reason if status.get("status") == "waiting" and all(part in reason for part in parts) else ""

    return wait_until(told, what=f"status to wait and say {parts}; it says {root.status()}")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    root = Root(tmp_path_factory.mktemp("prepared") / "root", behaviour={})
    base = root.path / "base"
    (base / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}", "eos_token": "</s>"}))
    root.drop("a.jsonl", rows("a"))
    assert root.run("run", "--once").returncode == 0
    return Prepared(root)


@pytest.fixture
def trained(prepared: Prepared) -> Iterator[Root]:
    """A root with one version, whose daemon has stopped; its base is in the root."""
    root = prepared.again()
    yield root
    root.close()


def record(root: Root, name: str) -> dict[str, Any]:
    text = (root.settings.model_dir / "versions" / name / versions.RECORD).read_text()
    found: dict[str, Any] = json.loads(text)
    return found


def edit_json(name: str, **fields: object) -> Change:
    def change(base: Path) -> None:
        value = json.loads((base / name).read_text())
        (base / name).write_text(json.dumps({**value, **fields}))

    return change


def other_weights(base: Path) -> None:
    (base / "model.safetensors").write_bytes(b"heights")  # of the same size


def other_tokenizer(base: Path) -> None:
    (base / "tokenizer.json").write_text('{"version": "2"}')


other_config = edit_json("config.json", rope_theta=1e6)
other_settings = edit_json("tokenizer_config.json", eos_token="<|end|>")
other_template = edit_json("tokenizer_config.json", chat_template="{{ other }}")


def template_file(base: Path) -> None:
    (base / "chat_template.jinja").write_text("{{ other }}")


CHANGES = [
    (other_weights, "on another base model", "weights"),
    (other_config, "on another base model", "config"),
    (other_tokenizer, "with another tokenizer", "tokenizer"),
    (other_settings, "with another tokenizer", "tokenizer"),
    (other_template, "with another chat template", "chat_template"),
    (template_file, "with another chat template", "chat_template"),
]


@pytest.mark.parametrize(("change", "says", "part"), CHANGES)
def test_a_base_that_changed_in_place_holds_the_queue_until_it_is_back(
    trained: Root, change: Change, says: str, part: str
) -> None:
    """Both identities and the ways out are told, no attempt is counted, and the hold goes by itself."""
    base = trained.path / "base"
    shutil.copytree(base, trained.path / "kept")
    change(base)
    trained.start()
    trained.drop("b.jsonl", rows("b"))
    reason = reason_to_wait(trained, says, 'start_from = "base"')
    assert reason.count("./base") == 2
    assert reason.count(f"{part} ") >= 2
    assert ("allow_template_change" in reason) is (part == "chat_template")
    launched = len(trained.events("job.started"))
    trained.drop("c.jsonl", rows("c"))
    wait_until(lambda: (job := trained.job("c.jsonl")) is not None and job.state is JobState.QUEUED, what="c.jsonl")
    assert len(trained.events("job.started")) == launched, "held, not tried again and again"
    assert trained.job("b.jsonl").attempts_without_progress == 0  # type: ignore[union-attr]
    shutil.rmtree(base)
    (trained.path / "kept").rename(base)
    assert trained.finished("b.jsonl").version == "0002"
    assert trained.finished("c.jsonl").version == "0003"
    assert trained.stop() == 0
    assert_sound(trained)


def test_start_from_base_is_a_way_out_for_jobs_that_wait_already(trained: Root) -> None:
    """Their recipes were frozen before; the new version's parent is the base, and the next one continues it."""
    other_weights(trained.path / "base")
    trained.start()
    trained.drop("b.jsonl", rows("b"))
    reason_to_wait(trained, "another base model")
    trained.configure(training={"start_from": "base"})
    assert trained.stop() == 0
    trained.start()
    assert trained.finished("b.jsonl").version == "0002"
    trained.configure(training={"start_from": "latest"})
    assert trained.stop() == 0
    trained.drop("c.jsonl", rows("c"))
    assert trained.run("run", "--once").returncode == 0
    assert [record(trained, name)["parent"] for name in ("0001", "0002", "0003")] == [None, None, "0002"]
    assert_sound(trained)


@pytest.mark.parametrize(
    ("change", "tables", "parent"),
    [
        (other_template, {"model": {"allow_template_change": True}}, "0001"),
        (other_weights, {"training": {"start_from": "base"}}, None),
    ],
)
def test_a_reload_is_enough_for_the_settings_that_a_hold_names(
    trained: Root, change: Change, tables: dict[str, dict[str, Any]], parent: str | None
) -> None:
    change(trained.path / "base")
    trained.start()
    trained.drop("b.jsonl", rows("b"))
    reason_to_wait(trained, "version 0001 was trained")
    trained.configure(**tables)
    os.kill(trained.start_pid, signal.SIGHUP)
    assert trained.finished("b.jsonl").version == "0002"
    assert record(trained, "0002")["parent"] == parent
    assert trained.events("job.renewed")
    assert trained.stop() == 0


def test_another_commit_of_a_hub_model_holds_the_queue_until_the_settings_name_the_first(
    make_root: MakeRoot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`main` moved on: what was trained on one commit is not continued on the next."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    root = make_root(behaviour={}, variables={"HF_HUB_CACHE": str(tmp_path / "hub")})
    base = root.path / "base"
    hub_cache(tmp_path / "hub", base, "a" * 40)
    root.configure(model={"model_name_or_path": "org/model"})
    root.start()
    root.drop("a.jsonl", rows("a"))
    assert root.finished("a.jsonl").state is JobState.SUCCEEDED
    assert record(root, "0001")["base"]["commit"] == "a" * 40
    other_weights(base)
    hub_cache(tmp_path / "hub", base, "b" * 40)
    root.drop("b.jsonl", rows("b"))
    reason_to_wait(root, "org/model@aaaaaaaaaaaa (weights", "org/model@bbbbbbbbbbbb (weights")
    root.configure(model={"revision": "a" * 40})
    os.kill(root.start_pid, signal.SIGHUP)
    assert root.finished("b.jsonl").version == "0002"
    assert record(root, "0002")["parent"] == "0001"
    assert root.stop() == 0


def test_a_sidecar_that_starts_from_the_base_runs_before_what_is_held(trained: Root) -> None:
    other_weights(trained.path / "base")
    trained.start()
    trained.drop("b.jsonl", rows("b"))
    reason_to_wait(trained, "another base model")
    trained.drop("c.job.toml", b'priority = "high"\n[training]\nstart_from = "base"\n')
    trained.drop("c.jsonl", rows("c"))
    assert trained.finished("c.jsonl").version == "0002"
    assert trained.finished("b.jsonl").version == "0003", "it continues what is on the new base"
    assert record(trained, "0003")["parent"] == "0002"
    assert trained.stop() == 0


def test_a_template_is_accepted_by_the_setting_that_says_so_and_told(trained: Root) -> None:
    other_template(trained.path / "base")
    trained.configure(model={"allow_template_change": True})
    trained.drop("b.jsonl", rows("b"))
    assert trained.run("run", "--once").returncode == 0
    job = trained.finished("b.jsonl")
    assert job.result is not None
    assert any("with another chat template" in warning for warning in job.result.warnings)
    other_weights(trained.path / "base")
    trained.drop("c.jsonl", rows("c"))
    held = trained.run("run", "--once")
    assert held.returncode == 1
    assert "on another base model" in held.stderr, "the setting accepts nothing else"


def test_another_base_of_the_settings_is_told_with_both_names(trained: Root) -> None:
    shutil.copytree(trained.path / "base", trained.path / "other")
    other_weights(trained.path / "other")
    trained.configure(model={"model_name_or_path": "other"})
    trained.drop("b.jsonl", rows("b"))
    held = trained.run("run", "--once")
    assert held.returncode == 1
    assert "./base (weights" in held.stderr
    assert "./other (weights" in held.stderr


def test_the_same_base_in_another_place_is_the_same_base(trained: Root, tmp_path: Path) -> None:
    """Copied, renamed, its JSON written anew: contents decide, not names and times."""
    moved = tmp_path / "elsewhere"
    shutil.copytree(trained.path / "base", moved, copy_function=shutil.copy)
    shutil.rmtree(trained.path / "base")
    (moved / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "</s>", "chat_template": "{{ messages }}"}, indent=4)
    )
    edit_json("config.json", transformers_version="9.9")(moved)
    trained.configure(model={"model_name_or_path": str(moved)})
    trained.drop("b.jsonl", rows("b"))
    assert trained.run("run", "--once").returncode == 0
    assert record(trained, "0002")["parent"] == "0001"
    assert record(trained, "0002")["base"]["name"] == str(moved)


def test_record_and_lineage_have_the_base_and_every_file(trained: Root) -> None:
    line = read_lineage(trained.settings.model_dir).recorded()["0001"]
    for kept in (line, record(trained, "0001")):
        base = recorded_base(kept)
        assert base is not None
        assert base.name == "./base"
        assert all(base.part(part) for part in BasePart)
        assert {"version", "job", "dataset_digest", "parent", "parent_digest", "files"} <= kept.keys()
        assert set(kept["files"]) == {"adapter_config.json", "adapter_model.safetensors"}


def forget_base(root: Root) -> None:
    """Make version 0001 one of before bases were recorded."""
    model_dir = root.settings.model_dir
    path = model_dir / "versions" / "0001" / versions.RECORD
    old = {key: value for key, value in json.loads(path.read_text()).items() if key not in ("base", "files")}
    path.write_text(json.dumps(old))
    (model_dir / LINEAGE).write_text(json.dumps({"event": "promoted", **old}) + "\n")


def test_a_version_without_a_recorded_base_is_continued_with_a_warning_and_then_recorded(trained: Root) -> None:
    forget_base(trained)
    trained.drop("b.jsonl", rows("b"))
    assert trained.run("run", "--once").returncode == 0
    job = trained.finished("b.jsonl")
    assert job.result is not None
    assert any("version 0001 does not record the base model" in warning for warning in job.result.warnings)
    shown = trained.run("show", job.id)
    assert "does not record the base model" in " ".join(shown.stdout.split())
    assert record(trained, "0002")["base"]["name"] == "./base"
    trained.drop("c.jsonl", rows("c"))
    assert trained.run("run", "--once").returncode == 0
    later = trained.finished("c.jsonl")
    assert later.result is not None
    assert not later.result.warnings


def flip_bits(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 0b1010  # the form stays whole
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_damaged_version_holds_the_queue_until_another_one_is_current(trained: Root, name: str) -> None:
    trained.drop("b.jsonl", rows("b"))
    assert trained.run("run", "--once").returncode == 0
    flip_bits(trained.settings.model_dir / "versions" / "0002" / name)
    trained.start()
    trained.drop("c.jsonl", rows("c"))
    reason = reason_to_wait(trained, f"version 0002: {name} is not the file that was promoted")
    assert "`dropforge rollback 0001`" in reason
    assert trained.run("rollback", "1").returncode == 0
    assert trained.finished("c.jsonl").version == "0003"
    assert record(trained, "0003")["parent"] == "0001"
    assert trained.stop() == 0
    assert_sound(trained)


def test_a_damaged_version_that_is_brought_back_is_gone_on_with(trained: Root) -> None:
    adapter = trained.settings.model_dir / "versions" / "0001" / "adapter_model.safetensors"
    content = adapter.read_bytes()
    flip_bits(adapter)
    trained.start()
    trained.drop("b.jsonl", rows("b"))
    reason_to_wait(trained, "is not the file that was promoted")
    adapter.write_bytes(content)
    assert trained.finished("b.jsonl").version == "0002"
    assert trained.stop() == 0


def test_a_base_that_is_gone_holds_the_queue_until_it_is_back(trained: Root) -> None:
    """As a lost mount leaves it: no queued job fails for it, and what was configured anew is told as that."""
    away = (trained.path / "base").rename(trained.path / "away")
    trained.start()
    for name in ("b", "c"):
        trained.drop(f"{name}.jsonl", rows(name))
    reason_to_wait(trained, "version 0001 was trained on ./base", f"{trained.path / 'base'} is missing")
    away.rename(trained.path / "base")
    assert {trained.finished(f"{name}.jsonl").state for name in ("b", "c")} == {JobState.SUCCEEDED}
    assert trained.stop() == 0
    trained.configure(model={"model_name_or_path": "~nobody-at-all/model"})
    trained.drop("d.jsonl", rows("d"))
    assert trained.run("run", "--once").returncode == 1
    job = trained.job("d.jsonl")
    assert job is not None
    assert (job.state, job.failure) == (JobState.QUEUED, FailureKind.BASE)
    assert "~nobody-at-all/model" in job.reason


def test_digests_are_the_lineages_not_those_of_a_record_that_was_edited_along(trained: Root) -> None:
    folder = trained.settings.model_dir / "versions" / "0001"
    flip_bits(folder / "adapter_model.safetensors")
    kept = record(trained, "0001")
    digest = versions.digest_file(folder / "adapter_model.safetensors").blake3_hex
    kept["files"]["adapter_model.safetensors"] = digest
    (folder / versions.RECORD).write_text(json.dumps({**kept, "adapter_digest": digest}))
    trained.drop("b.jsonl", rows("b"))
    held = trained.run("run", "--once")
    assert held.returncode == 1
    assert "is not the file that was promoted" in held.stderr


def test_a_card_may_be_edited(trained: Root) -> None:
    (trained.settings.model_dir / "versions" / "0001" / versions.CARD).write_text("my own words")
    trained.drop("b.jsonl", rows("b"))
    assert trained.run("run", "--once").returncode == 0


def test_a_rollback_to_a_damaged_version_is_refused_and_one_to_another_base_warns(trained: Root) -> None:
    other_weights(trained.path / "base")
    trained.configure(training={"start_from": "base"})
    trained.drop("b.jsonl", rows("b"))
    assert trained.run("run", "--once").returncode == 0
    back = trained.run("rollback", "1")
    assert back.returncode == 0
    assert "warning: version 0001 was trained on another base model" in " ".join(back.stdout.split())
    flip_bits(trained.settings.model_dir / "versions" / "0002" / "adapter_model.safetensors")
    refused = trained.run("rollback", "2")
    assert refused.returncode == 1
    assert "version 0002: adapter_model.safetensors is not the file that was promoted" in refused.stderr
    current = versions.current_version(trained.settings.model_dir)
    assert current is not None
    assert current.name == "0001"


def test_a_version_of_another_folder_that_is_still_there_is_compared_with_it(trained: Root) -> None:
    """An adapter of before bases were recorded names its base: what lies there now is the best evidence."""
    forget_base(trained)
    config = trained.settings.model_dir / "versions" / "0001" / "adapter_config.json"
    other = trained.path / "other"
    shutil.copytree(trained.path / "base", other)
    config.write_text(json.dumps({"peft_type": "LORA", "r": 16, "base_model_name_or_path": str(other)}))
    trained.drop("b.jsonl", rows("b"))
    assert trained.run("run", "--once").returncode == 0
    assert trained.run("rollback", "1").returncode == 0
    other_weights(other)
    trained.drop("c.jsonl", rows("c"))
    held = trained.run("run", "--once")
    assert held.returncode == 1
    assert f"version 0001 was trained on '{other}', and './base' is configured" in held.stderr


def hub_cache(folder: Path, base: Path, commit: str, *, head: bool = True) -> None:
    """Add a snapshot to a cache as the Hub's client lays it out."""
    model = hub_folder("org/model")
    assert model.is_relative_to(folder)
    shutil.copytree(base, model / "snapshots" / commit)
    if head:
        (model / "refs").mkdir(exist_ok=True)
        (model / "refs" / "main").write_text(commit)


@pytest.mark.parametrize("name", ["", "~nobody-at-all/model", "n" * 5000, "a\0b", "org/none", "/root/../\udcff"])
def test_a_name_that_leads_nowhere_is_no_base_and_no_error(name: str) -> None:
    assert find_base(ModelSettings(model_name_or_path=name)) is None


def test_a_snapshot_of_the_hub_is_known_by_its_commit_and_contents(
    trained: Root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    base, settings = trained.path / "base", ModelSettings(model_name_or_path="org/model")
    assert find_base(settings) is None
    hub_cache(tmp_path / "hub", base, "a" * 40)
    first = find_base(settings)
    assert first is not None
    hub_cache(tmp_path / "hub", base, "b" * 40)
    same = find_base(settings)
    assert same is not None
    assert (first.portable_name, same.revision) == ("org/model", "b" * 40)
    assert base_change("0001", identify_base(first), identify_base(same)) is None
    other_weights(base)
    hub_cache(tmp_path / "hub", base, "c" * 40, head=False)
    other = find_base(settings.model_copy(update={"revision": "c" * 40}))
    assert other is not None
    change = base_change("0001", identify_base(first), identify_base(other))
    assert change is not None
    assert "org/model@aaaaaaaaaaaa (weights" in change.message
    assert "org/model@cccccccccccc (weights" in change.message
