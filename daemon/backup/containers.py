"""Where a backup is kept: one tar file, or a folder of snapshots. Both are written whole or not at all, and read alike.

A tar file has its name only once it is verified; until then it has none at all, so that nothing of it is left by a process
that dies. A folder holds a snapshot for each backup; files that an earlier one has already are linked to it. Nothing is
ever linked to the root itself: damage there must not be damage here.
"""

from __future__ import annotations

import errno
import fcntl
import gzip
import io
import os
import shutil
import stat
import tarfile
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, Protocol, cast

import zstandard
from blake3 import blake3

import guard
from daemon.backup.manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    DamagedManifest,
    Manifest,
    SavedFile,
    name_fault,
    parse_manifest,
    render_manifest,
)
from daemon.errors import ConfigError, DropforgeError, NotFound, TryLater
from daemon.text import escape
from guard.atomic import fsync_dir, make_folder_durable, rename_durable

BLOCK_BYTES = 2**20
FSYNCS_AT_ONCE = 32
TAR_SUFFIXES = {".tar": "", ".tar.gz": "gz", ".tgz": "gz", ".tar.zst": "zst"}
# Archives that somebody may take this program to write: a folder of that name would be a surprise.
FOREIGN_SUFFIXES = (".zip", ".7z", ".xz", ".bz2", ".gz", ".zst", ".tbz2", ".txz", ".tzst")
INCOMPLETE = ".incomplete-"  # a snapshot that is being written; removed by the next backup into the same folder
MAX_WINDOW_BYTES = 2**27


class ChangedWhileRead(Exception):
    """A file was cut short or replaced while it was copied."""


class DamagedBackup(DropforgeError):
    """A backup that is not as it was written, or was never one."""


class Readable(Protocol):
    """The content of a file."""

    def read(self, size: int, /) -> bytes:
        """Return up to `size` bytes; none at the end."""
        ...


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One thing in a backup. `stream` is of a file, and read before the next entry is asked for."""

    name: str
    kind: str  # "file" | "folder" | "link"
    mode: int = 0
    target: str = ""
    stream: Readable | None = None


def tar_compression(path: Path) -> str | None:
    """Return how a tar file of this name is compressed ("", "gz", "zst"); None when the name is a folder's.

    Raises ConfigError for the name of another kind of archive.
    """
    name = path.name.lower()
    for suffix, compression in TAR_SUFFIXES.items():
        if name.endswith(suffix):
            return compression
    if name.endswith(FOREIGN_SUFFIXES):
        raise ConfigError(
            operation="use",
            subject=path,
            cause="a backup is no archive of this kind",
            hint=f"end its name in {', '.join(TAR_SUFFIXES)}, or name a folder",
        )
    return None


# -- writing


class Sink(ABC):
    """A backup that is being written. What was added is in the order in which it was added."""

    def __init__(self) -> None:
        self.files: dict[str, SavedFile] = {}
        self.folders: dict[str, int] = {}
        self.links: dict[str, str] = {}

    @abstractmethod
    def add_folder(self, name: str, mode: int) -> None:
        """Add a folder; its parent was added before."""

    @abstractmethod
    def add_link(self, name: str, target: str) -> None:
        """Add a symbolic link."""

    @abstractmethod
    def add_file(self, name: str, descriptor: int) -> None:
        """Copy an open regular file, as long as it is now. Raises ChangedWhileRead, OSError."""

    @abstractmethod
    def publish(self, manifest: Manifest) -> Path:
        """Write the manifest, verify what was written, and give it its name; returns that. Raises DamagedBackup, OSError."""

    @abstractmethod
    def clear(self) -> None:
        """Forget everything that was added: the root moved, and it is planned anew."""


@contextmanager
def open_sink(target: Path) -> Iterator[Sink]:
    """A new backup at `target`; what is not published by the end of the block is gone. Raises TryLater, OSError."""
    compression = tar_compression(target)
    with _tar_sink(target, compression) if compression is not None else _folder_sink(target) as sink:
        yield sink


class _Digesting(io.RawIOBase):
    """Passes on exactly `size_bytes` of a descriptor, and digests them."""

    def __init__(self, descriptor: int, size_bytes: int) -> None:
        self._descriptor = descriptor
        self._left = size_bytes
        self._hasher = blake3()

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        wanted = min(self._left, BLOCK_BYTES if size is None or size < 0 else size)
        block = os.read(self._descriptor, wanted) if wanted else b""
        if wanted and not block:
            raise ChangedWhileRead
        self._left -= len(block)
        self._hasher.update(block)
        return block

    def saved(self, status: os.stat_result) -> SavedFile:
        """Describe what was read. Raises ChangedWhileRead when it is another file's, or not all of it."""
        after = os.fstat(self._descriptor)
        replaced = (after.st_mtime_ns, after.st_size) != (status.st_mtime_ns, status.st_size)
        if self._left or (replaced and after.st_size <= status.st_size):  # what only grew is whole up to its old end
            raise ChangedWhileRead
        return SavedFile(
            size_bytes=status.st_size,
            blake3=self._hasher.hexdigest(),
            mode=stat.S_IMODE(status.st_mode),
            mtime_ns=status.st_mtime_ns,
        )


