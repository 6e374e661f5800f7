"""Somebody who can only drop files can do nothing but drop files: each test is what a hostile or careless dropper did."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon.dataset import sidecar, source
from daemon.job import JobState, Priority
from tests.support.dropper import ALICE, MALLORY, drop_as, needs_root, open_folder, share
from tests.support.inbox import ROW, Root, assert_sound

DOTS = "a." * 30_000
HIDDEN_DOTS = "x = {a='''\n\"''', " + DOTS + 'a = "1"}'


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Root]:
    with Root(tmp_path) as opened:
        yield opened
        assert_sound(opened.settings, opened.store)


@pytest.fixture
def shared() -> Iterator[Root]:
    """A root whose inbox every user may drop into."""
    with open_folder() as path, Root(path) as opened:
        share(opened.inbox)
        yield opened
        assert_sound(opened.settings, opened.store)


def slowest_tick(root: Root, *states: JobState, count: int = 1) -> float:
    """Seconds of the longest tick until so many jobs are in these states."""
    slowest, end = 0.0, time.monotonic() + 60
    while len(root.jobs(*states)) < count:
        assert time.monotonic() < end, root.log.lines[-10:]
        root.wakeup.wait(0.02)
        root.wakeup.clear()
        began = time.monotonic()
        root.intake.tick()
        slowest = max(slowest, time.monotonic() - began)
    return slowest


HOSTILE = {
    "digits": ("priority = " + "1" * 5000, "line 1 has a number of more than 64 digits"),
    "hexadecimal digits": ("[training]\nseed = 0x" + "f" * 5000, "line 2 has a number of more than 64 digits"),
    "a wide number": ("[training]\nseed = 99999999999999999999", "a number does not fit 64 bits"),
    "dotted keys": (f"seed.{DOTS}a = 1", "line 1 has a key of more than 4 parts"),
    "dotted keys behind a string of lines": (HIDDEN_DOTS, ""),
    "a dotted table": (f"[{DOTS}a]\nx = 1", "line 1 has a key of more than 4 parts"),
    "deep arrays": ("[lora]\ntarget_modules = " + "[" * 30_000 + "]" * 30_000, "nested too deeply"),
    "deep tables": ("x = " + "{a = " * 10_000 + "1" + "}" * 10_000, "nested too deeply"),
    "many values": ("[lora]\ntarget_modules = [" + '"a",' * 13_000 + "]", "more than 10000 values"),
    "not UTF-8": (b"\xff\xfe", "not sound TOML"),
    "a date": ("[training]\nseed = 2020-01-01", "[training] seed"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_a_sidecar_does_to_a_parser_is_that_file_s_fault_and_never_the_loop_s(root: Root, what: str) -> None:
    """The file is refused with the place and the reason, no tick is long, and the next file is taken."""
    text, reason = HOSTILE[what]
    root.drop("bad.job.toml", text)
    root.drop("bad.jsonl", ROW)
    assert slowest_tick(root, JobState.REJECTED) < 1.0
    (job,) = root.jobs(JobState.REJECTED)
    assert job.reason.startswith("cannot use the sidecar bad.job.toml: ")
    assert reason in job.reason
    root.drop("good.jsonl", ROW)
    root.wait_for(1)


def test_a_sidecar_that_takes_its_parser_long_is_given_up(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the reason: here the time is so short that any text takes longer."""
    path = root.path / "x.job.toml"
    path.write_text(HIDDEN_DOTS)
    monkeypatch.setattr(sidecar, "READ_SECONDS", 0.05)
    began = time.monotonic()
    with pytest.raises(sidecar.RejectedSidecar, match=r"took more than 0\.05 s"):
        sidecar.read_sidecar(path, root.settings.recipe, root.settings.limits, data_owner=os.getuid())
    assert time.monotonic() - began < 1.0


VALUES = [
    ("[training]\nseed = 4294967296", "[training] seed is less than 4294967296"),
    ("[training]\nseed = -1", "[training] seed"),
    ("[training]\nnum_train_epochs = inf", "[training] num_train_epochs"),
    ("[training]\nnum_train_epochs = nan", "[training] num_train_epochs"),
    ("[training]\nnum_train_epochs = 1e308", "[training] num_train_epochs"),
    ("[training]\nnum_train_epochs = -1", "[training] num_train_epochs"),
    ("[training]\nlearning_rate = 1e308", "[training] learning_rate"),
    ("[training]\nlearning_rate = 100", "learning_rate = 100.0 is asked for, but [limits] max_learning_rate = 10"),
    ("[training]\nwarmup_steps = 1e300", "[training] warmup_steps"),
    ("[training]\nsave_steps = 9000000000000000000", "[training] save_steps"),
    ("[training]\nper_device_train_batch_size = true", "[training] per_device_train_batch_size"),
    ("[lora]\nr = true", "[lora] r: true and false are no value for it"),
    ("[lora]\nr = 0", "[lora] r"),
    ("[lora]\nlora_alpha = 1e308", "[lora] lora_alpha"),
]


