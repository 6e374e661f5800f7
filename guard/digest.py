"""Content digests: plain BLAKE3, so that `b3sum FILE` prints the same.

Small files are read in this process. Large ones are mapped, which is about twice as fast, but a file that is
cut short under a mapping ends the process with SIGBUS: so the mapping lives in a child of its own, and its
death is reported as what it is.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import blake3 as _blake3_package
from blake3 import blake3

from .atomic import PathLike, write_atomic
from .errors import FileChanged, FileUnreadable, GuardError, NotFound, explain_os_error
from .json_text import parse_json

# Below this the start of a child costs more than the mapping saves.
MAP_ABOVE_BYTES = 128 * 1024 * 1024

_READ_BYTES = 1024 * 1024
_STRETCH_SECONDS = 0.05  # of reading between two pauses

# File times move in ticks of the kernel's clock (4 to 10 ms). A file whose last change is younger than this
# could change again within the same tick, and its mtime would not show it.
_TICK_SECONDS = 0.02

# -I -S: no site, no environment, nothing imported beyond blake3 itself; the start takes about 10 ms.
_MAPPED_READER = (
    "import sys; sys.path.insert(0, sys.argv[1]); from blake3 import blake3; "
    "h = blake3(max_threads=blake3.AUTO); h.update_mmap('/proc/self/fd/' + sys.argv[2]); "
    "sys.stdout.write(h.hexdigest())"
)


@dataclass(frozen=True, kw_only=True)
class FileDigest:
    """Size in bytes and BLAKE3 (64 hex digits) of a file.

    It did not change while it was read.
    """

    size_bytes: int
    blake3_hex: str


def digest_file(path: PathLike, *, map_above_bytes: int = MAP_ABOVE_BYTES, rest: float = 0.0) -> FileDigest:
    """Digest one regular file; memory stays flat at any size.

    `rest`: seconds to pause for each second of reading, for one who is in no hurry; the file is then read by one thread.

    Raises FileUnreadable (missing, not permitted, not a regular file) and FileChanged when size, times or
    inode moved between the first byte and the last, or when another file took over the path.
    """
    try:
        # O_NONBLOCK: opening a pipe must not wait for its writer. It has no effect on regular files.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as exc:
        raise _unreadable(path, exc) from exc
    try:
        before = _settled_stat(fd)
        if not stat.S_ISREG(before.st_mode):
            raise FileUnreadable(operation="read", path=path, cause="it is not a regular file")
        if before.st_size >= map_above_bytes and sys.executable and not rest:
            digest = _digest_mapped(fd, path)
        else:
            digest = _digest_read(fd, path, size_bytes=before.st_size, rest=rest)
        _require_unchanged(path, before, os.fstat(fd))
    except OSError as exc:
        raise _unreadable(path, exc) from exc
    finally:
        os.close(fd)
    return FileDigest(size_bytes=before.st_size, blake3_hex=digest)


def _settled_stat(fd: int) -> os.stat_result:
    """The file's status, taken when a further change would show in its times."""
    status = os.fstat(fd)
    if abs(time.time() - status.st_mtime) < _TICK_SECONDS:
        time.sleep(_TICK_SECONDS)
        status = os.fstat(fd)
    return status


def _digest_read(fd: int, path: PathLike, *, size_bytes: int, rest: float) -> str:
    # One thread: the library's thread pool does not survive a fork, and forked data loaders call this too.
    hasher, buffer = blake3(), bytearray(min(_READ_BYTES, size_bytes + 1))
    view, total, began = memoryview(buffer), 0, time.monotonic()
    with os.fdopen(fd, "rb", buffering=0, closefd=False) as file:
        while count := file.readinto(buffer):
            hasher.update(view[:count])
            total += count
            if total > size_bytes:  # a file that grows as fast as we read would never end
                break
            if rest and (seconds := time.monotonic() - began) > _STRETCH_SECONDS:
                time.sleep(rest * seconds)
                began = time.monotonic()
    if total != size_bytes:
        raise _changed(path, f"it had {size_bytes:,} bytes, and {total:,} were read")
    return hasher.hexdigest()


def _digest_mapped(fd: int, path: PathLike) -> str:
    packages = str(Path(_blake3_package.__file__).parent.parent)
    child = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _MAPPED_READER, packages, str(fd)],
        pass_fds=(fd,),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode == -signal.SIGBUS:
        raise _changed(path, "it was cut short under its mapping (the reader ended with SIGBUS)")
    if child.returncode < 0:
        name = signal.Signals(-child.returncode).name
        raise FileUnreadable(
            operation="read",
            path=path,
            cause=f"the process that read it was ended by {name}",
            hint="SIGKILL usually means that the machine ran out of memory" if name == "SIGKILL" else "",
        )
    if child.returncode != 0:
        lines = child.stderr.strip().splitlines()
        raise FileUnreadable(operation="read", path=path, cause=lines[-1] if lines else "its reader failed")
    return child.stdout


def _require_unchanged(path: PathLike, before: os.stat_result, after: os.stat_result) -> None:
    if _version_of(after) != _version_of(before):
        raise _changed(path, "its size, times or inode moved")
    try:
        now = os.stat(path)  # noqa: PTH116  `path` may be a plain string
    except OSError as exc:
        raise _changed(path, f"it is gone ({explain_os_error(exc)})") from exc
    if (now.st_dev, now.st_ino) != (before.st_dev, before.st_ino):
        raise _changed(path, "another file took its place")


