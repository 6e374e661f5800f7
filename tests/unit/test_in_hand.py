"""The note of what the daemon has in hand: what a sudden end leaves, and what does not count."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from daemon import in_hand
from daemon.errors import Unexpected
from daemon.in_hand import NOTE_BYTES, InHand, SuddenEnd

FILE = ("normal", "a\udcff.jsonl")


def opened(path: Path) -> tuple[InHand, SuddenEnd | None]:
    note = InHand(path)
    return note, note.open()


def die_in(path: Path, step: str, *, job: str = "", file: tuple[str, str] | None = None) -> SuddenEnd | None:
    """One life, that ends within a step; returns what it found."""
    note, found = opened(path)
    note.begin(step, job, file)
    return found


def test_what_was_in_hand_at_a_sudden_end_is_found_and_counted_while_it_comes_in_a_row(tmp_path: Path) -> None:
    path = tmp_path / "in_hand"
    assert die_in(path, "claimed", file=FILE) is None
    assert die_in(path, "claimed", file=FILE) == SuddenEnd(step="claimed", job="", file=FILE, times=1, lives=1)
    assert die_in(path, "examined", file=FILE) == SuddenEnd(step="claimed", job="", file=FILE, times=2, lives=2)
    assert die_in(path, "checked", job="j") == SuddenEnd(step="examined", job="", file=FILE, times=1, lives=3)
    assert die_in(path, "claimed", file=FILE) == SuddenEnd(step="checked", job="j", file=None, times=1, lives=1)
    assert die_in(path, "claimed", file=FILE) == SuddenEnd(step="claimed", job="", file=FILE, times=1, lives=1)


def test_a_step_that_was_done_in_between_counts_anew_and_the_lives_go_on(tmp_path: Path) -> None:
    path = tmp_path / "in_hand"
    die_in(path, "launched", job="j")
    note, found = opened(path)
    assert found == SuddenEnd(step="launched", job="j", file=None, times=1, lives=1)
    with note.handling("launched", job="j"):
        pass
    note.begin("launched", "j", None)
    assert opened(path)[1] == SuddenEnd(step="launched", job="j", file=None, times=1, lives=2)


def test_what_is_finished_is_not_in_hand_and_what_is_around_it_is(tmp_path: Path) -> None:
    path = tmp_path / "in_hand"
    note, _ = opened(path)
    with note.handling("checked", job="inner"):
        pass
    assert opened(path)[1] == SuddenEnd(step="idle", job="", file=None, times=1, lives=1)
    note, _ = opened(path)
    note.begin("followed", "outer", None)
    with pytest.raises(Unexpected) as raised, note.handling("moved", job="inner"):
        raise ZeroDivisionError
    assert (raised.value.job, raised.value.step) == ("inner", "moved")
    assert opened(path)[1] == SuddenEnd(step="followed", job="outer", file=None, times=1, lives=1)


def test_an_orderly_end_leaves_nothing_and_one_that_was_asked_to_stop_may_be_killed(tmp_path: Path) -> None:
    path = tmp_path / "in_hand"
    note, _ = opened(path)
    note.begin("followed", "j", None)
    note.close()
    note.begin("followed", "j", None)
    assert not path.read_bytes().strip()
    assert opened(path)[1] is None


@pytest.mark.parametrize("content", [b"", b"\n" * NOTE_BYTES, b"\0" * 40, b'{"step": "cl', b"[]\n", b"null\n", b"7\n"])
def test_a_note_that_is_empty_or_torn_tells_of_nothing(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "in_hand"
    path.write_bytes(content)
    assert opened(path)[1] is None


def test_a_power_cut_is_no_ones_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "in_hand"
    die_in(path, "claimed", file=FILE)
    monkeypatch.setattr(in_hand, "boot_id", lambda: "another boot")
    assert opened(path)[1] is None


def test_the_longest_name_fits_the_room_that_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "in_hand"
    longest = ("normal", "\udcff" * 249 + ".jsonl")
    die_in(path, "examined", file=longest)
    line = path.read_bytes().partition(b"\n")[0]
    assert path.stat().st_size == NOTE_BYTES > len(line)
    assert tuple(json.loads(line)["file"]) == longest


def test_a_disk_that_refuses_the_note_is_told_and_nothing_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note, _ = opened(tmp_path / "in_hand")
    with monkeypatch.context() as broken:
        broken.setattr(note, "_fd", 9_999)
        with note.handling("checked", job="j"):
            assert "cannot be written" in note.problem
    with note.handling("checked", job="j"):
        assert note.problem == ""


def test_a_command_notes_nothing() -> None:
    note = InHand()
    assert note.open() is None
    with note.handling("moved", job="j"):
        assert note.problem == ""
