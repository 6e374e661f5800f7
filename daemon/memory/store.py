"""The folder of each dataset's memory: written by a run, moved here at its promotion, read by later runs.

A file that is not as its meta.json says is never used: its dataset is passed over, and that is told. Torch-free.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from blake3 import blake3

from daemon.dataset.identity import ROW_DIGEST_BYTES
from daemon.errors import DropforgeError
from daemon.job import from_json, to_json, utc_now
from daemon.text import escape
from guard.atomic import fsync_dir, make_folder_durable, rename_durable, write_atomic

if TYPE_CHECKING:  # commands ask what is kept, and only a run reads rows
    from daemon.dataset.rows import Row

MEMORY_NAME = "memory"
META_NAME = "meta.json"
ROWS_NAME = "rows.jsonl"
HELD_OUT_NAME = "held_out.jsonl"
HELD_OUT_INDEX = "held_out.idx"
RETIRED_INDEX = "retired.idx"
FILE_NAMES = (ROWS_NAME, HELD_OUT_NAME, HELD_OUT_INDEX, RETIRED_INDEX)  # in the order in which they are moved
KEY_NAME = "key"  # of the hash that decides which rows are kept
KEY_BYTES = 32
NAME_DIGITS = 32  # of a dataset's digest, that its folder is called by
META_VERSION = 1

T = TypeVar("T")


class Discarded(StrEnum):
    """Why a dataset's rows are not kept."""

    NO = ""
    FORGOTTEN = "forgotten"  # a person asked for it
    DELETED = "deleted"  # with its file, as the settings say


@dataclass(frozen=True, kw_only=True)
class FileMark:
    """What a file of a memory holds."""

    rows: int = 0
    size_bytes: int = 0
    digest: str = ""  # BLAKE3 of its first `size_bytes`, 32 hex digits


@dataclass(frozen=True, kw_only=True)
class DatasetMeta:
    """What is known of a dataset that was trained, its rows aside."""

    name: str  # the file's name as it was dropped
    digest: str  # BLAKE3 of the file
    job: str
    trained_rows: int
    trained_tokens: int  # one epoch, those with a loss
    train_on: str  # what is learned of its rows, as its own settings said
    created_at: str
    discarded: Discarded = Discarded.NO
    discarded_at: str | None = None
    files: Mapping[str, FileMark] = field(default_factory=dict)  # by name
    schema_version: int = META_VERSION

    def mark(self, name: str) -> FileMark:
        """What a file has to hold; nothing when there is none."""
        return self.files.get(name, FileMark())


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRow:
    """A row as it is kept: what it is, and its line, which `decode_row` makes a row."""

    digest: str
    asks: str  # digest of its prompt, empty without one
    line: bytes


@dataclass(frozen=True, kw_only=True)
class DatasetMemory:
    """One dataset's folder."""

    path: Path
    meta: DatasetMeta

    @property
    def is_kept(self) -> bool:
        """Whether rows of it are kept."""
        return self.meta.discarded is Discarded.NO

    def rows(self) -> list[StoredRow]:
        """The trained rows that are kept. Raises MemoryDamaged, OSError."""
        return self._decoded(ROWS_NAME)

    def held_out(self) -> list[StoredRow]:
        """The rows that were never trained. Raises MemoryDamaged, OSError."""
        return self._decoded(HELD_OUT_NAME)

    def retired(self) -> frozenset[str]:
        """Digests of other datasets' rows that this one took the place of. Raises MemoryDamaged, OSError."""
        return frozenset(_digests(self.read(RETIRED_INDEX)))

    def _decoded(self, name: str) -> list[StoredRow]:
        try:
            return list(map(_stored, self.read(name).splitlines(keepends=True)))
        except msgspec.MsgspecError as error:  # as it was written, and yet no row: another version wrote it
            raise MemoryDamaged(self, f"{name} holds rows of another version of Dropforge ({error})") from error

    def read(self, name: str) -> bytes:
        """The bytes of a file that are as they were written. Raises MemoryDamaged, OSError."""
        mark = self.meta.mark(name)
        if not mark.size_bytes:
            return b""
        try:
            data = (self.path / name).read_bytes()[: mark.size_bytes]
        except FileNotFoundError:
            raise MemoryDamaged(self, f"{name} is missing") from None
        if digest_of(data) != mark.digest:
            raise MemoryDamaged(self, f"{name} is not as it was written")
        return data


