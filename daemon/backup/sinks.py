"""Where a backup is written: one tar file, or a snapshot in a folder, whole or not at all.

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
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, cast

import zstandard
from blake3 import blake3

import guard
from daemon.backup.containers import (
    BLOCK_BYTES,
    INCOMPLETE,
    ChangedWhileRead,
    forget_cached,
    make_durable,
    tar_compression,
)
from daemon.backup.manifest import (
    MANIFEST_NAME,
    DamagedManifest,
    Manifest,
    SavedFile,
    parse_manifest,
    render_manifest,
)
from daemon.backup.sources import FolderSource, TarSource, newest_snapshot, verify
from daemon.errors import ConfigError, TryLater
from guard.atomic import make_folder_durable, rename_durable


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
        forget_cached(self._raw.fileno())
        self._raw.seek(0)
        verify(TarSource(self._raw, self._target, self._compression))
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
        verify(FolderSource(self._into))
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
