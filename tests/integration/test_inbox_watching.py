"""Everything that makes watchers go blind, and what the inbox does about it: no drop waits for ever."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon.config import InboxSettings
from daemon.in_hand import InHand
from daemon.inbox import candidates, watcher
from daemon.job import JobState, Priority
from daemon.root_identity import adopt
from tests.support.inbox import ROW, Root, assert_sound

SLOW_RESCAN = {"rescan_seconds": 30.0}  # a drop that is claimed sooner was found by its event


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Root]:
    with Root(tmp_path) as opened:
        yield opened
        assert_sound(opened.settings, opened.store)


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Root]:
    """A root that looks by itself only every 30 s."""
    with Root(tmp_path, inbox=SLOW_RESCAN) as opened:
        opened.tick()
        yield opened
        assert_sound(opened.settings, opened.store)


def link(root: Root, name: str) -> None:
    staged = root.path / "linked.jsonl"
    staged.write_text(ROW)
    os.link(staged, root.inbox / name)


def write(root: Root, name: str) -> None:
    (root.inbox / name).write_text(ROW)


@pytest.mark.parametrize("drop", [Root.drop, link, write], ids=["rename", "hard_link", "close"])
def test_a_drop_is_found_by_its_event(slow: Root, drop) -> None:
    """A rename-in and a hard link raise no close event; both are found all the same."""
    drop(slow, "x.jsonl")
    assert len(slow.wait_for(1)) == 1


def test_a_claim_raises_no_events_that_could_hold_up_the_next_drop(slow: Root) -> None:
    """Our own renames out of the folder are not watched, so nothing waits to be paired with anything."""
    slow.drop("x.jsonl")
    slow.wait_for(1)
    batch = slow.intake._watcher.drain()
    assert not batch.names
    assert not batch.scan
    slow.drop("y.jsonl", ROW * 2)
    slow.wait_for(2)


def test_several_closes_by_one_writer_are_one_file(root: Root) -> None:
    """A writer that comes back has shown that it may do so again: its file has to settle."""
    path = root.inbox / "x.jsonl"
    for _ in range(4):
        with path.open("a") as writer:
            writer.write(ROW)
        root.tick(wait=0.005)
    (job,) = root.wait_for(1)
    assert job.dataset.rows == 4


def test_an_overflow_loses_no_file_and_is_counted(slow: Root) -> None:
    """The kernel drops events when its queue is full; a scan finds what they would have told."""
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    if limit > 100_000:
        pytest.skip("the event queue is too long to fill quickly")
    slow.drop("before.jsonl", ROW)
    other = slow.inbox / "a.tmp"
    other.touch()
    with slow.intake._watcher._lock:  # the reading thread stands still, as on a machine that is too busy
        for number in range(limit // 2 + 3000):
            other.rename(slow.inbox / f"{number % 2}.tmp")
            (slow.inbox / f"{number % 2}.tmp").rename(other)
        slow.drop("after.jsonl", ROW * 2)
    slow.wait_for(2)
    assert slow.intake.view().overflows >= 1
    assert slow.log.events("inbox.events_lost")


def test_a_bell_that_fails_does_not_end_watching(tmp_path: Path) -> None:
    """What an event handler raises would end the thread that delivers all later events."""

    class Broken(threading.Event):
        rings = 0

        def set(self) -> None:
            Broken.rings += 1
            if Broken.rings == 1:
                raise OSError(errno.EBADF, "broken")
            super().set()

    with Root(tmp_path, inbox=SLOW_RESCAN) as root:
        root.tick()
        root.intake._watcher._wakeup = Broken()
        root.drop("x.jsonl")
        root.pump(lambda: Broken.rings)
        root.intake._watcher._wakeup = root.wakeup
        root.drop("y.jsonl", ROW * 2)
        root.wait_for(2)


def test_a_folder_that_is_deleted_and_made_again_is_watched_again(root: Root) -> None:
    """Within one rescan, priorities included."""
    root.drop("x.jsonl")
    (job,) = root.wait_for(1)
    shutil.rmtree(root.inbox / "high")
    root.pump(lambda: not root.intake._watcher._identities.get("high"))
    (root.inbox / "high").mkdir()
    root.pump(lambda: root.intake._watcher._identities.get("high"))
    root.drop("y.jsonl", ROW * 2, folder="high")
    root.wait_for(2)
    root.store.transition(job.id, JobState.QUEUED, JobState.CANCELLED, "test")
    from daemon.inbox import archive

    archive.archive_files(root.settings, root.store.get(job.id))


def test_another_inbox_in_the_place_of_the_first_is_watched_and_completed(tmp_path: Path) -> None:
    """Renamed away and replaced: once a person says that it is meant, what is dropped under the name is taken."""
    with Root(tmp_path) as root:
        root.tick()
        root.inbox.rename(tmp_path / "old")
        root.pump(lambda: any("missing" in line for line in root.intake.view().warnings))
        root.inbox.mkdir()
        root.pump(lambda: any("carries no mark" in line for line in root.intake.view().warnings))
        assert not list(root.inbox.glob("[a-z]*")), "nothing is made in its place unasked"
        adopt(root.settings)
        root.pump((root.inbox / "processing").is_dir)
        root.drop("x.jsonl")
        root.wait_for(1)
        assert not any("missing" in line for line in root.intake.view().warnings)
        assert root.log.events("inbox.watch_rebuilt")
        assert_sound(root.settings, root.store)


def test_a_mount_over_the_inbox_is_noticed(tmp_path: Path) -> None:
    """The old watch stays alive below and would never ring again."""
    with Root(tmp_path) as root:
        root.tick()
        done = subprocess.run(["mount", "-t", "tmpfs", "none", root.inbox], capture_output=True, check=False)
        if done.returncode != 0:
            pytest.skip("mounting is not permitted here")
        try:
            root.pump(lambda: any("carries no mark" in line for line in root.intake.view().warnings))
            adopt(root.settings)
            root.pump((root.inbox / "processing").is_dir)
            (root.inbox / "x.jsonl").write_text(ROW)
            root.wait_for(1)
            assert_sound(root.settings, root.store)
        finally:
            root.close()
            subprocess.run(["umount", root.inbox], check=True)


def test_events_that_stop_arriving_are_missed_by_the_canary_and_the_watch_is_rebuilt(root: Root) -> None:
    """A thread that lives says nothing; a hidden file that is closed once a rescan does."""
    root.pump(lambda: root.intake._watcher._canaries_sent)
    root.intake._watcher._inotify._watch_for_wd.clear()  # events are read, and told to nobody
    root.pump(lambda: root.log.events("inbox.watch_rebuilt"))
    root.drop("x.jsonl")
    root.wait_for(1)
    assert root.intake.view().watch_mode == "inotify"


def test_when_rebuilding_does_not_help_the_inbox_is_polled_and_says_so(
    root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And watching is tried again later."""
    monkeypatch.setattr(watcher, "RETRY_WATCH_SECONDS", 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(watcher.FolderWatcher, "record", lambda *_: None)
        root.pump(lambda: root.intake.view().watch_mode.startswith("polling"))
        assert any("polled: events stopped arriving" in line for line in root.intake.view().warnings)
        root.drop("x.jsonl")
        root.wait_for(1)
    root.pump(lambda: root.intake.view().watch_mode == "inotify")


LIMITED = """
import sys
from pathlib import Path
from daemon.inbox import watcher
from tests.support.inbox import ROW, Root
watcher.RETRY_WATCH_SECONDS = 0.5
limit = Path(f"/proc/sys/user/max_inotify_{sys.argv[1]}")
before = limit.read_text()
limit.write_text("0")
with Root(Path(sys.argv[2])) as root:
    root.drop("x.jsonl")
    root.wait_for(1)
    print(root.intake.view().watch_mode)
    limit.write_text(before)
    root.pump(lambda: root.intake.view().watch_mode == "inotify")
    root.drop("y.jsonl", ROW * 2)
    root.wait_for(2)
"""


@pytest.mark.parametrize(("what", "named"), [("instances", "instance"), ("watches", "watch")])
def test_where_the_kernel_grants_no_inotify_the_inbox_is_polled_until_it_does(
    tmp_path: Path, what: str, named: str
) -> None:
    """EMFILE and ENOSPC from the kernel itself, whose limits are lowered in a user namespace of the test's own."""
    command = ["unshare", "--user", "--map-root-user", sys.executable, "-c", LIMITED, what, tmp_path]
    if shutil.which("unshare") is None or subprocess.run([*command[:3], "true"], check=False).returncode:
        pytest.skip("user namespaces are not permitted here")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"polling (inotify {named} limit reached)\n"


def test_without_inotify_watches_the_inbox_is_polled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSPC, as the kernel reports it through watchdog."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "inotify watch limit reached")

    monkeypatch.setattr(watcher.InotifyFD, "add_callback", refuse)
    before = threading.active_count()
    with Root(tmp_path) as root:
        assert root.intake.view().watch_mode == "polling (inotify watch limit reached)"
        root.drop("x.jsonl")
        root.wait_for(1)
    end = time.monotonic() + 5
    while threading.active_count() > before:
        assert time.monotonic() < end, "the reading thread was left behind"
        threading.Event().wait(0.02)


def test_a_remote_file_system_is_polled_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes by other machines raise no events here; `watch_mode` names the type."""
    monkeypatch.setattr(watcher, "remote_type", lambda _: "nfs4")
    with Root(tmp_path) as root:
        assert root.intake.view().watch_mode == "polling (nfs4 sends no events of other machines)"
        root.drop("x.jsonl")
        root.wait_for(1)


MOUNTS = """\
22 1 {root} / / rw - ext4 /dev/vda rw
30 22 {device} /x {path} rw shared:5 - {kind} server:/x rw
"""


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("ext4", None),
        ("overlay", None),
        ("nfs4", "nfs4"),
        ("cifs", "cifs"),
        ("fuse.sshfs", "fuse.sshfs"),
        ("fuse", "fuse"),
    ],
)
def test_the_file_systems_type_is_read_from_the_mount_of_its_device(tmp_path: Path, kind: str, expected: str) -> None:
    """By device number: paths in the mount table may be of another name space."""
    device = tmp_path.stat().st_dev
    text = MOUNTS.format(root="0:1", device=f"{os.major(device)}:{os.minor(device)}", path=tmp_path, kind=kind)
    assert watcher.remote_type(tmp_path, read_mounts=lambda: text) == expected


def test_the_inbox_is_not_listed_while_nothing_moves(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that was listed since its times last moved costs one stat a rescan, however full it is."""
    monkeypatch.setattr(candidates, "FULL_SCAN_SECONDS", 3600.0)
    monkeypatch.setattr(candidates, "COARSEST_CLOCK_SECONDS", 0.5)
    listed = []
    real = candidates.CandidateTracker._list
    monkeypatch.setattr(
        candidates.CandidateTracker, "_list", lambda self, *rest: (listed.append(rest[0]), real(self, *rest))
    )
    rounds = []
    scan = candidates.CandidateTracker.scan
    monkeypatch.setattr(
        candidates.CandidateTracker,
        "scan",
        lambda self, now, *, full: (rounds.append(full), scan(self, now, full=full)),
    )
    root.pump(lambda: len(rounds) >= 4)
    listed.clear()
    root.pump(lambda: len(rounds) >= 7)
    assert not listed
    (root.inbox / "other.txt").touch()
    root.pump(lambda: listed)


class Coarse(type(Path())):  # type: ignore[misc]
    """A folder whose times are whole even seconds, as on FAT."""

    changed_at = 0.0

    def stat(self, **_: object) -> os.stat_result:
        time_ns = int(self.changed_at // 2 * 2) * 10**9
        return os.stat_result(tuple(super().stat()), {"st_mtime_ns": time_ns, "st_ctime_ns": time_ns})


def test_names_that_come_within_one_tick_of_a_coarse_clock_are_all_found(tmp_path: Path) -> None:
    """Only the first of them moves the folder's times."""
    folder = Coarse(tmp_path)
    found = candidates.CandidateTracker({Priority.NORMAL: folder}, InboxSettings(), in_hand=InHand())
    for now in (quarter / 4 for quarter in range(40)):
        if now in (2.0, 2.75, 3.75):
            (tmp_path / f"{now}.jsonl").write_text(ROW)
            Coarse.changed_at = now
        found.scan(now, full=False)
    assert sorted(candidate.name for candidate in found.unsettled()) == ["2.0.jsonl", "2.75.jsonl", "3.75.jsonl"]