class MemoryDamaged(DropforgeError):
    """A dataset's memory that is not as it was written."""

    def __init__(self, memory: DatasetMemory, cause: str) -> None:
        super().__init__(
            operation="read the memory of",
            subject=escape(memory.meta.name),
            cause=f"{memory.path}: {cause}",
            hint=f"bring the folder back from a backup, or `dropforge memory forget {memory.meta.digest[:12]}`",
        )


def memory_dir_of(state_dir: Path) -> Path:
    """Return the folder of all memories."""
    return state_dir / MEMORY_NAME


def dataset_dir(memory_dir: Path, digest: str) -> Path:
    """Return the folder of a dataset's memory."""
    return memory_dir / digest[:NAME_DIGITS]


def read_memory(folder: Path) -> DatasetMemory | None:
    """Return the memory in a folder; None when there is none. Raises ValueError when meta.json is damaged, OSError."""
    try:
        text = (folder / META_NAME).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return DatasetMemory(path=folder, meta=from_json(text, DatasetMeta))


def list_memories(memory_dir: Path) -> tuple[list[DatasetMemory], list[str]]:
    """Return all memories, oldest first, and a sentence for each that cannot be read. Raises OSError."""
    found, problems = [], []
    for folder in dataset_folders(memory_dir):
        try:
            memory = read_memory(folder)
        except (ValueError, OSError) as error:
            problems.append(f"the memory in {folder} cannot be read, and is passed over: {escape(str(error))}")
            continue
        if memory is not None:
            found.append(memory)
    return sorted(found, key=lambda memory: (memory.meta.created_at, memory.meta.digest)), problems


def dataset_folders(memory_dir: Path) -> list[Path]:
    """Return the folders that may hold a memory. Raises OSError."""
    try:
        return sorted(Path(entry.path) for entry in os.scandir(memory_dir) if is_dataset_name(entry.name))
    except FileNotFoundError:
        return []


def is_dataset_name(name: str) -> bool:
    """Whether a folder is called as a dataset's memory is."""
    return len(name) == NAME_DIGITS and set(name) <= set("0123456789abcdef")


def held_out_registry(memories: Iterable[DatasetMemory]) -> tuple[dict[str, str], list[str]]:
    """Return every row that is held out, by its digest, with the name of its dataset; and what could not be read.

    Rows that a later dataset took the place of are not held out any more. What is readable of a damaged index counts: a row
    too many that is withheld does less harm than one that is trained.
    """
    registry: dict[str, str] = {}
    retired: set[str] = set()
    problems = []
    for memory in memories:
        with suppress(MemoryDamaged, OSError):  # told by whoever reads its rows
            retired |= memory.retired()
        found, problem = readable_index(memory)
        problems += [problem] if problem else []
        for digest in found:
            registry.setdefault(digest, memory.meta.name)
    return {digest: name for digest, name in registry.items() if digest not in retired}, problems


def readable_index(memory: DatasetMemory) -> tuple[list[str], str]:
    """Return the digests in a memory's index of held-out rows, as far as they can be read, and what is wrong with it."""
    if not memory.meta.mark(HELD_OUT_INDEX).rows:
        return [], ""
    try:
        return list(_digests(memory.read(HELD_OUT_INDEX))), ""
    except (MemoryDamaged, OSError) as error:
        problem = str(error).splitlines()[0]
        with suppress(OSError):
            return list(_digests((memory.path / HELD_OUT_INDEX).read_bytes())), problem
        return [], problem


# -- writing


def root_key(memory_dir: Path) -> bytes:
    """Return this root's key of `keyed_hash`, made at its first use. Raises OSError."""
    path = memory_dir / KEY_NAME
    with suppress(FileNotFoundError):
        key = path.read_bytes()
        if len(key) == KEY_BYTES:
            return key
    make_folder_durable(memory_dir, mode=0o700)
    key = os.urandom(KEY_BYTES)
    write_atomic(path, key, mode=0o600)
    return key


def keyed_hash(key: bytes, digest: str) -> bytes:
    """Return a row's place in the order in which rows are kept, which nobody can aim at without the key."""
    return blake3(bytes.fromhex(digest), key=key).digest(length=16)


def encode_row(row: Row) -> bytes:
    """Return a row as a line of rows.jsonl."""
    content = {name: getattr(row, name) for name in _content_names() if getattr(row, name) is not None}
    line = {"digest": row.content_digest, "asks": row.prompt_digest, "line": row.line, **content}
    return to_json(line).encode() + b"\n"


