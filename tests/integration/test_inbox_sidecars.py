"""Sidecars: taken with their file whichever comes first; what they may not say refuses the file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon.inbox import archive, candidates
from daemon.job import TRANSITIONS, JobState, Priority
from tests.support.inbox import ROW, Root, assert_sound

GOOD = 'priority = "high"\n[training]\nlearning_rate = 1e-5\n[lora]\nr = 4\n[data.columns]\nprompt = "q"\ncompletion = "a"\n'
FLAT = '{"q": "1", "a": "2"}\n'


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Root]:
    with Root(tmp_path) as opened:
        yield opened
        assert_sound(opened.settings, opened.store)


@pytest.mark.parametrize("first", ["x.job.toml", "x.jsonl"])
def test_file_and_sidecar_are_taken_together_whichever_comes_first(root: Root, first: str) -> None:
    """The overrides reach the pass (columns), the order (priority) and the frozen recipe."""
    texts = {"x.job.toml": GOOD, "x.jsonl": FLAT}
    for name in sorted(texts, key=lambda name: name != first):
        root.drop(name, texts[name])
    (job,) = root.wait_for(1)
    assert (job.priority, job.dataset.format) == (Priority.HIGH, "columns")
    assert job.recipe["training"]["learning_rate"] == 1e-5
    assert job.recipe["lora"]["r"] == 4
    assert (root.inbox / "processing" / job.id / "x.job.toml").read_text() == GOOD


def test_a_sidecar_serves_a_compressed_file_too(root: Root) -> None:
    """`x.job.toml` for `x.jsonl.gz`."""
    import gzip

    root.drop("x.job.toml", GOOD)
    root.drop("x.jsonl.gz", gzip.compress(FLAT.encode()))
    (job,) = root.wait_for(1)
    assert job.dataset.format == "columns"


def test_a_sidecar_serves_every_file_of_its_name_that_lies_there(root: Root) -> None:
    """As after `gzip -k`: none of them is trained without it, and it does not wait for a file of a later day."""
    import gzip

    root.drop("x.job.toml", GOOD)
    (root.inbox / "x.jsonl").write_text(FLAT)
    (root.inbox / "x.jsonl.gz").write_bytes(gzip.compress(FLAT.encode() * 2))
    jobs = root.wait_for(2)
    assert [job.recipe["lora"]["r"] for job in jobs] == [4, 4]
    assert not (root.inbox / "x.job.toml").exists()


def test_a_file_waits_for_a_sidecar_that_is_being_written(root: Root) -> None:
    """Half a sidecar may be sound TOML that says something else."""
    with (root.inbox / "x.job.toml").open("w") as writer:
        writer.write('priority = "high"\n')
        writer.flush()
        root.drop("x.jsonl", FLAT)
        root.pump(lambda: any("sidecar" in item.reason for item in root.intake.view().waiting))
        assert not root.jobs()
        writer.write(GOOD.split("\n", 1)[1])
    (job,) = root.wait_for(1)
    assert job.dataset.format == "columns"


BAD = [
    ("model = 1", "unknown or forbidden key model"),
    ("[paths]\ninbox = '/etc'", "unknown or forbidden key paths"),
    ("[training]\noutput_dir = '/etc'", "unknown key [training] output_dir"),
    ("[training]\nlearning_rate = 'fast'", "[training] learning_rate"),
    ("training = 3", "write [training]"),
    ("priority = 'urgent'", "priority is high, normal or low"),
    ("force = 'yes'", "force is true or false"),
    ("[data]\nmax_line_bytes = 999999999999", "[data] max_line_bytes cannot be set for one dataset"),
    ("[data]\nrender_seconds = 1e9", "[data] render_seconds cannot be set for one dataset"),
    ("[training]\nnum_processes = 500", "[training] num_processes cannot be set for one dataset"),
    ("[training]\nsave_total_limit = 10000", "[training] save_total_limit cannot be set for one dataset"),
    ("[lora]\ntarget_modules = '(a+)+b'", "[lora] target_modules cannot be a pattern"),
    ("[data.columns]\nprompt = 'q'", "prompt and completion are set together"),
    ("priority = ", "not sound TOML"),
    ("#" * 70_000, "larger than 65536 bytes"),
]


@pytest.mark.parametrize(("text", "reason"), BAD)
def test_a_sidecar_that_cannot_be_used_refuses_its_file_with_the_key_named(root: Root, text: str, reason: str) -> None:
    """Rather than train the file some other way; both end in failed/."""
    root.drop("x.job.toml", text + "\n")
    root.drop("x.jsonl", ROW)
    (job,) = root.wait_for(1, JobState.REJECTED)
    assert reason in job.reason
    folder = root.inbox / "failed" / job.id
    assert sorted(path.name for path in folder.iterdir()) == ["report.json", "report.txt", "x.job.toml", "x.jsonl"]


def test_a_link_as_a_sidecar_refuses_the_file_and_is_not_followed(root: Root) -> None:
    """It might point at anything that the daemon may read."""
    secret = root.path / "secret.toml"
    secret.write_text("password = 1\n")
    (root.inbox / "x.job.toml").symlink_to(secret)
    root.drop("x.jsonl", ROW)
    (job,) = root.wait_for(1, JobState.REJECTED)
    assert "symbolic link" in job.reason
    assert "password" not in job.reason


def test_a_mended_sidecar_counts_when_the_file_is_tried_again(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read where it lies when the pass begins, not remembered from the claim."""
    root.drop("x.job.toml", "force = 7\n")
    root.drop("x.jsonl", FLAT)
    (job,) = root.wait_for(1, JobState.REJECTED)
    archive.reopen_files(root.settings, job)
    (root.inbox / "processing" / job.id / "x.job.toml").write_text(GOOD)
    monkeypatch.setitem(TRANSITIONS, JobState.REJECTED, frozenset({JobState.CLAIMED}))
    root.store.transition(job.id, JobState.REJECTED, JobState.CLAIMED, "retry")
    (job,) = root.wait_for(1)
    assert (job.priority, job.dataset.format) == (Priority.HIGH, "columns")


def test_an_orphan_is_reported_and_still_serves_its_file_when_that_comes(
    root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, after a while."""
    monkeypatch.setattr(candidates, "ORPHAN_SECONDS", 0.3)
    root.drop("x.job.toml", GOOD)
    root.pump(lambda: root.log.events("file.left_alone"))
    assert root.intake.view().left_alone[0].name == "x.job.toml"
    for _ in range(4):
        root.tick()
    assert len(root.log.events("file.left_alone")) == 1
    root.drop("x.jsonl", FLAT)
    (job,) = root.wait_for(1)
    assert job.priority is Priority.HIGH
    root.pump(lambda: not root.intake.view().left_alone)
