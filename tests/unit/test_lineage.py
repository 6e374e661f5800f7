"""The lineage of a model directory, and what is asked of it every second."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from daemon import lineage, versions
from daemon.lineage import LINEAGE, append_event, newest_number, read_lineage


def grow(model_dir: Path, first: int, last: int) -> None:
    for number in range(first, last + 1):
        append_event(model_dir, {"event": "promoted", "version": f"{number:04d}"})


def test_the_newest_number_follows_every_change_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / LINEAGE
    assert newest_number(tmp_path) == 0
    grow(tmp_path, 1, 12)
    assert newest_number(tmp_path) == 12
    grow(tmp_path, 13, 13)
    assert newest_number(tmp_path) == 13
    altered = path.read_bytes().replace(b'"0013"', b'"0099"')  # as long as before
    path.write_bytes(altered)
    assert newest_number(tmp_path) == 99
    lines = altered.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:5]) + b'{"version": "0007"')  # cut short, and torn
    assert newest_number(tmp_path) == 5
    with path.open("ab") as file:
        file.write(b"}")  # whole, its newline is missing
    assert newest_number(tmp_path) == 7 == read_lineage(tmp_path).newest_number
    path.unlink()
    assert newest_number(tmp_path) == 0


def test_only_lines_that_are_new_are_parsed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grow(tmp_path, 1, 50)
    newest_number(tmp_path)
    parsed = []
    real = lineage._event_in
    monkeypatch.setattr(lineage, "_event_in", lambda line: parsed.append(line) or real(line))
    assert newest_number(tmp_path) == 50
    assert parsed == []
    with (tmp_path / LINEAGE).open("a") as file:
        file.write(json.dumps({"event": "promoted", "version": "0051"}) + "\n")
    assert newest_number(tmp_path) == 51
    assert len(parsed) == 1


@pytest.mark.parametrize("filler", [10, lineage.TAIL_BYTES, 3 * lineage.TAIL_BYTES])
def test_a_line_is_chained_to_the_one_before_however_long_that_is(tmp_path: Path, filler: int) -> None:
    for number in range(1, 5):
        append_event(tmp_path, {"event": "promoted", "version": f"{number:04d}", "filler": "x" * filler})
    found = read_lineage(tmp_path)
    assert found.broken == ()
    assert [event["version"] for event in found.events] == ["0001", "0002", "0003", "0004"]


def test_a_version_folder_that_comes_or_goes_is_counted_at_once(tmp_path: Path) -> None:
    folder = tmp_path / versions.VERSIONS
    (folder / "0004").mkdir(parents=True)
    for settled in (False, True):
        if settled:
            os.utime(folder, (1, 1))
        assert versions.newest_number(tmp_path) == 4
    (folder / "0009").mkdir()
    assert versions.newest_number(tmp_path) == 9
    (folder / "0009").rmdir()
    assert versions.newest_number(tmp_path) == 4
