"""`dropforge submit`: what is a dataset under another form is converted, row by row; all else is refused at once."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from tests.support.root import Root

MakeRoot = Callable[..., Root]
OBJECTS = [{"text": 'é, "quoted"\nand broken'}, {"text": "1.10", "id": 12345678901234567890}, {"text": ""}]
PAIRS = [{"prompt": "a, b", "completion": 'say "x"'}, {"prompt": "two\nlines", "completion": ""}]
CSV = 'prompt,completion\r\n"a, b","say ""x"""\r\n"two\nlines",\r\n'


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path / "root")


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def dropped(root: Root) -> dict[str, list[Any]]:
    """The files of the inbox and their rows."""
    return {
        path.name: [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
        for path in sorted(root.settings.inbox_dir.glob("*.jsonl"))
    }


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        pytest.param("x.json", json.dumps(OBJECTS), OBJECTS, id="array"),
        pytest.param("x.json", json.dumps(OBJECTS, indent=4).replace("\n", "\r\n"), OBJECTS, id="array_pretty_crlf"),
        pytest.param("x.json", "\ufeff" + json.dumps(OBJECTS, ensure_ascii=False), OBJECTS, id="array_bom"),
        pytest.param("x.json", "".join(json.dumps(row) + "\n" for row in OBJECTS), OBJECTS, id="lines"),
        pytest.param("x.json", "".join(json.dumps(row, indent=1) for row in OBJECTS), OBJECTS, id="objects"),
        pytest.param("x.json", json.dumps(OBJECTS).encode("utf-16"), OBJECTS, id="array_utf16"),
        pytest.param("X.JSON", json.dumps(OBJECTS).encode("utf-16-le"), OBJECTS, id="array_utf16_unmarked"),
        pytest.param("x.json.gz", gzip.compress(json.dumps(OBJECTS).encode()), OBJECTS, id="array_gz"),
        pytest.param("x.json", json.dumps([{"text": "x" * 900_000}] * 3), [{"text": "x" * 900_000}] * 3, id="large_rows"),
        pytest.param("x.json", json.dumps(OBJECTS * 9000), OBJECTS * 9000, id="many_rows"),
        pytest.param("x.csv", CSV, PAIRS, id="csv"),
        pytest.param("x.csv", "\ufeff" + CSV, PAIRS, id="csv_bom"),
        pytest.param("x.csv", CSV.encode("utf-16"), PAIRS, id="csv_utf16"),
        pytest.param("x.csv", CSV.replace(",", ";").replace("a;", "a,"), PAIRS, id="csv_semicolons"),
        pytest.param("x.csv", "text\nhello, world\n", None, id="csv_ragged"),
        pytest.param("x.csv", 'text\n"hello, world"\n', [{"text": "hello, world"}], id="csv_one_column"),
        pytest.param("x.csv.zst", zstandard.ZstdCompressor().compress(CSV.encode()), PAIRS, id="csv_zst"),
        pytest.param("x.tsv", "prompt\tcompletion\na, b\tc\n", [{"prompt": "a, b", "completion": "c"}], id="tsv"),
    ],
)  # fmt: skip
def test_rows_arrive_as_they_were(root: Root, tmp_path: Path, name: str, content: Any, rows: list[Any] | None) -> None:
    """Every value, in order, and their number is told; a record that does not fit its header is refused by line."""
    done = root.run("submit", str(write(tmp_path / name, content)))
    if rows is None:
        assert done.returncode == 3
        assert "line 2: 2 fields, where the header has 1" in done.stderr
        assert not dropped(root)
        return
    assert done.returncode == 0, done.stderr
    stem = name.partition(".")[0]
    assert dropped(root) == {f"{stem}.jsonl": rows}
    assert f"converted {len(rows):,} row" in done.stdout


def test_numbers_are_not_rewritten(root: Root, tmp_path: Path) -> None:
    """A JSON row is copied as it is written, but for its line breaks."""
    text = '[{"a": 1.10, "b": 1e400, "c": 0.1000000000000000055511151231257827, "a": 2}]'
    assert root.run("submit", str(write(tmp_path / "x.json", text)), "--no-check").returncode == 0
    assert (root.settings.inbox_dir / "x.jsonl").read_text() == text[1:-1] + "\n"


