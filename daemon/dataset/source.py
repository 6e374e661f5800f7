"""Reading a dropped file: regular files only, in bounded blocks, plain or compressed.

Nothing here trusts the name that is opened: a symbolic link is not followed, a FIFO does not block, and what was opened
is asked again what it is. Decompression stops at a multiple of the file's size, so that a small file cannot fill the
machine.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from daemon.text import LIMITS_HINT, beyond_limit

BLOCK_BYTES = 256 * 1024  # fits the second-level cache with what is made from it; larger blocks were measured slower
BOM = b"\xef\xbb\xbf"
MAX_WINDOW_BYTES = 2**27  # of zstd, as its own command line accepts without --long
ZSTD_STEP_BYTES = 512  # 4 bytes may stand for a block of 128 KiB: this bounds one step's output at 16 MiB
COMPRESSIONS = {".gz": "gz", ".zst": "zst"}  # by the name's last suffix
FREE_EXPANSION_BYTES = 64 * 2**20  # a file may always expand to this much
_KINDS = (
    (stat.S_ISLNK, "a symbolic link"),
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)


class SourceError(Exception):
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


@dataclass(frozen=True, slots=True)
class Lines:
    """Whole lines: `block[start:end]`, not cut out, since a copy of every block would cost a tenth of the pass."""

    block: bytes
    start: int
    end: int

    def stream(self) -> io.BytesIO:
        """To iterate over the lines; it shares the block's bytes."""
        stream = io.BytesIO(self.block)
        stream.seek(self.start)
        stream.truncate(self.end)
        return stream


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
    """A descriptor, for reading, of a regular file. Raises SourceError for anything else, OSError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise SourceError("it is a symbolic link", "drop the file itself") from error
        if error.errno == errno.ENXIO:
            raise SourceError("it is a socket or a device", "drop a regular file") from error
        raise
    kind = kind_of_mode(os.fstat(descriptor).st_mode)
    if kind is not None:
        os.close(descriptor)
        raise SourceError(f"it is {kind}", "drop a regular file")
    return descriptor


class DatasetSource:
    """An opened dataset. `blocks` and `lines` read it once, from the start; `on_raw` sees every byte of the file."""

    def __init__(
        self, descriptor: int, *, compression: str | None, max_expansion: float, max_expanded_bytes: int = 0
    ) -> None:
        self._descriptor = descriptor
        self.compression = compression
        self._max_expansion = max_expansion
        self._max_expanded_bytes = max_expanded_bytes  # 0: any number
        self.on_raw: Callable[[bytes], object] | None = None
        self.raw_bytes_read = 0
        self.expanded_bytes = 0  # decompressed so far

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

    def refuse_holes(self) -> None:
        """Raise SourceError when most of the file was never written: its size says nothing of what it holds.

        Block counts would not tell: file systems compress, and share blocks.
        """
        size = self.signature().size_bytes
        written = at = 0
        while at < size:
            try:
                start = os.lseek(self._descriptor, at, os.SEEK_DATA)
                at = os.lseek(self._descriptor, start, os.SEEK_HOLE)
            except OSError as error:
                if error.errno != errno.ENXIO:  # ENXIO: no more data; else the file system knows of no holes
                    written = size
                break
            written += at - start
            if written * 2 >= size:
                break
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        if written * 2 < size:
            raise SourceError(
                f"it is mostly holes: {written:,} of its {size:,} bytes were ever written", "copy it again, whole"
            )

    def head(self, size: int) -> bytes:
        """The file's first bytes, as they are; `blocks` still reads from the start."""
        return os.pread(self._descriptor, size, 0)

    def content_head(self, size: int) -> bytes:
        """The content's first bytes, decompressed as far as they are sound."""
        if self.compression is None:
            return self.head(size)
        head = b""
        with suppress(SourceError):  # told by the pass, which meets it too
            for block in self._decompressed(self.range(0, self.signature().size_bytes), size):
                head += block
                if len(head) >= size:
                    break
        return head[:size]

    def blocks(self, size: int = BLOCK_BYTES) -> Iterator[bytes]:
        """The content in blocks of about `size` bytes, decompressed. Raises SourceError, OSError."""
        raw = self._raw_blocks(size)
        return raw if self.compression is None else self._capped(self._decompressed(raw, size))

    def lines(self, max_line_bytes: int) -> Iterator[tuple[int, bytes | TooLong]]:
        """Line numbers from 1, and the lines with their ends but without byte order mark.

        A longer line is passed over in bounded memory and comes as TooLong.
        """
        number, first = 0, True
        for whole in whole_lines(self.blocks(), max_line_bytes):
            if isinstance(whole, TooLong):
                number, first = number + 1, False
                yield number, whole
                continue
            for line in whole.stream():
                number += 1
                yield number, line.removeprefix(BOM) if first else line
                first = False

    def range(self, low: int, high: int) -> Iterator[bytes]:
        """The file's bytes in [low, high), as they are, in blocks; several processes may read at once."""
        while low < high and (block := os.pread(self._descriptor, min(BLOCK_BYTES, high - low), low)):
            low += len(block)
            yield block

    def _decompressed(self, raw: Iterator[bytes], size: int) -> Iterator[bytes]:
        return _gunzip(raw, size) if self.compression == "gz" else _unzstd(raw)

    def _raw_blocks(self, size: int) -> Iterator[bytes]:
        while block := os.read(self._descriptor, size):
            self.raw_bytes_read += len(block)
            if self.on_raw is not None:
                self.on_raw(block)
            yield block

    def _capped(self, blocks: Iterator[bytes]) -> Iterator[bytes]:
        limit = max(FREE_EXPANSION_BYTES, int(self.signature().size_bytes * self._max_expansion))
        total = size = 0
        held: list[bytes] = []
        for block in blocks:
            total += len(block)
            self.expanded_bytes = total
            if self._max_expanded_bytes and total > self._max_expanded_bytes:
                most = self._max_expanded_bytes
                raise SourceError(
                    beyond_limit(f"it expands to more than {most:,} bytes", "max_expanded_bytes", most), LIMITS_HINT
                )
            if total > limit:
                raise SourceError(
                    f"it expands to more than {limit} bytes, {self._max_expansion:g} times its size",
                    "decompress it first, or raise [data] max_expansion",
                )
            held.append(block)
            size += len(block)
            if size >= BLOCK_BYTES:  # small pieces would cost more to take apart than to join
                yield b"".join(held)
                held, size = [], 0
        if held:
            yield b"".join(held)