@pytest.mark.parametrize(("text", "reason"), VALUES)
def test_a_value_out_of_range_is_refused_with_its_key_before_anything_runs(root: Root, text: str, reason: str) -> None:
    root.drop("x.job.toml", text)
    root.drop("x.jsonl", ROW)
    (job,) = root.wait_for(1, JobState.REJECTED)
    assert reason in job.reason


WISHES = [
    ("[lora]\nr = 1000000000", {}, "[lora] r = 1000000000 is asked for, but [limits] max_lora_rank = 1024"),
    ("[training]\nnum_train_epochs = 5000", {}, "[limits] max_epochs = 1000 allows no more"),
    ("[training]\nmax_steps = 2000000", {}, "[limits] max_steps = 1000000 allows no more"),
    ("[data]\nmax_length = 1000000", {}, "[limits] max_length = 262144 allows no more"),
    ("[training]\ngradient_accumulation_steps = 100000", {}, "400,000 rows a step are asked for"),
    ("[training]\nseed = 7", {"sidecar_keys": ["priority"]}, "[training] seed cannot be set by a sidecar here"),
    ("force = true", {"sidecar_keys": ["priority"]}, "force cannot be set by a sidecar here"),
    ("[lora]\nr = 4", {"sidecar_keys": ["training", "lora.lora_alpha"]}, "[lora] r cannot be set"),
]


@pytest.mark.parametrize(("text", "limits", "reason"), WISHES)
def test_a_wish_beyond_a_limit_refuses_its_file_and_says_which_limit(
    tmp_path: Path, text: str, limits: dict[str, object], reason: str
) -> None:
    with Root(tmp_path, limits=limits) as root:
        root.drop("x.job.toml", text)
        root.drop("x.jsonl", ROW)
        (job,) = root.wait_for(1, JobState.REJECTED)
        assert reason in job.reason


DATA_LIMITS = [
    ({"max_rows": 3}, "x.jsonl", "it has more than 3 rows"),
    ({"max_file_bytes": 50}, "x.jsonl", "bytes, but [limits] max_file_bytes = 50 allows no more"),
    ({"max_expanded_bytes": 50}, "x.jsonl.gz", "it expands to more than 50 bytes"),
]


@pytest.mark.parametrize(("limits", "name", "reason"), DATA_LIMITS)
def test_a_file_beyond_a_limit_is_refused_and_one_within_is_not(
    tmp_path: Path, limits: dict[str, int], name: str, reason: str
) -> None:
    import gzip

    pack = gzip.compress if name.endswith(".gz") else bytes
    with Root(tmp_path, limits=limits) as root:
        root.drop(name, pack(b"".join(b'{"text": "row %d"}\n' % number for number in range(4))))
        (job,) = root.wait_for(1, JobState.REJECTED)
        assert reason in job.reason
        assert "raise the limit" in job.advice
        root.drop(name, pack(b'{"text": "row"}\n'))
        root.wait_for(1)


@needs_root
def test_a_sidecar_that_another_user_planted_is_not_used_and_everybody_is_told(shared: Root) -> None:
    """Her data is trained as the root says; the planted file stays, and report, status and log name it."""
    drop_as(MALLORY, shared.inbox, "alice.job.toml", "[training]\nlearning_rate = 1e-30\nmax_steps = 1\n")
    drop_as(ALICE, shared.inbox, "alice.jsonl", ROW)
    (job,) = shared.wait_for(1)
    assert (job.owner, job.overrides) == (ALICE, {})
    assert job.recipe["training"]["max_steps"] == -1
    said = f"alice.job.toml was not used: it belongs to user {MALLORY} and its dataset to user {ALICE}"
    assert job.notes[0].startswith(said)
    assert (shared.inbox / "alice.job.toml").exists()
    assert shared.log.events("file.sidecar_ignored")[0]["job"] == job.id
    ended = shared.finish(job, JobState.FAILED)
    folder = shared.inbox / "failed" / ended.id
    assert said in (folder / "report.txt").read_text()
    report = json.loads((folder / "report.json").read_text())
    assert (report["owner"], report["warnings"][0][: len(said)]) == (ALICE, said)


@needs_root
@pytest.mark.parametrize("by", [ALICE, 0])
def test_a_sidecar_of_the_same_user_or_of_the_administrator_counts(shared: Root, by: int) -> None:
    drop_as(by, shared.inbox, "alice.job.toml", 'priority = "high"\n[lora]\nr = 4\n')
    drop_as(ALICE, shared.inbox, "alice.jsonl", ROW)
    (job,) = shared.wait_for(1)
    assert (job.priority, job.recipe["lora"]["r"], job.notes) == (Priority.HIGH, 4, ())


@needs_root
def test_a_planted_sidecar_that_no_parser_survives_does_not_keep_another_s_file_out(shared: Root) -> None:
    drop_as(MALLORY, shared.inbox, "alice.job.toml", "priority = " + "1" * 5000)
    drop_as(ALICE, shared.inbox, "alice.jsonl", ROW)
    shared.wait_for(1)


