"""Digests: what b3sum prints, or an error; never the digest of something that was not there as a whole."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

import guard
from guard import digest as digest_module

EMPTY = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"


@pytest.fixture(params=["read", "mapped"])
def digest(request: pytest.FixtureRequest) -> Callable[[Path], guard.FileDigest]:
    """Both ways: read in this process, and mapped in a child."""
    above = 0 if request.param == "mapped" else 1 << 60
    return lambda path: guard.digest_file(path, map_above_bytes=above)


def while_it_runs(act: Callable[[], object], monkeypatch: pytest.MonkeyPatch, mapped: bool) -> None:
    """Do `act` after the first status was taken and before the file is read."""
    name = "_digest_mapped" if mapped else "_digest_read"
    real = getattr(digest_module, name)

    def late(*args: Any, **kwargs: Any) -> Any:
        act()
        return real(*args, **kwargs)

    monkeypatch.setattr(digest_module, name, late)


@pytest.mark.parametrize("size", [0, 1, 1024, 1024 * 1024, 1024 * 1024 + 1, 5_000_000])
def test_it_is_plain_blake3_at_any_size(tmp_path: Path, digest: Callable[[Path], guard.FileDigest], size: int) -> None:
    data = os.urandom(size)
    (tmp_path / "file").write_bytes(data)
    found = digest(tmp_path / "file")
    assert found == guard.FileDigest(size_bytes=size, blake3_hex=blake3(data).hexdigest())
    assert size or found.blake3_hex == EMPTY


@pytest.mark.skipif(shutil.which("b3sum") is None, reason="b3sum is not installed")
def test_b3sum_prints_the_same(tmp_path: Path, digest: Callable[[Path], guard.FileDigest]) -> None:
    path = tmp_path / "a name with spaces, 'quotes' and ünïcode.jsonl"
    path.write_bytes(os.urandom(300_000))
    printed = subprocess.run(["b3sum", "--no-names", path], capture_output=True, text=True, check=True).stdout
    assert digest(path).blake3_hex == printed.strip()


def test_a_sparse_file_has_the_digest_of_its_zeros(tmp_path: Path, digest: Callable[[Path], guard.FileDigest]) -> None:
    sparse, dense = tmp_path / "sparse", tmp_path / "dense"
    with sparse.open("wb") as file:
        file.truncate(3_000_000)
    dense.write_bytes(bytes(3_000_000))
    assert sparse.stat().st_blocks < dense.stat().st_blocks
    assert digest(sparse) == digest(dense)


def test_a_file_name_may_hold_any_bytes(tmp_path: Path, digest: Callable[[Path], guard.FileDigest]) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/new\nline \xff.jsonl"))
    path.write_bytes(b"x")
    assert digest(path).blake3_hex == blake3(b"x").hexdigest()
    assert guard.Fingerprint({"dataset.name": path.name}).identity_digest
    assert len(guard.compute_dataset_hash(path)) == 32


def test_a_file_cut_short_while_it_is_read_is_an_error_not_a_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(2_000_000))
    while_it_runs(lambda: os.truncate(path, 1_000), monkeypatch, mapped=False)
    with pytest.raises(guard.FileChanged, match="were read"):
        guard.digest_file(path)


def test_a_file_cut_short_under_its_mapping_does_not_end_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child maps the file, sees it cut short, and dies of SIGBUS; the caller lives and says so."""
    path = tmp_path / "file"
    path.write_bytes(bytes(50_000_000))
    # The child itself cuts the file, between mapping it and reading it: the one order that is sure to fault.
    reader = (
        "import mmap, os, sys; fd = int(sys.argv[2]); m = mmap.mmap(fd, 0, prot=mmap.PROT_READ); "
        f"os.truncate({str(path)!r}, 0); print(m[40_000_000])"
    )
    monkeypatch.setattr(digest_module, "_MAPPED_READER", reader)
    with pytest.raises(guard.FileChanged, match="SIGBUS"):
        guard.digest_file(path, map_above_bytes=0)