def test_a_column_without_a_name_is_left_out_and_told(root: Root, tmp_path: Path) -> None:
    """As pandas writes its index."""
    done = root.run("submit", str(write(tmp_path / "x.csv", ",text\n0,a\n1,b\n")))
    assert dropped(root) == {"x.jsonl": [{"text": "a"}, {"text": "b"}]}
    assert "1 column without a name left out" in done.stdout


@pytest.mark.parametrize("written", [json.dumps, repr], ids=["json", "python"])
def test_a_conversation_in_a_field_arrives_as_one(root: Root, tmp_path: Path, written: Callable[[Any], str]) -> None:
    """As JSON, or as pandas and `datasets` print lists, which is told; the file then passes."""
    turns = [{"role": "user", "content": "it's"}, {"role": "assistant", "content": 'a "test"'}]
    field = written(turns).replace('"', '""')
    path = write(tmp_path / "x.csv", f'messages,note\n"{field}","[{{\'a\': 1}}]"\n')
    done = root.run("submit", str(path))
    assert ("as Python prints lists" in done.stdout) is (written is repr)
    (row,) = dropped(root)["x.jsonl"]
    assert row == {"messages": turns if written is repr else json.dumps(turns), "note": "[{'a': 1}]"}
    assert root.run("check", str(root.settings.inbox_dir / "x.jsonl")).returncode == 0


def test_text_of_another_encoding_is_converted_when_it_is_named(root: Root, tmp_path: Path) -> None:
    """Never guessed."""
    path = write(tmp_path / "x.csv", "text,note\ncafé,à\n".encode("cp1252"))
    done = root.run("submit", str(path))
    assert done.returncode == 3
    assert "--encoding cp1252" in done.stderr
    assert root.run("submit", str(path), "--encoding", "cp1252").returncode == 0
    assert dropped(root) == {"x.jsonl": [{"text": "café", "note": "à"}]}
    assert root.run("submit", str(path), "--encoding", "klingon").returncode == 2
    assert root.run("submit", str(path), "--encoding", "base64").returncode == 2