@needs_root
def test_a_sidecar_that_comes_into_a_job_s_folder_is_asked_whose_it_is_once_more(shared: Root) -> None:
    """Where it is read: the claim's own look may have been of another file."""
    drop_as(ALICE, shared.inbox, "alice.jsonl", ROW)
    shared.pump(lambda: shared.jobs())
    (job,) = shared.jobs()
    planted = shared.inbox / "processing" / job.id / "alice.job.toml"
    planted.write_text("[lora]\nr = 4\n")
    os.chown(planted, MALLORY, MALLORY)
    shared.wait_for(1)
    shared.close()
    shared.open()
    shared.archive.finish(shared.jobs()[0], JobState.CANCELLED, "ended")
    reopened = shared.store.transition(job.id, JobState.CANCELLED, JobState.CLAIMED, "again")
    from daemon.inbox.archive import reopen_files

    reopen_files(shared.settings, reopened)
    shared.intake.adopt_claimed()
    (job,) = shared.wait_for(1)
    assert (job.recipe["lora"]["r"], "was not used" in job.notes[0]) == (16, True)


@needs_root
def test_another_user_s_file_of_the_same_name_is_no_continuation(shared: Root) -> None:
    """Nor does it wait as one: each is taken on its own, under its own owner."""
    for user in (ALICE, MALLORY):
        drop_as(user, shared.inbox, "x.jsonl", json.dumps({"text": str(user)}) + "\n")
        shared.pump(lambda user=user: any(job.owner == user for job in shared.jobs()))
    assert [job.continues for job in shared.jobs()] == [None, None]


def test_a_file_that_is_mostly_holes_is_refused_before_it_is_read(root: Root) -> None:
    """A terabyte that was never written would be read for hours, also when rows at fault are left out."""
    path = root.path / "staged"
    with path.open("wb") as sparse:
        sparse.write(ROW.encode() * 1000)
        sparse.truncate(2**40)
    path.rename(root.inbox / "x.jsonl")
    began = time.monotonic()
    (job,) = root.wait_for(1, JobState.REJECTED)
    assert "it is mostly holes" in job.reason
    assert time.monotonic() - began < 20


def test_a_file_without_holes_is_not_taken_for_one(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(ROW.encode() * 10_000)
    with source.open_dataset(path, max_expansion=100.0) as opened:
        opened.refuse_holes()
        assert opened.head(4) == ROW.encode()[:4]
        assert next(iter(opened.blocks())).startswith(ROW.encode())


@needs_root
def test_owners_take_turns_so_that_many_drops_of_one_do_not_stand_before_one_of_another() -> None:
    """In the claims, where one owner may have so many waiting, and in the queue."""
    with open_folder() as path, Root(path, limits={"max_queued": 5}) as root:
        share(root.inbox)
        for number in range(12):
            drop_as(MALLORY, root.inbox, f"m{number:02}.jsonl", json.dumps({"text": f"m {number}"}) + "\n")
        root.wait_for(5)
        for number in range(2):
            drop_as(ALICE, root.inbox, f"a{number}.jsonl", json.dumps({"text": f"a {number}"}) + "\n")
        root.wait_for(7)
        assert root.intake.view().deferred == 7
        ran = []
        for _ in range(14):
            root.wait_for(1)
            job = root.store.peek(time.time())
            assert job is not None
            ran.append(job.owner)
            root.finish(job)
            root.tick()
        assert [place for place, owner in enumerate(ran) if owner == ALICE] == [1, 3]
        assert not root.jobs(JobState.QUEUED)
        assert_sound(root.settings, root.store)


def test_a_job_that_is_moved_or_tried_again_finds_its_turn(root: Root) -> None:
    """`move --first` stands above turns; another priority has turns of its own."""
    for name in ("a", "b", "c"):
        root.drop(f"{name}.jsonl", json.dumps({"text": name}) + "\n")
        root.pump(lambda name=name: any(job.name == f"{name}.jsonl" for job in root.jobs(JobState.QUEUED)))
    a, b, c = root.jobs(JobState.QUEUED)
    assert [job.turn for job in (a, b, c)] == [0, 1, 2]
    root.store.reorder(c.id, first=True)
    assert [job.id for job in root.store.queue()] == [c.id, a.id, b.id]
    root.store.reorder(b.id, priority=Priority.HIGH)
    assert [job.id for job in root.store.queue()] == [b.id, c.id, a.id]


@needs_root
def test_a_file_that_takes_long_to_check_delays_no_other_owner_s() -> None:
    """Another child reads hers, while his large file is still being read."""
    with open_folder() as path, Root(path, data={"on_bad_rows": "skip"}) as root:
        share(root.inbox)
        drop_as(MALLORY, root.inbox, "long.jsonl", ROW.encode() * 6_000_000)
        root.pump(lambda: any(done for _, done, _ in root.intake.view().scanning))
        drop_as(ALICE, root.inbox, "large.jsonl", b'{"text": "%s"}\n' % (b"a" * 2**20) * 33)
        (job,) = root.wait_for(1)
        assert (job.owner, job.name) == (ALICE, "large.jsonl")
        assert root.intake.view().scanning
        root.archive.finish(root.jobs(JobState.CLAIMED)[0], JobState.CANCELLED, "by a person")
        root.pump(lambda: not root.intake.view().scanning)
