"""Where a backup is read from: a tar file and a snapshot alike, and whether it is as it was written."""

from __future__ import annotations

import gzip
import os
import stat
import tarfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import zstandard
from blake3 import blake3

from daemon.backup.containers import (
    BLOCK_BYTES,
    MAX_WINDOW_BYTES,
    DamagedBackup,
    Entry,
)
from daemon.backup.manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    DamagedManifest,
    Manifest,
    name_fault,
    parse_manifest,
)
from daemon.errors import NotFound
from daemon.text import escape


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
        yield FolderSource(snapshot)
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
        yield TarSource(raw, path, compression)


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


class TarSource(Source):
    """A tar file that is open for reading, from where it stands."""

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


class FolderSource(Source):
    """A snapshot in its folder."""

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
