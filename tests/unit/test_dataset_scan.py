"""The pass over a file: counts, digests and verdicts, at any size, cut anywhere, on any number of processes."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from daemon.dataset import source
from daemon.dataset.rows import Columns, Rules, iter_rows
from daemon.dataset.validate import DatasetChanged, RejectedDataset, scan_dataset
from daemon.job import Dataset, RunSpec
from daemon.trainer.attempt import check_unchanged
from daemon.trainer.errors import RunFailure
from guard.digest import digest_file

ROW = b'{"text": "a row"}\n'
SKIP = Rules(on_bad_rows="skip", max_bad_fraction=1.0)


def write(path: Path, *parts: bytes) -> Path:
    path.write_bytes(b"".join(parts))
    return path


def report_of(path: Path, rules: Rules | None = None):
    with pytest.raises(RejectedDataset) as caught:
        scan_dataset(path, rules or Rules())
    return caught.value.report


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        pytest.param(ROW * 3, 3, id="plain"),
        pytest.param(ROW * 2 + ROW.rstrip(), 3, id="no_last_newline"),
        pytest.param(b"\xef\xbb\xbf" + ROW, 1, id="byte_order_mark"),
        pytest.param(ROW.replace(b"\n", b"\r\n") * 3, 3, id="crlf"),
        pytest.param(ROW + b"\n \n\r\n\t\n", 1, id="trailing_blank_lines"),
        pytest.param('{"text": "a\u2028b\u0085c"}\n'.encode() * 2, 2, id="unicode_line_separators"),
        pytest.param(ROW + b"\n \n" + ROW, 2, id="blank_lines_inside"),
    ],
)
def test_sound_files_pass_with_exact_counts_and_the_files_own_digest(tmp_path: Path, content: bytes, rows: int) -> None:
    """What editors and other systems add at the edges does not matter."""
    path = write(tmp_path / "x.jsonl", content)
    dataset = scan_dataset(path, Rules()).dataset
    assert (dataset.rows, dataset.size_bytes, dataset.format) == (rows, len(content), "text")
    assert dataset.digest == digest_file(path).blake3_hex
    assert len(list(iter_rows(path, "text", Rules()))) == rows


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(b"", "holds no rows", id="empty"),
        pytest.param(b"\n\n \n", "holds no rows", id="blank"),
        pytest.param(b'[{"text": "a"},\n{"text": "b"}]\n', "one JSON array", id="array"),
        pytest.param(b'{\n  "text": "a"\n}\n', "spans lines", id="pretty_object"),
        pytest.param(ROW.decode().encode("utf-16"), "UTF-16", id="utf16"),
        pytest.param(b'{"question": "q", "answer": "a"}\n', 'prompt = "question", completion = "answer"', id="columns"),
        pytest.param(b"hello\n", "plain text", id="text"),
        pytest.param(b'{"text": ""}\n', "nothing would be learned", id="empty_text"),
        pytest.param(
            ROW + b'{"text": 1}\n' * 2, "2 of 3 lines are bad; the first is line 2, column 10: ", id="bad_rows"
        ),
    ],
)
def test_what_is_wrong_with_the_whole_file_is_said_once(tmp_path: Path, content: bytes, reason: str) -> None:
    """With what to do about it."""
    report = report_of(write(tmp_path / "x.jsonl", content))
    assert reason in report.reason
    assert report.hint


def test_a_report_lists_twenty_bad_lines_and_counts_all(tmp_path: Path) -> None:
    """In file order, each with line, column, reason and excerpt."""
    report = report_of(write(tmp_path / "x.jsonl", ROW, b'{"text": 1}\n' * 50, ROW))
    assert (report.bad_rows, report.rows, report.lines) == (50, 2, 52)
    assert [problem.line for problem in report.problems] == list(range(2, 22))
    assert (report.problems[0].column, report.problems[0].excerpt) == (10, '{"text": 1}')
    assert report.digest is not None


def test_a_file_of_another_kind_is_not_read_to_its_end(tmp_path: Path) -> None:
    """A thousand bad rows are enough; the report says that the counts are of what was read."""
    path = write(tmp_path / "x.jsonl", ROW, b'{"text": 1}\n' * 100_000)
    report = report_of(path)
    assert not report.whole
    assert report.reason.startswith("at least ")
    assert report.digest is None


def test_skipping_leaves_out_exactly_the_bad_lines_and_training_reads_the_others(tmp_path: Path) -> None:
    """The pass and the trainer's reading agree line by line; the skipped ones are listed."""
    path = write(tmp_path / "x.jsonl", ROW, b"oops\n", ROW, b"\n", b'{"text": "a\xff"}\n', ROW, b"\n\n")
    result = scan_dataset(path, SKIP)
    assert (result.dataset.rows, result.dataset.skipped_rows, result.report.blank_lines) == (3, 2, 1)
    assert result.report.bad_lines == (2, 5)
    assert [row.line for row in iter_rows(path, "text", SKIP)] == [1, 3, 6]