class _TarSink(Sink):
    def __init__(self, raw: BinaryIO, target: Path, compression: str) -> None:
        super().__init__()
        self._raw = raw
        self._target = target
        self._compression = compression
        self._begin()

    def _begin(self) -> None:
        self._packed = _packer(self._raw, self._compression)
        self._tar = tarfile.open(  # noqa: SIM115  closed by publish or abandon
            fileobj=self._packed, mode="w|", format=tarfile.PAX_FORMAT, encoding="utf-8", errors="surrogateescape"
        )

    def clear(self) -> None:
        self.files, self.folders, self.links = {}, {}, {}
        self.abandon()
        self._raw.seek(0)
        self._raw.truncate()
        self._begin()

    def add_folder(self, name: str, mode: int) -> None:
        info = self._info(name, tarfile.DIRTYPE, mode)
        self._tar.addfile(info)
        self.folders[name] = mode

    def add_link(self, name: str, target: str) -> None:
        info = self._info(name, tarfile.SYMTYPE, 0o777)
        info.linkname = target
        self._tar.addfile(info)
        self.links[name] = target

    def add_file(self, name: str, descriptor: int) -> None:
        status = os.fstat(descriptor)
        info = self._info(name, tarfile.REGTYPE, stat.S_IMODE(status.st_mode))
        info.size, info.mtime = status.st_size, status.st_mtime_ns // 10**9
        source = _Digesting(descriptor, status.st_size)
        self._tar.addfile(info, cast("BinaryIO", source))
        self.files[name] = source.saved(status)

    def abandon(self) -> None:
        """Close what would write its end when it is collected."""
        with suppress(OSError, ValueError):
            self._tar.close()
        with suppress(OSError, ValueError):
            if self._packed is not self._raw:
                self._packed.close()

    def publish(self, manifest: Manifest) -> Path:
        content = render_manifest(manifest)
        info = self._info(MANIFEST_NAME, tarfile.REGTYPE, 0o600)
        info.size = len(content)
        self._tar.addfile(info, io.BytesIO(content))
        self._tar.close()
        if self._packed is not self._raw:
            self._packed.close()
        self._raw.flush()
        os.fsync(self._raw.fileno())
        _forget_cached(self._raw.fileno())
        self._raw.seek(0)
        verify(_TarSource(self._raw, self._target, self._compression))
        _give_name(self._raw.fileno(), self._target)
        return self._target

    @staticmethod
    def _info(name: str, kind: bytes, mode: int) -> tarfile.TarInfo:
        info = tarfile.TarInfo(name)
        info.type, info.mode, info.mtime = kind, mode, int(time.time())
        info.uid, info.gid = os.geteuid(), os.getegid()
        return info