def open_dataset(path: Path, *, max_expansion: float, max_expanded_bytes: int = 0) -> DatasetSource:
    """Open a dropped file; `.gz` and `.zst` are decompressed. Raises SourceError, OSError."""
    return DatasetSource(
        open_regular(path),
        compression=COMPRESSIONS.get(path.suffix.lower()),
        max_expansion=max_expansion,
        max_expanded_bytes=max_expanded_bytes,
    )


def whole_lines(blocks: Iterable[bytes], max_line_bytes: int) -> Iterator[Lines | TooLong]:
    """The same bytes as whole lines; the last may lack its newline. TooLong stands for a line that is left out."""
    held: list[bytes] = []  # the beginning of a line that spans blocks
    held_bytes = 0
    passing = False  # inside a line that is left out
    # No piece is larger than a line may be: only a line that spans pieces can be too long.
    for piece in (block[at : at + max_line_bytes] for block in blocks for at in range(0, len(block), max_line_bytes)):
        start = 0
        if held or passing:
            start = piece.find(b"\n") + 1
            if not start:
                held_bytes += len(piece)
                if not passing:
                    held.append(piece)
                    if held_bytes > max_line_bytes + len(b"\r"):
                        passing, held = True, []
                        yield TooLong(max_line_bytes)
                continue
            if not passing:
                yield _bounded(b"".join((*held, piece[:start])), max_line_bytes)
            held, held_bytes, passing = [], 0, False
        end = piece.rfind(b"\n") + 1
        if end > start:
            yield Lines(piece, start, end)
        rest = max(end, start)
        if rest < len(piece):
            held, held_bytes = [piece[rest:]], len(piece) - rest
    if held:
        yield _bounded(b"".join(held), max_line_bytes)


def _bounded(line: bytes, max_line_bytes: int) -> Lines | TooLong:
    return Lines(line, 0, len(line)) if len(line.rstrip(b"\r\n")) <= max_line_bytes else TooLong(max_line_bytes)


def _gunzip(raw: Iterator[bytes], size: int) -> Iterator[bytes]:
    member = zlib.decompressobj(wbits=31)
    begun = False  # inside a member; files may hold several, one after the other
    members = 0  # that are whole
    try:
        for data in raw:
            while data:
                begun = True
                yield from _nonempty(member.decompress(data, size))
                while member.unconsumed_tail:
                    yield from _nonempty(member.decompress(member.unconsumed_tail, size))
                data = member.unused_data.lstrip(b"\0") if member.eof else b""  # noqa: PLW2901  the next member
                if member.eof:
                    member, begun, members = zlib.decompressobj(wbits=31), False, members + 1
    except zlib.error as error:
        words = str(error)
        if members and "header" in words:
            raise SourceError(
                "other bytes follow its gzip data",
                "compress what it should hold again: zcat FILE | gzip > NEW.jsonl.gz",
            ) from error
        checked = "its checksum is wrong" if "check" in words and "header" not in words else "its data is damaged"
        raise SourceError(
            f"it is not sound gzip: {checked}", "copy or download it again, or compress it again"
        ) from error
    if begun:
        raise SourceError("the gzip data is cut short", "copy it again")


def _unzstd(raw: Iterator[bytes]) -> Iterator[bytes]:
    import zstandard

    frame, begun = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).decompressobj(), False
    try:
        for block in raw:
            for start in range(0, len(block), ZSTD_STEP_BYTES):
                data = block[start : start + ZSTD_STEP_BYTES]
                while data:
                    begun = True
                    yield from _nonempty(frame.decompress(data))
                    data = frame.unused_data if frame.eof else b""
                    if frame.eof:  # files may hold several frames, one after the other
                        frame = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).decompressobj()
                        begun = False
    except zstandard.ZstdError as error:
        if "memory" in str(error):
            reason = f"its zstd window is larger than {MAX_WINDOW_BYTES // 2**20} MiB"
            raise SourceError(reason, "compress it again without --long and --ultra") from error
        if "ictionary" in str(error):
            raise SourceError("its zstd data needs a dictionary", "compress it again without one") from error
        raise SourceError(
            "it is not sound zstd: its data is damaged", "copy or download it again, or compress it again"
        ) from error
    if begun:
        raise SourceError("the zstd data is cut short", "copy it again")


def _nonempty(block: bytes) -> Iterator[bytes]:
    if block:
        yield block