def test_too_many_bad_rows_refuse_the_file_under_skip_as_well(tmp_path: Path) -> None:
    """`max_bad_fraction` is a bound, and a file of bad rows only is refused at any bound."""
    path = write(tmp_path / "x.jsonl", ROW * 98, b"oops\n" * 2)
    assert scan_dataset(path, Rules(on_bad_rows="skip", max_bad_fraction=0.02)).dataset.rows == 98
    assert "more than max_bad_fraction" in report_of(path, Rules(on_bad_rows="skip", max_bad_fraction=0.019)).reason
    assert report_of(write(tmp_path / "y.jsonl", ROW[:-3] + b"\n"), SKIP).reason


LINES = st.sampled_from(
    [ROW, b'{"text": 1}\n', b"\n", b"\r\n", b'{"text": "' + b"x" * 90 + b'"}\n', b'{"text": "' + b"y" * 400 + b'"}\n', b"oops\n"]
)  # fmt: skip


@given(st.lists(LINES, max_size=40), st.booleans(), st.integers(8, 200), st.sampled_from([120, 4096]))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_result_does_not_depend_on_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[bytes], newline: bool, block: int, longest: int
) -> None:
    """Lines cut by blocks in any place, longer than a block, too long, blank, at the end: one and the same."""
    content = ROW + b"".join(lines)
    path = write(tmp_path / "x.jsonl", content if newline else content.rstrip(b"\n"))
    rules = Rules(on_bad_rows="skip", max_bad_fraction=1.0, max_line_bytes=longest)
    whole = scan_dataset(path, rules)
    with monkeypatch.context() as patch:
        patch.setattr(source, "BLOCK_BYTES", block)
        assert scan_dataset(path, rules) == whole
        assert [row.line for row in iter_rows(path, "text", rules)] == [
            number
            for number, line in enumerate(path.read_bytes().split(b"\n"), 1)
            if line.startswith(b'{"text": "') and len(line) <= longest
        ]
    assert whole.dataset.digest == digest_file(path).blake3_hex


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_files_pass_like_plain_ones(tmp_path: Path, suffix: str) -> None:
    """Several members or frames are one file; the digest is of the file as it lies there."""
    pack = gzip.compress if suffix == ".gz" else zstandard.ZstdCompressor().compress
    path = write(tmp_path / f"x.jsonl{suffix}", pack(ROW * 1000), pack(b'{"text": "more"}\n'))
    dataset = scan_dataset(path, Rules()).dataset
    assert (dataset.rows, dataset.digest) == (1001, digest_file(path).blake3_hex)
    assert sum(1 for _ in iter_rows(path, "text", Rules())) == 1001


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_damaged_compressed_files_are_refused_with_what_is_wrong(tmp_path: Path, suffix: str) -> None:
    """Cut short, not of that kind, or damaged inside: never half a dataset."""
    pack = gzip.compress if suffix == ".gz" else zstandard.ZstdCompressor(write_checksum=True).compress
    sound = pack(b"".join(b'{"text": "%d"}\n' % number for number in range(20_000)))
    assert "cut short" in report_of(write(tmp_path / f"a.jsonl{suffix}", sound[: len(sound) // 2])).reason
    assert "not compressed" in report_of(write(tmp_path / f"b.jsonl{suffix}", ROW)).reason
    flipped = bytearray(sound)
    flipped[len(sound) // 2] ^= 0x10
    assert report_of(write(tmp_path / f"c.jsonl{suffix}", bytes(flipped))).reason


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_small_file_that_expands_without_end_is_refused(tmp_path: Path, suffix: str) -> None:
    """At a multiple of its size, in bounded memory."""
    many = b'{"text": "%s"}\n' % (b"a row " * 2**14) * 1000  # 98 MB of rows in some 100 kB
    pack = gzip.compress if suffix == ".gz" else zstandard.ZstdCompressor().compress
    report = report_of(write(tmp_path / f"x.jsonl{suffix}", pack(many)), Rules(max_expansion=10))
    assert "expands to more than" in report.reason


@pytest.mark.parametrize("make", ["link", "fifo", "folder", "socket", "device"])
def test_only_regular_files_are_opened(tmp_path: Path, make: str) -> None:
    """Anything else is refused at once: a FIFO without a writer would block for ever."""
    path = tmp_path / "x.jsonl"
    if make == "link":
        path.symlink_to(write(tmp_path / "real.jsonl", ROW))
    elif make == "fifo":
        os.mkfifo(path)
    elif make == "folder":
        path.mkdir()
    elif make == "socket":
        import socket

        socket.socket(socket.AF_UNIX).bind(str(path))
    elif os.geteuid() == 0:
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero, which has no end
    else:
        pytest.skip("only root makes devices")
    began = time.monotonic()
    assert report_of(path).reason.startswith("it is a")
    assert time.monotonic() - began < 1.0


def test_a_file_that_changes_under_the_pass_is_not_a_dataset(tmp_path: Path) -> None:
    """A writer that kept its handle: whatever was read so far is worth nothing."""
    path = write(tmp_path / "x.jsonl", ROW * 100_000)
    grown = False

    def grow(_: int) -> None:
        nonlocal grown
        if not grown:
            grown = True
            with path.open("ab") as writer:
                writer.write(ROW)

    with pytest.raises(DatasetChanged, match="still being written"):
        scan_dataset(path, Rules(), progress=grow)


def spec_of(dataset: Dataset) -> RunSpec:
    return RunSpec(schema_version=1, job_id="a", attempt=1, dataset=dataset, recipe={}, run_dir="", model_dir="")


def test_a_change_after_the_validation_is_found_before_training(tmp_path: Path) -> None:
    """Even one that keeps size and times."""
    path = write(tmp_path / "x.jsonl", ROW * 10)
    spec = spec_of(scan_dataset(path, Rules()).dataset)
    check_unchanged(spec)
    before = path.stat()
    write(path, ROW * 9, ROW.replace(b"row", b"cow"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(RunFailure, match="changed after it was checked"):
        check_unchanged(spec)


GIANT = """
import sys, time
from daemon.dataset.validate import RejectedDataset, scan_dataset
from daemon.dataset.rows import Rules
began = time.perf_counter()
try:
    scan_dataset(sys.argv[1], Rules())
except RejectedDataset as error:
    reason = error.report.reason
seconds = time.perf_counter() - began
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(seconds, int(peak.split()[1]) / 1024, reason)
"""


@pytest.mark.parametrize("begin", [b'{"text": "', ROW + b'{"text": "', b"[" * 10, b""])
def test_a_line_without_end_is_refused_from_its_first_megabytes(tmp_path: Path, begin: bytes) -> None:
    """Half a gigabyte on one line: refused in bounded memory, after reading no more than a line may have."""
    path = tmp_path / "x.jsonl"
    with path.open("wb") as written:  # written, not skipped: a hole would be refused unread
        written.write(begin)
        for _ in range(512):
            written.write(bytes(2**20))
    done = subprocess.run([sys.executable, "-c", GIANT, path], capture_output=True, text=True, check=True)
    seconds, megabytes, reason = done.stdout.split(" ", 2)
    assert re.search("max_line_bytes|bad|zero bytes|JSON array", reason), reason
    assert float(megabytes) < 100
    assert float(seconds) < 5  # minutes and gigabytes is what an unbounded read takes


def test_gsm8k_is_refused_with_the_setting_that_makes_it_work(tmp_path: Path) -> None:
    """And with that setting it passes."""
    rows = [{"question": f"q{number}", "answer": f"a{number}"} for number in range(5)]
    path = write(tmp_path / "x.jsonl", *(json.dumps(row).encode() + b"\n" for row in rows))
    assert '[data.columns] prompt = "question", completion = "answer"' in report_of(path).reason
    dataset = scan_dataset(path, Rules(columns=Columns(prompt="question", completion="answer"))).dataset
    assert (dataset.format, dataset.rows) == ("columns", 5)
