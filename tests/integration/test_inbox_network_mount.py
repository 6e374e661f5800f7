"""An inbox on a network file system: no events come, so it is polled, says so, and trains what another machine drops."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from daemon.job import JobState
from tests.support.root import Root, wait_until
from tests.support.sound import assert_sound
from tests.support.ssh import ssh_server

TEXT = "".join(f'{{"text": "row {number}"}}\n' for number in range(50))


@contextmanager
def mounted(folder: Path, at: Path, client: Path) -> Iterator[None]:
    """`folder`, as another machine would have it, mounted through sshfs."""
    if shutil.which("sshfs") is None or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("sshfs is not installed, or /dev/fuse cannot be opened")
    # What the other side does is seen after a second, not only when sshfs forgets what it knew (20 s by default).
    done = subprocess.run(
        ["sshfs", "-F", client, "-o", "dir_cache=no", f"there:{folder}", at],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        # Lazily: a process that was just killed may not have closed its last file yet.
        subprocess.run([shutil.which("fusermount3") or "fusermount", "-u", "-z", at], check=True)


def test_a_drop_through_sshfs_is_trained(tmp_path: Path, make_root: Callable[..., Root]) -> None:
    """Dropped behind the mount, where no event of ours could come from; in the mount; and slowly, in pieces."""
    far = tmp_path / "far"
    far.mkdir()
    with ssh_server(tmp_path / "ssh") as client:
        root = make_root(behaviour={}, tables={"inbox": {"settle_seconds": 1.5, "poll_seconds": 0.2}})
        with mounted(far, root.settings.inbox_dir, client):
            root.start()
            status = root.status()
            assert status is not None
            assert status["watch_mode"] == "polling (fuse.sshfs sends no events of other machines)"
            assert any("polled: fuse.sshfs" in warning for warning in status["warnings"])

            # At once, and several: times that move once a second show only the first of them.
            for number in range(3):
                (far / f"behind-{number}.jsonl").write_text(TEXT * (number + 1))
                wait_until(lambda number=number: waits(root, f"behind-{number}.jsonl"), 20, "the file to be seen")
            for number in range(3):
                assert root.finished(f"behind-{number}.jsonl").state is JobState.SUCCEEDED, root.errors()

            root.drop("inside.jsonl", TEXT.replace("row", "line").encode())
            assert root.finished("inside.jsonl").state is JobState.SUCCEEDED, root.errors()

            with (far / "slow.jsonl").open("w") as writer:  # nobody here can ask who writes to it
                for number in range(4):
                    writer.write(f'{{"text": "piece {number}"}}\n' * 20)
                    writer.flush()
                    wait_until(lambda: waits(root, "slow.jsonl"), 20, "the file to be seen")
            job = root.finished("slow.jsonl")
            assert job.state is JobState.SUCCEEDED
            assert job.dataset is not None
            assert job.dataset.rows == 80
            names = sorted(path.name for path in (far / "done").glob("*/*.jsonl"))
            assert names == [*(f"behind-{number}.jsonl" for number in range(3)), "inside.jsonl", "slow.jsonl"]
            assert root.stop() == 0
            assert_sound(root)


def waits(root: Root, name: str) -> bool:
    status = root.status()
    return bool(status and any(item["file"] == name for item in status["waiting"]))