def decode_row(line: bytes) -> Row:
    """Return the row that `encode_row` made a line of."""
    from daemon.dataset.rows import Row

    value: dict[str, Any] = msgspec.json.decode(line)
    content = {name: value[name] for name in _content_names() if name in value}
    return Row(line=value["line"], content_digest=value["digest"], prompt_digest=value["asks"], **content)


def write_memory(
    folder: Path,
    meta: DatasetMeta,
    *,
    rows: Sequence[bytes] = (),
    held_out: Sequence[tuple[str, bytes]] = (),
    held_out_before: Iterable[str] = (),
    retired: Iterable[str] = (),
) -> None:
    """Write a dataset's memory, durably, its meta.json last. Raises OSError.

    `held_out` are digests and lines; `held_out_before` digests of rows that an earlier run over the dataset held out.
    """
    make_folder_durable(folder, mode=0o700)
    (folder / META_NAME).unlink(missing_ok=True)  # of an earlier attempt: it would not fit
    apart, gone = sorted({*held_out_before, *(digest for digest, _ in held_out)}), sorted(set(retired))
    parts: Mapping[str, tuple[int, bytes]] = {
        ROWS_NAME: (len(rows), b"".join(rows)),
        HELD_OUT_NAME: (len(held_out), b"".join(line for _, line in held_out)),
        HELD_OUT_INDEX: (len(apart), bytes.fromhex("".join(apart))),
        RETIRED_INDEX: (len(gone), bytes.fromhex("".join(gone))),
    }
    marks = {}
    for name, (count, data) in parts.items():
        write_atomic(folder / name, data, mode=0o600)
        marks[name] = FileMark(rows=count, size_bytes=len(data), digest=digest_of(data))
    write_meta(folder, replace(meta, files=marks))


def write_meta(folder: Path, meta: DatasetMeta) -> None:
    """Replace a memory's meta.json, durably. Raises OSError."""
    write_atomic(folder / META_NAME, to_json(meta, indent=1), mode=0o600)


def place_memory(source: Path, memory_dir: Path) -> DatasetMemory | None:
    """Move the memory that a run wrote to its place, meta.json last; None when there is none to move.

    Can be repeated after a crash at any point. Raises OSError, ValueError when what the run wrote cannot be read.
    """
    written = read_memory(source)
    if written is None:
        return None
    target = dataset_dir(memory_dir, written.meta.digest)
    make_folder_durable(target, mode=0o700)
    for name in (*FILE_NAMES, META_NAME):
        if (source / name).exists():
            rename_durable(source / name, target / name, replace=True)
    with suppress(OSError):
        source.rmdir()
    return read_memory(target)


def discard_rows(memory: DatasetMemory, why: Discarded) -> DatasetMemory:
    """Delete what is kept of a dataset's rows; its numbers stay, and say why. Can be repeated. Raises OSError."""
    meta = memory.meta
    if meta.discarded not in (why, Discarded.FORGOTTEN):
        files = {RETIRED_INDEX: meta.mark(RETIRED_INDEX)}
        meta = replace(meta, discarded=why, discarded_at=utc_now(), files=files)
        write_meta(memory.path, meta)  # first: from here on nothing reads them
    for name in (ROWS_NAME, HELD_OUT_NAME, HELD_OUT_INDEX):
        (memory.path / name).unlink(missing_ok=True)
    fsync_dir(memory.path)
    return DatasetMemory(path=memory.path, meta=meta)


def digest_of(data: bytes) -> str:
    """BLAKE3 of a file's bytes, 32 hex digits."""
    return blake3(data).hexdigest(length=16)


@cache
def _content_names() -> tuple[str, ...]:
    from daemon.dataset.rows import RowContent

    return tuple(name for name in RowContent.__dataclass_fields__ if name != "unused_keys")


class _Named(msgspec.Struct):
    """The part of a line that says what the row is; the rest is not decoded."""

    digest: str
    asks: str


def _stored(line: bytes) -> StoredRow:
    named = msgspec.json.decode(line, type=_Named)
    return StoredRow(digest=named.digest, asks=named.asks, line=line)


def _digests(data: bytes) -> Iterator[str]:
    """The row digests of an index; a torn one at its end is left out."""
    whole = len(data) // ROW_DIGEST_BYTES * ROW_DIGEST_BYTES
    return (data[at : at + ROW_DIGEST_BYTES].hex() for at in range(0, whole, ROW_DIGEST_BYTES))