def test_the_death_of_the_reading_child_is_reported_as_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x")
    monkeypatch.setattr(digest_module, "_MAPPED_READER", f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})")
    with pytest.raises(guard.FileUnreadable, match="ended by SIGKILL") as error:
        guard.digest_file(path, map_above_bytes=0)
    assert "memory" in error.value.hint
    monkeypatch.setattr(digest_module, "_MAPPED_READER", "raise SystemExit('no such luck')")
    with pytest.raises(guard.FileUnreadable, match="no such luck"):
        guard.digest_file(path, map_above_bytes=0)


@pytest.mark.parametrize("mapped", [False, True], ids=["read", "mapped"])
@pytest.mark.parametrize("how", ["grow", "same size", "replace", "remove", "put the mtime back", "turn the symlink"])
def test_a_file_that_changes_while_it_is_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, mapped: bool
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"a" * 100_000)
    if how == "turn the symlink":
        path = tmp_path / "link"
        path.symlink_to("file")

    def act() -> None:
        before = path.stat()
        if how == "turn the symlink":
            (tmp_path / "other").write_bytes(b"b" * 100_000)
            path.unlink()
            path.symlink_to("other")
        elif how == "grow":
            with path.open("ab") as file:
                file.write(b"more")
        elif how == "replace":
            (tmp_path / "new").write_bytes(b"b" * 100_000)
            (tmp_path / "new").replace(path)
        elif how == "remove":
            path.unlink()
        else:
            with path.open("r+b") as file:
                file.write(b"b")
            if how == "put the mtime back":
                os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    while_it_runs(act, monkeypatch, mapped)
    with pytest.raises(guard.FileChanged) as error:
        guard.digest_file(path, map_above_bytes=0 if mapped else 1 << 60)
    assert "changed while it was read" in str(error.value)
    assert error.value.hint


def test_a_file_that_grows_as_fast_as_it_is_read_does_not_hold_us_forever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"a" * 3_000_000)
    stop, grown = threading.Event(), threading.Event()

    def grow() -> None:
        with path.open("ab", buffering=0) as file:
            while not stop.is_set() and file.tell() < 500_000_000:
                file.write(b"a" * 1_000_000)
                grown.set()

    writer = threading.Thread(target=grow)
    while_it_runs(lambda: (writer.start(), grown.wait(30)), monkeypatch, mapped=False)
    try:
        with pytest.raises(guard.FileChanged):
            guard.digest_file(path)
    finally:
        stop.set()
        writer.join()


def test_a_file_written_a_moment_ago_is_waited_for_until_its_clock_ticks(tmp_path: Path) -> None:
    """A second write within one tick of the clock would leave no trace in the times."""
    path = tmp_path / "file"
    path.write_bytes(b"x")
    guard.digest_file(path)
    assert time.time() - path.stat().st_mtime >= digest_module._TICK_SECONDS / 2


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        with pytest.raises(guard.FileUnreadable):
            guard.digest_file(tmp_path / name)
    with pytest.raises(guard.NotFound) as error:
        guard.digest_file(tmp_path / "nothing")
    assert error.value.exit_code == 4
    assert str(error.value) == f"cannot read {tmp_path / 'nothing'}: no such file or directory"


# -- datasets