@contextmanager
def _tar_sink(target: Path, compression: str) -> Iterator[Sink]:
    if target.is_dir():
        raise ConfigError(
            operation="back up to", subject=target, cause="it is a folder, and its name is a file's", hint="rename it"
        )
    part = target.with_name(f".{target.name}.part")
    with _nameless(part) as raw:
        sink = _TarSink(raw, target, compression)
        try:
            yield sink
        finally:
            sink.abandon()


@contextmanager
def _nameless(part: Path) -> Iterator[BinaryIO]:
    """A new file without a name, or, where the file system has none such, one under `part`, removed at the end."""
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        descriptor, named = os.open(part.parent, flags | os.O_TMPFILE, 0o600), False
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
        descriptor, named = os.open(part, flags | os.O_CREAT | os.O_NOFOLLOW, 0o600), True
    with os.fdopen(descriptor, "r+b", buffering=0) as raw:
        if named:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with its holder: a leftover is taken over
            except BlockingIOError as error:
                raise TryLater(
                    operation="back up to", subject=part, cause="another backup is being written there"
                ) from error
            raw.truncate(0)
        try:
            yield cast("BinaryIO", raw)
        finally:
            if named:
                with suppress(OSError):
                    part.unlink()


def _give_name(descriptor: int, target: Path) -> None:
    """Name a file, in place of the one that has the name. Raises OSError."""
    part = target.with_name(f".{target.name}.part")
    if not (part.exists() and os.path.samestat(part.stat(), os.fstat(descriptor))):
        part.unlink(missing_ok=True)  # left by one that died at this very step
        folder = os.open(part.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:  # with a folder's descriptor, or Python calls link(2), which does not follow the link
            os.link(f"/proc/self/fd/{descriptor}", part.name, dst_dir_fd=folder, follow_symlinks=True)
        finally:
            os.close(folder)
    try:
        rename_durable(part, target, replace=True)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def _packer(raw: BinaryIO, compression: str) -> BinaryIO:
    if compression == "gz":
        return cast("BinaryIO", gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=raw, mtime=0))
    if compression == "zst":
        compressor = zstandard.ZstdCompressor(level=3, write_checksum=True)
        return cast("BinaryIO", compressor.stream_writer(raw, closefd=False))
    return raw


