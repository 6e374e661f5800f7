"""Reading a dropped file: regular files only, in bounded blocks, plain or compressed.

Nothing here trusts the name that is opened: a symbolic link is not followed, a FIFO does not block, and what was opened
is asked again what it is. Decompression stops at a multiple of the file's size, so that a small file cannot fill the
machine.
"""

from __future__ import annotations

import errno
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

BLOCK_BYTES = 256 * 1024  # fits the second-level cache with what is made from it; larger blocks were measured slower
BOM = b"\xef\xbb\xbf"
FREE_EXPANSION_BYTES = 64 * 2**20  # a file may always expand to this much
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
_KINDS = (
    (stat.S_ISLNK, "a symbolic link"),
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)


class SourceFault(Exception):
    """A file that cannot be read as a dataset at all; `hint` says what to do."""

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint


@dataclass(frozen=True)
class TooLong:
    """Stands for a line that was not read, because it is longer than `max_line_bytes`."""

    max_line_bytes: int

    def __str__(self) -> str:
        return f"the line is longer than max_line_bytes = {self.max_line_bytes}"


@dataclass(frozen=True)
class Signature:
    """What changes when a file is written to, and does not when it is renamed."""

    inode: int
    size_bytes: int
    mtime_ns: int


def kind_of_mode(mode: int) -> str | None:
    """What a thing that is not a regular file is, with its article; None for a regular file."""
    if stat.S_ISREG(mode):
        return None
    return next((name for test, name in _KINDS if test(mode)), "not a regular file")


def open_regular(path: Path | str) -> int:
    """A descriptor, for reading, of a regular file. Raises SourceFault for anything else, OSError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise SourceFault("it is a symbolic link", "drop the file itself") from error
        if error.errno == errno.ENXIO:
            raise SourceFault("it is a socket or a device", "drop a regular file") from error
        raise
    kind = kind_of_mode(os.fstat(descriptor).st_mode)
    if kind is not None:
        os.close(descriptor)
        raise SourceFault(f"it is {kind}", "drop a regular file")
    return descriptor


class DatasetSource:
    """An opened dataset. `blocks` and `lines` read it once, from the start, and `on_raw` sees every byte of the file."""

    def __init__(self, descriptor: int, *, compression: str | None, max_expansion: float) -> None:
        self._descriptor = descriptor
        self.compression = compression
        self._max_expansion = max_expansion
        self.on_raw: Callable[[bytes], object] | None = None
        self.raw_bytes_read = 0

    def __enter__(self) -> DatasetSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def signature(self) -> Signature:
        """Now, of what was opened."""
        found = os.fstat(self._descriptor)
        return Signature(inode=found.st_ino, size_bytes=found.st_size, mtime_ns=found.st_mtime_ns)

    def blocks(self, size: int = BLOCK_BYTES) -> Iterator[bytes]:
        """The content in blocks of about `size` bytes, decompressed. Raises SourceFault, OSError."""
        raw = self._raw_blocks(size)
        if self.compression is None:
            return raw
        return self._capped(_gunzip(raw, size) if self.compression == "gz" else _unzstd(raw))

    def lines(self, max_line_bytes: int) -> Iterator[tuple[int, bytes | TooLong]]:
        """Line numbers from 1, and the lines with their ends but without byte order mark.

        A longer line is passed over in bounded memory and comes as TooLong.
        """
        number = 0
        parts: list[bytes] = []  # of a line that spans blocks
        held = 0
        first = True
        for block in self.blocks():
            start = 0
            while start < len(block):
                end = block.find(b"\n", start) + 1
                piece = block[start:end] if end else block[start:]
                start = end or len(block)
                held += len(piece)
                if held <= max_line_bytes + 1:
                    parts.append(piece)
                else:
                    parts.clear()
                if not end:
                    break
                number += 1
                yield number, _joined(parts, held, max_line_bytes, first)
                first, held, parts = False, 0, []
        if held:
            yield number + 1, _joined(parts, held, max_line_bytes, first)

    def _raw_blocks(self, size: int) -> Iterator[bytes]:
        while block := os.read(self._descriptor, size):
            self.raw_bytes_read += len(block)
            if self.on_raw is not None:
                self.on_raw(block)
            yield block

    def _capped(self, blocks: Iterator[bytes]) -> Iterator[bytes]:
        limit = max(FREE_EXPANSION_BYTES, int(self.signature().size_bytes * self._max_expansion))
        total = 0
        for block in blocks:
            total += len(block)
            if total > limit:
                raise SourceFault(
                    f"it expands to more than {limit} bytes, {self._max_expansion:g} times its size",
                    "decompress it first, or raise [data] max_expansion",
                )
            yield block


def open_dataset(path: Path, *, max_expansion: float) -> DatasetSource:
    """Open a dropped file; `.gz` and `.zst` are decompressed. Raises SourceFault, OSError."""
    name = path.name.lower()
    compression = "gz" if name.endswith(".gz") else "zst" if name.endswith(".zst") else None
    return DatasetSource(open_regular(path), compression=compression, max_expansion=max_expansion)


def _joined(parts: list[bytes], held: int, max_line_bytes: int, first: bool) -> bytes | TooLong:
    if held > max_line_bytes + 1:
        return TooLong(max_line_bytes)
    line = parts[0] if len(parts) == 1 else b"".join(parts)
    if len(line.rstrip(b"\r\n")) > max_line_bytes:
        return TooLong(max_line_bytes)
    return line.removeprefix(BOM) if first else line


def _gunzip(raw: Iterator[bytes], size: int) -> Iterator[bytes]:
    member = zlib.decompressobj(wbits=31)
    begun = False  # inside a member; files may hold several, one after the other
    try:
        for data in raw:
            while data:
                begun = True
                yield from _nonempty(member.decompress(data, size))
                while member.unconsumed_tail:
                    yield from _nonempty(member.decompress(member.unconsumed_tail, size))
                data = member.unused_data.lstrip(b"\0") if member.eof else b""  # noqa: PLW2901  the next member
                if member.eof:
                    member, begun = zlib.decompressobj(wbits=31), False
    except zlib.error as error:
        raise SourceFault(f"it is not sound gzip: {error}", "compress and drop it again") from error
    if begun:
        raise SourceFault("the gzip data is cut short", "copy it again")


def _unzstd(raw: Iterator[bytes]) -> Iterator[bytes]:
    import zstandard

    frame = zstandard.ZstdDecompressor(max_window_size=2**27).decompressobj()
    begun = False
    try:
        for data in raw:
            while data:
                begun = True
                yield from _nonempty(frame.decompress(data))
                data = frame.unused_data if frame.eof else b""  # noqa: PLW2901  the next frame
                if frame.eof:
                    frame, begun = zstandard.ZstdDecompressor(max_window_size=2**27).decompressobj(), False
    except zstandard.ZstdError as error:
        raise SourceFault(f"it is not sound zstd: {error}", "compress and drop it again") from error
    if begun:
        raise SourceFault("the zstd data is cut short", "copy it again")


def _nonempty(block: bytes) -> Iterator[bytes]:
    if block:
        yield block