def test_the_same_content_elsewhere_is_the_same_dataset_and_a_same_size_edit_is_another(
    tmp_path: Path,
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one"}\n')
    first = guard.fingerprint_dataset(path)
    renamed = tmp_path / "other name.jsonl"
    shutil.copy(path, renamed)
    os.utime(renamed, (1, 1))  # and another mtime
    edited = tmp_path / "edited" / "rows.jsonl"
    edited.parent.mkdir()
    edited.write_text('{"text": "two"}\n')

    def run(found: guard.DatasetFingerprint) -> guard.Fingerprint:
        return guard.Fingerprint(found.components())

    assert run(first).same_run(run(guard.fingerprint_dataset(renamed)))
    assert guard.fingerprint_dataset(edited).size_bytes == first.size_bytes
    assert not run(first).same_run(run(guard.fingerprint_dataset(edited)))
    # By name and size the edit cannot be seen; the two kinds of digest never agree by accident.
    by_size = guard.fingerprint_dataset(path, mode="name_size")
    assert by_size.digest == guard.fingerprint_dataset(edited, mode="name_size").digest
    assert by_size.digest == guard.compute_dataset_hash(path)
    assert by_size.digest != first.digest


def test_a_dataset_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    with pytest.raises(guard.DatasetUnreadable, match="cannot read dataset"):
        guard.fingerprint_dataset(tmp_path)
    with pytest.raises(guard.NotFound):
        guard.fingerprint_dataset(tmp_path / "nothing", mode="name_size")


# -- models and tokenizers


def make_model(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"one")
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"two")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "README.md").write_text("a card")
    return folder


def test_weights_config_and_code_are_the_model_and_the_card_is_not(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    first = guard.digest_model_files(folder)
    (folder / "README.md").write_text("another card")
    (folder / "pytorch_model.bin").write_bytes(b"not used beside safetensors")
    assert guard.digest_model_files(folder) == first
    seen = {first}
    for name, data in [
        ("config.json", b"{ }"),
        ("model-00002-of-00002.safetensors", b"owt"),
        ("modeling_new.py", b"pass"),
    ]:
        (folder / name).write_bytes(data)
        seen.add(guard.digest_model_files(folder))
    one, two = (folder / f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    (
        one.rename(folder / "x"),
        two.rename(one),
        (folder / "x").rename(two),
    )  # the same bytes under swapped names
    seen.add(guard.digest_model_files(folder))
    assert len(seen) == 5


def test_pickled_weights_count_when_they_are_all_there_is(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    for path in folder.glob("*.safetensors"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"one")
    first = guard.digest_model_files(folder)
    (folder / "pytorch_model.bin").write_bytes(b"two")
    assert guard.digest_model_files(folder) != first


def test_the_chat_template_is_part_of_the_tokenizer(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    first = guard.digest_tokenizer_files(folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0] }}")
    assert guard.digest_tokenizer_files(folder) != first
    with pytest.raises(guard.NotFound, match="tokenizer files"):
        guard.digest_tokenizer_files(tmp_path)
    with pytest.raises(guard.NotFound, match="no such folder"):
        guard.digest_model_files(tmp_path / "nothing")


def test_the_cache_answers_for_the_very_same_file_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, cache_path = make_model(tmp_path / "model"), tmp_path / "cache.json"
    long_ago = time.time() - 1000
    for path in folder.iterdir():
        os.utime(path, (long_ago, long_ago))
    read: list[str] = []
    real = digest_module.digest_file
    monkeypatch.setattr(
        digest_module, "digest_file", lambda path, **kw: (read.append(Path(path).name), real(path, **kw))[1]
    )
    first = guard.digest_model_files(folder, guard.DigestCache(cache_path))
    assert len(read) == 3
    assert guard.digest_model_files(folder, guard.DigestCache(cache_path)) == first
    assert len(read) == 3
    # A same-size edit whose mtime was put back: the ctime gives it away.
    weights = folder / "model-00001-of-00002.safetensors"
    weights.write_bytes(b"eno")
    os.utime(weights, (long_ago, long_ago))
    assert guard.digest_model_files(folder, guard.DigestCache(cache_path)) != first
    assert read[3:] == [weights.name]


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b'{"x": 1}', b"{" * 100_000])
def test_a_broken_cache_is_an_empty_one(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "cache.json").write_bytes(content)
    folder = make_model(tmp_path / "model")
    cache = guard.DigestCache(tmp_path / "cache.json")
    assert guard.digest_model_files(folder, cache) == guard.digest_model_files(folder)


def test_a_file_changed_a_moment_ago_is_not_remembered(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    guard.digest_model_files(folder, guard.DigestCache(tmp_path / "cache.json"))
    assert not (tmp_path / "cache.json").exists()