def _version_of(status: os.stat_result) -> tuple[int, ...]:
    # ctime as well: an editor can put the mtime back, but not the ctime.
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _changed(path: PathLike, how: str) -> FileChanged:
    return FileChanged(
        operation="digest",
        path=path,
        cause=f"it changed while it was read: {how}",
        hint="wait until whatever writes it is done",
    )


def _unreadable(path: PathLike, exc: OSError) -> GuardError:
    kind = NotFound if exc.errno in (errno.ENOENT, errno.ENOTDIR) else FileUnreadable
    return kind(operation="read", path=path, cause=(exc.strerror or str(exc)).lower())


class DigestCache:
    """Digests of large files that rarely change, in a JSON file.

    Keyed by path, size, times and inode.
    A cache that cannot be read is an empty one. A file changed within the last two seconds is digested but
    not remembered: a second change could hide behind the same times.
    """

    def __init__(self, path: PathLike) -> None:
        self.path = Path(path)
        try:
            entries = parse_json(self.path.read_bytes())
        except (OSError, ValueError):
            entries = {}
        self._entries: dict[str, object] = entries if isinstance(entries, dict) else {}

    def digest(self, path: PathLike) -> FileDigest:
        """`digest_file`, or its earlier result for the very same file."""
        key = str(Path(path).resolve())
        try:
            version = list(_version_of(Path(key).stat()))
        except OSError as exc:
            raise _unreadable(path, exc) from exc
        match self._entries.get(key):
            case {"version": known, "size_bytes": int(size), "blake3": str(digest)} if known == version:
                return FileDigest(size_bytes=size, blake3_hex=digest)
        fresh = digest_file(key)
        status = Path(key).stat()
        if list(_version_of(status)) == version and abs(time.time() - status.st_mtime) > 2:
            self._entries[key] = {
                "version": version,
                "size_bytes": fresh.size_bytes,
                "blake3": fresh.blake3_hex,
            }
            with suppress(OSError):  # a cache that cannot be written costs time, not correctness
                write_atomic(self.path, json.dumps(self._entries, indent=1, sort_keys=True) + "\n")
        return fresh


# Modelling code counts: a folder that is loaded with trust_remote_code computes what its .py files say.
_MODEL_PATTERNS = (
    "config.json",
    "adapter_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "*.gguf",
    "*.py",
)
_PICKLED_WEIGHTS = ("pytorch_model*.bin", "adapter_model.bin", "pytorch_model.bin.index.json")
_TOKENIZER_PATTERNS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "chat_templates/*",
    "additional_chat_templates/*",
    "vocab*",
    "merges.txt",
    "*.model",  # sentencepiece: tokenizer.model, spiece.model, ...
    "*.tiktoken",
    "tekken.json",
    "tokenization_*.py",
)


def digest_model_files(model_dir: PathLike, cache: DigestCache | None = None) -> str:
    """Digest the names, sizes and contents of a model's config and weights.

    Returns 64 hex digits.
    Pickled weights (`pytorch_model*.bin`) count only when there are no safetensors, as transformers loads
    them; they are read as bytes, never unpickled. Not covered: tokenizer, generation config, cards, training
    records.
    """
    folder = _existing_folder(model_dir, "digest the model in")
    files = _matching(folder, _MODEL_PATTERNS)
    if not any(path.suffix in (".safetensors", ".gguf") for path in files):
        files = sorted({*files, *_matching(folder, _PICKLED_WEIGHTS)})
    return _digest_known(folder, files, cache, what="config or weight files")


def digest_tokenizer_files(model_dir: PathLike, cache: DigestCache | None = None) -> str:
    """Digest every file that decides how text becomes token ids.

    Returns 64 hex digits.
    The chat template is among them. Raises NotFound when there is no such folder, or none of these files in
    it.
    """
    folder = _existing_folder(model_dir, "digest the tokenizer in")
    return _digest_known(folder, _matching(folder, _TOKENIZER_PATTERNS), cache, what="tokenizer files")


def digest_files(
    folder: PathLike, patterns: Iterable[str], digest: Callable[[Path], FileDigest] = digest_file
) -> str | None:
    """Digest the names, sizes and contents of the files of a folder that match a pattern, each by `digest`.

    Returns 64 hex digits, None where there are none. Raises FileUnreadable, FileChanged.
    """
    files = _matching(Path(folder), patterns)
    return _digest_listing(Path(folder), files, digest) if files else None


def _existing_folder(path: PathLike, operation: str) -> Path:
    folder = Path(path)
    if not folder.is_dir():
        raise NotFound(operation=operation, path=path, cause="there is no such folder")
    return folder


def _matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def _digest_listing(folder: Path, files: list[Path], digest: Callable[[Path], FileDigest]) -> str:
    listing = []
    for path in files:
        found = digest(path)
        listing.append([path.relative_to(folder).as_posix(), found.size_bytes, found.blake3_hex])
    return blake3(json.dumps(listing).encode()).hexdigest()


def _digest_known(folder: Path, files: list[Path], cache: DigestCache | None, *, what: str) -> str:
    if not files:
        raise NotFound(operation="digest", path=folder, cause=f"it holds no {what}")
    return _digest_listing(folder, files, cache.digest if cache is not None else digest_file)