class _FolderSink(Sink):
    def __init__(self, folder: Path, incomplete: Path, earlier: Path | None) -> None:
        super().__init__()
        self._folder = folder
        self._into = incomplete
        self._earlier = earlier
        self._known: Mapping[str, SavedFile] = {}
        self._copied: list[Path] = []
        if earlier is not None:
            with suppress(DamagedManifest, OSError):  # then nothing of it is used again
                self._known = parse_manifest((earlier / MANIFEST_NAME).read_bytes()).files
        self._by_digest = {file.blake3: name for name, file in self._known.items()}

    def clear(self) -> None:
        self.files, self.folders, self.links, self._copied = {}, {}, {}, []
        shutil.rmtree(self._into)
        self._into.mkdir(mode=0o700)

    def add_folder(self, name: str, mode: int) -> None:
        (self._into / name).mkdir(mode=0o700)  # its own mode at the end: it may forbid to write
        self.folders[name] = mode

    def add_link(self, name: str, target: str) -> None:
        (self._into / name).symlink_to(target)
        self.links[name] = target

    def add_file(self, name: str, descriptor: int) -> None:
        status = os.fstat(descriptor)
        source = _Digesting(descriptor, status.st_size)
        likely = self._known.get(name)
        if likely is not None and likely.size_bytes == status.st_size:  # most often the same: read before it is written
            while source.read():
                pass
            saved = source.saved(status)
            if not self._reuse(name, saved):
                os.lseek(descriptor, 0, os.SEEK_SET)
                saved = self._copy(name, _Digesting(descriptor, status.st_size), status)
        else:
            saved = self._copy(name, source, status)
            if saved.blake3 in self._by_digest:  # it was moved
                (self._into / name).unlink()
                self._copied.pop()
                if not self._reuse(name, saved):
                    os.lseek(descriptor, 0, os.SEEK_SET)
                    saved = self._copy(name, _Digesting(descriptor, status.st_size), status)
        self.files[name] = saved

    def _copy(self, name: str, source: _Digesting, status: os.stat_result) -> SavedFile:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(self._into / name, flags, 0o600), "wb", buffering=0) as copy:
            while block := source.read():
                guard.atomic.write_all(copy.fileno(), block)
            saved = source.saved(status)
            os.fchmod(copy.fileno(), saved.mode | stat.S_IRUSR)  # that it can be verified; the manifest has its own
        self._copied.append(self._into / name)
        os.utime(self._into / name, ns=(saved.mtime_ns, saved.mtime_ns))
        return saved

    def _reuse(self, name: str, saved: SavedFile) -> bool:
        """Link the file of an earlier snapshot, when it still is what it was; returns whether it was linked."""
        other = self._by_digest.get(saved.blake3)
        if other is None or self._earlier is None or self._known[other].mode != saved.mode:
            return False
        try:
            with (self._earlier / other).open("rb") as file:
                hasher = blake3()
                while block := file.read(BLOCK_BYTES):
                    hasher.update(block)
            if hasher.hexdigest() != saved.blake3:
                return False
            os.link(self._earlier / other, self._into / name, follow_symlinks=False)
        except OSError:
            return False  # links are refused here, or the earlier snapshot is being removed: it is copied
        return True

    def publish(self, manifest: Manifest) -> Path:
        guard.write_atomic(self._into / MANIFEST_NAME, render_manifest(manifest), mode=0o600)
        make_durable(self._copied, [*(self._into / name for name in manifest.folders), self._into])
        verify(_FolderSource(self._into))
        for name, mode in sorted(manifest.folders.items(), reverse=True):
            (self._into / name).chmod(mode | 0o700)  # that its owner can read and remove it
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        target = self._folder / guard.layout.unused_name(self._folder, stamp)
        rename_durable(self._into, target)
        return target


@contextmanager
def _folder_sink(folder: Path) -> Iterator[Sink]:
    make_folder_durable(folder)
    try:
        lock = guard.ModelLock(folder, owner="backup")
        lock.acquire()
    except guard.ModelLocked as error:
        raise TryLater(operation="back up to", subject=folder, cause=error.cause) from error
    try:
        for leftover in folder.glob(f"{INCOMPLETE}*"):
            _remove(leftover)
        incomplete = folder / f"{INCOMPLETE}{os.getpid()}"
        incomplete.mkdir(mode=0o700)
        try:
            yield _FolderSink(folder, incomplete, newest_snapshot(folder))
        finally:
            if incomplete.exists():
                _remove(incomplete)
    finally:
        lock.release()


def _remove(folder: Path) -> None:
    for path, names, _ in os.walk(folder):
        for name in names:
            if not Path(path, name).is_symlink():
                Path(path, name).chmod(0o700)
    shutil.rmtree(folder)


# -- reading


class Source(ABC):
    """A backup that is read."""

    path: Path

    @abstractmethod
    def entries(self) -> Iterator[Entry]:
        """Iterate over all that it holds, the manifest included. Raises DamagedBackup, OSError."""


def newest_snapshot(folder: Path) -> Path | None:
    """Return the newest snapshot of a backup folder; None when it holds none."""
    found = [entry.parent for entry in folder.glob(f"[0-9]*/{MANIFEST_NAME}") if not entry.parent.is_symlink()]
    return max(found, default=None, key=lambda path: path.name)