def test_parquet_is_converted_and_its_rows_counted(root: Root, tmp_path: Path) -> None:
    """Nested values, nulls, times; pictures are refused by their column."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None}]
    rows = [{"messages": turns, "score": float("nan"), "n": 2**60}, {"messages": turns[:1], "score": 0.5, "n": None}]
    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows * 1500), path)
    done = root.run("submit", str(path), "--no-check")
    assert "converted 3,000 rows" in done.stdout, done.stderr
    assert dropped(root)["x.jsonl"] == [{**rows[0], "score": None}, rows[1]] * 1500
    parquet.write_table(pyarrow.Table.from_pylist([{"text": "a", "image": b"\x89PNG"}]), path)
    done = root.run("submit", str(path), "--no-check")
    assert done.returncode == 3
    assert 'column "image" holds bytes' in done.stderr
    write(path, path.read_bytes()[:40])
    assert "not a sound Parquet file" in root.run("submit", str(path), "--no-check").stderr


@pytest.mark.parametrize(
    ("name", "content", "what", "hint"),
    [
        ("x.json", '{"data": [{"text": "a"}]}', '"data"', "jq -c '.data[]'"),
        ("x.json", '["a", "b"]', "one JSON array", "{text: .}"),
        ("x.json", '[{"text": "a"}, 1]', "expected an object, found a number", "anew"),
        ("x.json", '[{"text": "a"}', "not a sound one", "anew"),
        ("x.json", "[" + '{"text": "a"},' * 9000, "the file ends", "anew"),
        ("x.json", "[" + '{"text": "a"},' * 9000 + "{bad}]", "line 1, value 9001: it is not sound JSON here", "anew"),
        ("x.json", "[" + '{"text": "a"},' * 9000 + '{"text": "b"}] more', "more after the array's end", "anew"),
        (
            "x.json",
            "[" + '{"text": "a"},' * 9000 + '{"text": ' + "9" * 5000 + "}]",
            "a number of too many digits",
            "anew",
        ),
        ("x.json", "[" + '{"text": "a"},' * 9000 + '{"text": ' + "[" * 50_000, "nested too deeply", "anew"),
        ("x.json", "[]", "an empty JSON array", "export"),
        ("x.json", "prompt,completion\na,b\n", "a table (CSV)", "FILE.csv"),
        ("x.json", "<html></html>", "an HTML page", "download"),
        ("x.csv", "<!doctype html><html></html>", "an HTML page", "download"),
        ("x.csv", b"PK\x03\x04" + bytes(26) + b"xl/workbook.xml", "an Excel workbook", "save the sheet as CSV"),
        ("x.csv", '{"text": "a"}\n', "it is JSON, not a table", ".jsonl"),
        ("x.csv", "text,text\na,b\n", '"text" twice', "name of its own"),
        ("x.csv", 'text,note\na,"b\n', "inside quotation marks", "CSV library"),
        ("x.csv", "text,note\n", "holds no rows", ""),
        ("x.parquet", '{"text": "a"}\n', "it is text, not Parquet", "rename it"),
        ("x.txt", '{"text": "a"}\n', "its name does not say that it is a dataset", "ends in .jsonl"),
        ("x.txt", "Once upon a time", "it is plain text", "jq -cR"),
        ("x.xlsx", b"PK\x03\x04" + bytes(26) + b"xl/workbook.xml", "an Excel workbook", "save the sheet as CSV"),
        ("x.jsonl (1)", '{"text": "a"}\n', "its name does not say", "ends in .jsonl"),
        (".x.jsonl", '{"text": "a"}\n', "unfinished file", "ends in .jsonl"),
        ("x.job.toml", "force = true\n", "it is a sidecar", "beside its dataset"),
    ],
)
def test_what_cannot_be_rows_is_refused_at_once(
    root: Root, tmp_path: Path, name: str, content: str | bytes, what: str, hint: str
) -> None:
    """Exit 3 with what it is and what to do; nothing stays behind in the inbox."""
    done = root.run("submit", str(write(tmp_path / name, content)))
    assert done.returncode == 3, done.stdout
    assert what in done.stderr
    assert hint in done.stderr.replace("\n", " ")
    assert not [path for path in root.settings.inbox_dir.iterdir() if path.is_file()]


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".jsonl.gz", ".JSONL.zst"])
def test_an_equal_name_gets_a_number_that_the_daemon_takes(root: Root, tmp_path: Path, suffix: str) -> None:
    """Before the suffix; and the sidecar of --force is that of the numbered file."""
    path = write(tmp_path / f"x{suffix}", "anything")
    for _ in range(2):
        assert root.run("submit", str(path), "--force", "--no-check").returncode == 0
    names = sorted(found.name for found in root.settings.inbox_dir.iterdir() if found.is_file())
    assert names == sorted([f"x{suffix}", "x.job.toml", f"x-2{suffix}", "x-2.job.toml"])


def test_a_sidecar_goes_with_its_file_and_to_no_other(root: Root, tmp_path: Path) -> None:
    """Also with --force, which is added to it; a bad one is refused before anything is dropped."""
    plain = write(tmp_path / "x.jsonl", '{"text": "a"}\n')
    packed = write(tmp_path / "other" / "x.jsonl.gz", b"") if (tmp_path / "other").mkdir() is None else plain
    sidecar = write(tmp_path / "x.job.toml", "[training]\nlearning_rate = 1e-5\n")
    assert root.run("submit", str(packed), "--no-check").returncode == 0
    assert root.run("submit", str(plain), "--force").returncode == 0
    inbox = root.settings.inbox_dir
    assert sorted(path.name for path in inbox.iterdir() if path.is_file()) == [
        "x-2.job.toml",
        "x-2.jsonl",
        "x.jsonl.gz",
    ]
    assert (inbox / "x-2.job.toml").read_text() == "force = true\n[training]\nlearning_rate = 1e-5\n"
    sidecar.write_text("surprise = 1\n")
    done = root.run("submit", str(plain))
    assert done.returncode == 3
    assert "surprise" in done.stderr
    assert not (inbox / "x.jsonl").exists()


def test_a_link_is_followed_and_a_fifo_is_not_waited_for(root: Root, tmp_path: Path) -> None:
    """Who names a link on the command line means the file."""
    (tmp_path / "link.json").symlink_to(write(tmp_path / "real.json", '[{"text": "a"}]'))
    assert root.run("submit", str(tmp_path / "link.json")).returncode == 0
    os.mkfifo(tmp_path / "fifo.jsonl")
    done = root.run("submit", str(tmp_path / "fifo.jsonl"), timeout=20)
    assert done.returncode == 4
    assert "not a regular file" in done.stderr


def test_waiting_ends_well_for_content_that_was_trained_before(make_root: MakeRoot, tmp_path: Path) -> None:
    """The file goes to done/, so the exit code is that of success; a converted file is waited for like any other."""
    root = make_root(behaviour={"steps": 1})
    root.start()
    path = write(tmp_path / "x.json", '[{"text": "a"}, {"text": "b"}]')
    first = root.run("submit", str(path), "--wait")
    assert first.returncode == 0, first.stdout + first.stderr
    again = root.run("submit", str(path), "--wait")
    assert "duplicate" in again.stdout
    assert again.returncode == 0


def test_each_of_several_files_is_dropped_unless_it_is_refused(root: Root, tmp_path: Path) -> None:
    """Those that are refused are named with the reason, the others go; the exit code is that of the first refusal."""
    good = write(tmp_path / "good.jsonl", '{"text": "a"}\n')
    bad = write(tmp_path / "bad.jsonl", '{"text": 1}\n')
    table = write(tmp_path / "table.csv", "text\nb\n")
    done = root.run("submit", str(bad), str(good), str(tmp_path / "none.jsonl"), str(table))
    assert done.returncode == 3
    assert dropped(root) == {"good.jsonl": [{"text": "a"}], "table.jsonl": [{"text": "b"}]}
    assert f"cannot submit {bad}: " in done.stderr
    assert "line 1" in done.stderr
    assert "--no-check" in done.stderr
    assert "none.jsonl: there is no such file" in done.stderr


def test_what_check_refuses_is_dropped_with_no_check(root: Root, tmp_path: Path) -> None:
    bad = write(tmp_path / "bad.csv", "nothing_known\nx\n")
    assert root.run("submit", str(bad)).returncode == 3
    assert list(root.settings.inbox_dir.glob("*")) == list(root.settings.inbox_dir.glob(".dropforge*"))
    assert root.run("submit", "--no-check", str(bad)).returncode == 0
    assert dropped(root) == {"bad.jsonl": [{"nothing_known": "x"}]}


@pytest.mark.parametrize(("name", "content"), [("x.jsonl", '{"q": "a", "a": "b"}\n'), ("x.csv", "q,a\na,b\n")])
def test_a_file_is_checked_under_its_sidecar(root: Root, tmp_path: Path, name: str, content: str) -> None:
    """Rows that only the sidecar explains are good with it, and refused without."""
    path = write(tmp_path / name, content)
    sidecar = write(tmp_path / "x.job.toml", '[data.columns]\nprompt = "q"\ncompletion = "a"\n')
    assert root.run("submit", str(path)).returncode == 0
    sidecar.unlink()
    assert root.run("submit", str(path)).returncode == 3


def test_a_drop_says_whether_a_daemon_is_there_to_train_it(make_root: MakeRoot, tmp_path: Path) -> None:
    root = make_root(behaviour={})
    path = write(tmp_path / "x.jsonl", '{"text": "a"}\n')
    assert "no daemon runs on this root" in root.run("submit", str(path)).stdout
    root.start()
    done = root.run("submit", str(path))
    assert (done.returncode, "no daemon" in done.stdout) == (0, False)
    assert root.stop() == 0
    assert "no daemon runs on this root" in root.run("submit", str(path)).stdout
    root.settings.status_path.write_bytes(b"\xff")
    assert "cannot be told" in root.run("submit", str(path)).stdout
