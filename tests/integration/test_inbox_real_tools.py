"""Settling under the tools that people copy with: every row arrives, in one job, however slowly it is written."""

from __future__ import annotations

import http.server
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.disks import on_another_disk
from tests.support.inbox import ROW, Root, assert_sound
from tests.support.ssh import ssh_server

ROWS = 20_000
TEXT = "".join(f'{{"text": "row {number}"}}\n' for number in range(ROWS))


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Root]:
    with Root(tmp_path) as opened:
        yield opened
        assert_sound(opened.settings, opened.store)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "elsewhere" / "x.jsonl"
    path.parent.mkdir()
    path.write_text(TEXT)
    os.utime(path, (1, 1))  # older than anything: copies that keep times look settled for decades
    return path


def tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def arrives_whole(root: Root, command: list[str | Path], **options: object) -> None:
    """While the command runs and after it, exactly one job comes of it, with every row."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, **options) as process:  # type: ignore[call-overload]
        root.pump(lambda: process.poll() is not None, timeout=30)
    assert process.returncode == 0
    (job,) = root.wait_for(1)
    assert job.dataset.rows == ROWS
    for _ in range(3):
        root.tick()
    assert len(root.jobs()) == 1


@pytest.mark.parametrize("flags", [["-a"], ["-a", "--inplace"], ["-t", "--bwlimit=800"]])
def test_rsync(root: Root, source: Path, flags: list[str]) -> None:
    """Under its temporary name, in place with kept times, and slowly."""
    arrives_whole(root, [tool("rsync"), *flags, source, root.inbox / "x.jsonl"])


def test_cp_that_keeps_times(root: Root, source: Path) -> None:
    """An mtime of 1970 proves nothing."""
    arrives_whole(root, [tool("cp"), "-p", source, root.inbox])


def test_mv_across_file_systems(root: Root, source: Path) -> None:
    """Which is a copy, then a removal."""
    elsewhere = on_another_disk(root.inbox) / f"dropforge-{os.getpid()}.jsonl"
    shutil.move(source, elsewhere)
    try:
        arrives_whole(root, [tool("mv"), elsewhere, root.inbox / "x.jsonl"])
    finally:
        elsewhere.unlink(missing_ok=True)


@pytest.mark.parametrize("flags", [["-s"], ["-O", "-p"]], ids=["sftp", "old_protocol_keeps_times"])
def test_scp(root: Root, source: Path, tmp_path: Path, flags: list[str]) -> None:
    """Through a real sshd, slowly; both of its protocols write under the final name."""
    scp = tool("scp")
    with ssh_server(tmp_path / "ssh") as client:
        arrives_whole(root, [scp, "-q", *flags, "-l", "6000", "-F", client, source, f"there:{root.inbox}/x.jsonl"])


def test_rsync_over_ssh(root: Root, source: Path, tmp_path: Path) -> None:
    """Both ends of it real: the far one writes a dotfile and renames it."""
    rsync = tool("rsync")
    with ssh_server(tmp_path / "ssh") as client:
        arrives_whole(root, [rsync, "-a", "-e", f"ssh -F {client}", source, f"there:{root.inbox}/x.jsonl"])


@pytest.fixture
def slow_server() -> Iterator[str]:
    """Sends TEXT in three pieces, each on a sign from nobody: with a pause longer than a file takes to settle."""
    pause = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = TEXT.encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            for start in range(0, len(data), len(data) // 3 + 1):
                # Each piece ends in a newline, so that what lies there looks like a whole file.
                end = data.rfind(b"\n", 0, start + len(data) // 3 + 1) + 1
                begin = data.rfind(b"\n", 0, start) + 1
                self.wfile.write(data[begin:end])
                pause.wait(0.45)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/x.jsonl"
    pause.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("command", [["curl", "-s", "-N", "-o"], ["wget", "-q", "-O"]])
def test_a_download_that_stalls_for_longer_than_files_settle(root: Root, slow_server: str, command: list[str]) -> None:
    """Whoever has it open for writing is asked for, not guessed at."""
    arrives_whole(root, [tool(command[0]), *command[1:], root.inbox / "x.jsonl", slow_server])


def test_a_browsers_download_is_taken_when_it_gets_its_name(root: Root) -> None:
    """`.crdownload` and `.part` files are ignored for as long as they are called so."""
    for suffix in (".crdownload", ".part", ".partial", ".tmp", "~"):
        (root.inbox / f"x.jsonl{suffix}").write_text(TEXT)
    for _ in range(4):
        root.tick()
    view = root.intake.view()
    assert not root.jobs()
    assert not view.waiting
    assert not view.left_alone
    (root.inbox / "x.jsonl.crdownload").rename(root.inbox / "x.jsonl")
    (job,) = root.wait_for(1)
    assert job.dataset.rows == ROWS


def bursts(pause: str) -> str:
    return f'i=0; while [ $i -lt 10 ]; do seq -f \'{{"text": "r%g"}}\' $((i*2000)) $((i*2000+1999)) >> "$0"{pause}; i=$((i+1)); done'


def test_cat_in_quick_bursts_is_one_file(root: Root) -> None:
    """A shell loop that opens, appends and closes ten times."""
    arrives_whole(root, ["sh", "-c", bursts(""), root.inbox / "x.jsonl"])


def test_bursts_with_pauses_are_one_file_where_closing_proves_nothing(tmp_path: Path) -> None:
    """`take_on_close = false` is for writers that come back."""
    with Root(tmp_path, inbox={"take_on_close": False}) as root:
        arrives_whole(root, ["sh", "-c", bursts("; sleep 0.1"), root.inbox / "x.jsonl"])


def test_bursts_with_pauses_lose_and_double_no_row_where_closing_counts(root: Root) -> None:
    """The first close may be taken for the last one; what comes then is noticed, told, and settles as one."""
    command = ["sh", "-c", bursts("; sleep 0.1"), root.inbox / "x.jsonl"]
    with subprocess.Popen(command) as process:
        root.pump(lambda: process.poll() is not None, timeout=30)
    root.pump(lambda: sum(job.dataset.rows for job in root.jobs() if job.dataset) >= ROWS)
    jobs = root.jobs()
    assert sum(job.dataset.rows for job in jobs) == ROWS
    assert len(jobs) <= 2
    if len(jobs) == 2:
        assert root.log.events("file.came_back")


def test_a_writer_that_holds_the_file_open_is_waited_for_and_named(root: Root) -> None:
    """For ever if need be; the reason is shown with the writer's pid."""
    command = ["sh", "-c", f"exec 3>>\"$0\"; echo '{ROW.strip()}' >&3; read line", root.inbox / "x.jsonl"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        named = f"pid {process.pid}"
        root.pump(lambda: any(named in item.reason for item in root.intake.view().waiting), timeout=20)
        assert not root.jobs()
        process.communicate(b"\n")
    root.wait_for(1)


def test_a_file_that_was_there_before_the_start_must_settle_like_any_other(root: Root) -> None:
    """A copy may have been running when the daemon started; nobody heard how it began."""
    root.close()
    with (root.inbox / "x.jsonl").open("w") as writer:
        writer.write(ROW)
        writer.flush()
        root.open()
        for _ in range(5):
            root.tick()
        assert not root.jobs()
        writer.write(ROW)
    (job,) = root.wait_for(1)
    assert job.dataset.rows == 2