@contextmanager
def open_source(path: Path) -> Iterator[Source]:
    """Open a backup: a tar file, a snapshot, or a folder of snapshots, whose newest is taken. Raises NotFound, OSError."""
    if path.is_dir():
        snapshot = path if (path / MANIFEST_NAME).is_file() else newest_snapshot(path)
        if snapshot is None:
            raise NotFound(
                operation="restore", subject=path, cause="there is no backup in this folder", hint="`dropforge backup`"
            )
        yield _FolderSource(snapshot)
        return
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise NotFound(operation="restore", subject=path, cause="there is no such file or folder") from None
    with os.fdopen(descriptor, "rb") as raw:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise DamagedBackup(operation="read the backup", subject=path, cause="it is not a regular file")
        magic = raw.read(4)
        raw.seek(0)
        compression = "gz" if magic[:2] == b"\x1f\x8b" else "zst" if magic == b"\x28\xb5\x2f\xfd" else ""
        yield _TarSource(raw, path, compression)


_TAR_ERRORS = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError, ValueError)


def _no_tar(path: Path, error: Exception) -> DamagedBackup:
    return DamagedBackup(
        operation="read the backup",
        subject=path,
        cause=f"it is damaged, cut short, or no tar file ({escape(str(error)) or type(error).__name__})",
        hint="nothing was changed; take another backup",
    )


class _TarStream:
    """A file in a tar file, whose damage is told as that of the backup."""

    def __init__(self, content: IO[bytes], path: Path) -> None:
        self._content = content
        self._path = path

    def read(self, size: int) -> bytes:
        try:
            return self._content.read(size)
        except _TAR_ERRORS as error:
            raise _no_tar(self._path, error) from error


class _TarSource(Source):
    def __init__(self, raw: BinaryIO, path: Path, compression: str) -> None:
        self.path = path
        self._raw = raw
        self._compression = compression

    def entries(self) -> Iterator[Entry]:
        self._raw.seek(0)
        try:
            unpacked = _unpacker(self._raw, self._compression)
            with tarfile.open(
                fileobj=unpacked, mode="r|", encoding="utf-8", errors="surrogateescape", bufsize=BLOCK_BYTES
            ) as tar:
                for info in tar:
                    yield self._entry(tar, info)
            while unpacked.read(BLOCK_BYTES):  # to its end: the compression's own check sum stands there
                pass
        except _TAR_ERRORS as error:
            raise _no_tar(self.path, error) from error

    def _entry(self, tar: tarfile.TarFile, info: tarfile.TarInfo) -> Entry:
        if info.type == tarfile.REGTYPE and not info.issparse():
            content = cast("IO[bytes]", tar.extractfile(info))
            return Entry(name=info.name, kind="file", mode=info.mode, stream=_TarStream(content, self.path))
        if info.type == tarfile.DIRTYPE:
            return Entry(name=info.name, kind="folder", mode=info.mode)
        if info.type == tarfile.SYMTYPE:
            return Entry(name=info.name, kind="link", target=info.linkname)
        raise DamagedBackup(
            operation="read the backup",
            subject=self.path,
            cause=f"{escape(info.name)} is neither a file, a folder nor a symbolic link",
            hint="it was not written by `dropforge backup`",
        )


def _unpacker(raw: BinaryIO, compression: str) -> BinaryIO:
    if compression == "gz":
        return cast("BinaryIO", gzip.GzipFile(fileobj=raw, mode="rb"))
    if compression == "zst":
        decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
        return cast("BinaryIO", decompressor.stream_reader(raw, closefd=False))
    return raw


class _FolderSource(Source):
    def __init__(self, folder: Path) -> None:
        self.path = folder

    def entries(self) -> Iterator[Entry]:
        pending = [""]
        while pending:
            prefix = pending.pop()
            with os.scandir(self.path / prefix) as scan:
                found = sorted(scan, key=lambda entry: entry.name)
            for entry in found:
                name = prefix + entry.name
                mode = entry.stat(follow_symlinks=False).st_mode
                if stat.S_ISDIR(mode):
                    yield Entry(name=name, kind="folder", mode=stat.S_IMODE(mode))
                    pending.append(f"{name}/")
                elif stat.S_ISLNK(mode):
                    yield Entry(name=name, kind="link", target=os.readlink(entry.path))
                elif stat.S_ISREG(mode):
                    descriptor = os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
                    with os.fdopen(descriptor, "rb") as stream:
                        yield Entry(name=name, kind="file", mode=stat.S_IMODE(mode), stream=stream)
                else:
                    raise DamagedBackup(
                        operation="read the backup",
                        subject=self.path,
                        cause=f"{escape(name)} is neither a file, a folder nor a symbolic link",
                        hint="it was not written by `dropforge backup`",
                    )


@dataclass(frozen=True, kw_only=True)
class Verified:
    """A backup that is as it was written: its manifest, and the settings in it."""

    manifest: Manifest
    settings_text: bytes | None  # dropforge.toml; None when the root had none


def verify(source: Source, *, keep: str = "") -> Verified:
    """Read a backup to its end and compare everything with its manifest; `keep` is a small file whose bytes are returned.

    Raises DamagedBackup, OSError.
    """

    def damaged(cause: str) -> DamagedBackup:
        hint = "nothing was changed; take another backup"
        return DamagedBackup(operation="use the backup", subject=source.path, cause=cause, hint=hint)

    files: dict[str, tuple[int, str]] = {}
    others: dict[str, Any] = {}
    manifest: Manifest | None = None
    kept: bytes | None = None
    for entry in source.entries():
        if fault := name_fault(entry.name):
            raise damaged(f"{escape(entry.name)} may not be in a backup: {fault}")
        if entry.name in files or entry.name in others or (entry.name == MANIFEST_NAME and manifest is not None):
            raise damaged(f"{escape(entry.name)} is in it twice")
        if entry.stream is None:
            others[entry.name] = entry.target if entry.kind == "link" else None
        elif entry.name == MANIFEST_NAME:
            raw = entry.stream.read(MAX_MANIFEST_BYTES + 1)
            try:
                manifest = parse_manifest(raw)
            except DamagedManifest as error:
                raise damaged(str(error)) from error
        else:
            size, hasher, head = 0, blake3(), b""
            while block := entry.stream.read(BLOCK_BYTES):
                size += len(block)
                hasher.update(block)
                head = head or block
            files[entry.name] = (size, hasher.hexdigest())
            kept = head if entry.name == keep else kept
    if manifest is None:
        raise damaged(f"it has no {MANIFEST_NAME}: it is cut short, or was not written by `dropforge backup`")
    expected_others: dict[str, Any] = {**dict.fromkeys(manifest.folders), **manifest.links}
    for name in sorted(manifest.files.keys() | files.keys()):
        saved, found = manifest.files.get(name), files.get(name)
        if saved is None:
            raise damaged(f"{escape(name)} is in it and not in its manifest")
        if found != (saved.size_bytes, saved.blake3):
            raise damaged(f"{escape(name)} {'is missing' if found is None else 'is not as it was saved'}")
    for name in sorted(expected_others.keys() | others.keys()):
        if name not in others or name not in expected_others:
            raise damaged(f"{escape(name)} {'is missing' if name not in others else 'is not in its manifest'}")
        if others[name] != expected_others[name]:
            raise damaged(f"{escape(name)} is not as it was saved")
    return Verified(manifest=manifest, settings_text=kept)


def make_durable(files: Iterable[Path], folders: Iterable[Path]) -> None:
    """Make new files and then their folders durable, many at once: the disk commits them together. Raises OSError."""
    with ThreadPoolExecutor(max_workers=FSYNCS_AT_ONCE) as pool:
        for paths, act in ((files, _fsync_new), (folders, fsync_dir)):
            for _ in pool.map(act, paths):
                pass


def _fsync_new(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
        _forget_cached(descriptor)
    finally:
        os.close(descriptor)


def _forget_cached(descriptor: int) -> None:
    """Have what is verified come from the disk, where the system can do that."""
    with suppress(OSError):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
