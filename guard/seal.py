"""The seal: a manifest inside a checkpoint, written last, that says what every byte of it is and whose it is.

`seal.json` has one spelling. A seal that parses but is spelt otherwise was not written here, so that a change
of any bit of it shows. Without a key the seal finds accidents; with a key (HMAC-SHA256) it finds intent as
well.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from blake3 import blake3

from .atomic import PathLike, fsync_dir, fsync_file, write_atomic
from .completeness import recorded_step
from .digest import digest_file
from .errors import NotFound, SealBroken, SealKeyMissing, UsageError, explain_os_error, storage_errors
from .fingerprint import Fingerprint, canonical_json
from .json_text import parse_json

SEAL_NAME: Final = "seal.json"
SEAL_VERSION: Final = 1
_MAX_SEAL_BYTES = 64 * 1024 * 1024
_MIN_KEY_BYTES = 16
# What write_atomic leaves beside the seal when its process is killed in the middle.
_SEAL_LEFTOVER = re.compile(r"\.seal\.json\.\d+-\d+\.tmp")


@dataclass(frozen=True, kw_only=True)
class Seal:
    """`files` maps a path relative to the checkpoint to (size in bytes, BLAKE3 as 64 hex digits)."""

    step: int
    fingerprint: Fingerprint
    files: Mapping[str, tuple[int, str]]
    folders: tuple[str, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(size for size, _ in self.files.values())


@dataclass(frozen=True, kw_only=True)
class Tree:
    """What a folder holds. `others` are neither files nor folders: symlinks, pipes, devices."""

    files: Mapping[str, int]
    folders: tuple[str, ...]
    others: tuple[str, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(self.files.values())


def list_tree(folder: PathLike) -> Tree:
    """List every file below `folder` with its size in bytes.

    Paths are relative; symlinks are not followed.
    """
    files: dict[str, int] = {}
    folders: list[str] = []
    others: list[str] = []
    pending = [""]
    while pending:
        prefix = pending.pop()
        with os.scandir(Path(folder, prefix)) as entries:
            for entry in entries:
                name = prefix + entry.name
                if entry.is_dir(follow_symlinks=False):
                    folders.append(name)
                    pending.append(name + "/")
                elif entry.is_file(follow_symlinks=False):
                    files[name] = entry.stat(follow_symlinks=False).st_size
                else:
                    others.append(name)
    return Tree(files=files, folders=tuple(sorted(folders)), others=tuple(sorted(others)))


def write_seal(directory: PathLike, *, step: int, fingerprint: Fingerprint, key: bytes | None = None) -> Seal:
    """Make every file of `directory` durable, digest it, and write `seal.json` last.

    Raises SealBroken for what cannot be sealed (symlinks, another step in trainer_state.json), FileChanged
    when something still writes there, StorageError.
    """
    folder = Path(directory)
    with storage_errors("seal", folder):
        if not folder.is_dir() or folder.is_symlink():
            raise NotFound(operation="seal", path=folder, cause="there is no such folder")
        for name in os.listdir(folder):  # noqa: PTH208  names are all that is needed
            if _SEAL_LEFTOVER.fullmatch(name):
                (folder / name).unlink()
        tree = list_tree(folder)
        names = sorted(name for name in tree.files if name != SEAL_NAME)
        _require_sealable(folder, tree, names, step)
        # The disk writes while the processor digests: together they take little longer than the slower of the
        # two.
        with ThreadPoolExecutor(max_workers=1) as writer:
            written = writer.submit(_fsync_all, folder, names, tree.folders)
            digests = [digest_file(folder / name) for name in names]
            written.result()
        files = {name: (d.size_bytes, d.blake3_hex) for name, d in zip(names, digests, strict=True)}
        seal = Seal(step=step, fingerprint=fingerprint, files=files, folders=tree.folders)
        write_atomic(folder / SEAL_NAME, render_seal(seal, key))
    return seal


def _require_sealable(folder: Path, tree: Tree, names: list[str], step: int) -> None:
    if tree.others:
        cause = f"{tree.others[0]} is neither a file nor a folder"
        raise SealBroken(operation="seal", path=folder, cause=cause, hint="a checkpoint holds plain files only")
    if not names:
        raise SealBroken(operation="seal", path=folder, cause="it is empty")
    recorded = recorded_step(folder) if "trainer_state.json" in tree.files else None
    if recorded is not None and recorded != step:
        cause = f"trainer_state.json is of step {recorded}, not {step}"
        raise SealBroken(operation="seal", path=folder, cause=cause)


def _fsync_all(folder: Path, names: list[str], folders: tuple[str, ...]) -> None:
    for name in names:
        fsync_file(folder / name)
    for name in sorted(folders, reverse=True):  # leaves first
        fsync_dir(folder / name)


def render_seal(seal: Seal, key: bytes | None) -> bytes:
    """Return the bytes of seal.json, in the only spelling that verifies."""
    document: dict[str, Any] = {
        "schema_version": SEAL_VERSION,
        "algorithm": "blake3" if key is None else "hmac-sha256",
        "step": seal.step,
        "fingerprint": seal.fingerprint.to_json(),
        "files": {name: {"size_bytes": size, "blake3": digest} for name, (size, digest) in seal.files.items()},
        "folders": list(seal.folders),
    }
    document["seal"] = _value_of(document, key)
    return (json.dumps(document, indent=1, sort_keys=True) + "\n").encode()


def _value_of(document: Mapping[str, Any], key: bytes | None) -> str:
    body = canonical_json({name: value for name, value in document.items() if name != "seal"})
    return blake3(body).hexdigest() if key is None else hmac.new(key, body, hashlib.sha256).hexdigest()


def read_seal(directory: PathLike, *, key: bytes | None = None) -> Seal:
    """Read and check the seal itself, not yet what it seals.

    Raises FileNotFoundError when there is none, SealBroken when it is not one of ours, or not under this key.
    """
    path = Path(directory, SEAL_NAME)
    raw = _read_regular(path)
    try:
        document = parse_json(raw)
        seal = _parse(document)
        algorithm, value = document["algorithm"], str(document["seal"]).encode()
        due = _value_of(document, key).encode()
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as exc:
        raise _broken(path, "seal.json cannot be read as a seal") from exc
    if algorithm == "hmac-sha256" and key is None:
        raise SealKeyMissing(
            operation="verify",
            path=path.parent,
            cause="it is sealed with a key, and none was given",
            hint="name the key file that sealed it",
        )
    if algorithm == "blake3" and key is not None:
        raise _broken(path, "it is sealed without a key, and one is required", "seal it again with the key")
    expected = render_seal(seal, key)
    if not hmac.compare_digest(value, due):
        raise _broken(path, "seal.json does not verify" + (" under this key" if key is not None else ""))
    if raw != expected:
        raise _broken(path, "seal.json is spelt otherwise than the guard spells it")
    return seal


def _parse(document: Any) -> Seal:
    if document["schema_version"] != SEAL_VERSION:
        raise ValueError("another form")
    files = {str(name): (int(item["size_bytes"]), str(item["blake3"])) for name, item in document["files"].items()}
    return Seal(
        step=int(document["step"]),
        fingerprint=Fingerprint.from_json(document["fingerprint"]),
        files=files,
        folders=tuple(map(str, document["folders"])),
    )


def _read_regular(path: Path) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise
    except OSError as exc:
        raise _broken(path, f"seal.json cannot be read: {explain_os_error(exc)}") from exc
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_SEAL_BYTES:
            raise _broken(path, "seal.json is not a file of a seal's size")
        with os.fdopen(fd, "rb", closefd=False) as file:
            return file.read()
    except OSError as exc:
        raise _broken(path, f"seal.json cannot be read: {explain_os_error(exc)}") from exc
    finally:
        os.close(fd)


def _broken(path: Path, cause: str, hint: str = "") -> SealBroken:
    return SealBroken(operation="verify", path=path.parent, cause=cause, hint=hint)


def load_key(path: PathLike) -> bytes:
    """Read the key for sealing: at least 16 bytes.

    In a regular file of ours that nobody else can read (0600).
    Raises UsageError. A trailing newline is not part of the key.
    """

    def refuse(cause: str, hint: str = "") -> UsageError:
        return UsageError(operation="use the key file", path=path, cause=cause, hint=hint)

    try:
        # A symlink is followed: secrets are often mounted as one. What counts is the file that was opened.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as exc:
        raise refuse((exc.strerror or str(exc)).lower()) from exc
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise refuse("it is not a regular file")
        if status.st_uid != os.geteuid():
            raise refuse(f"it belongs to user {status.st_uid}, not to {os.geteuid()}")
        if status.st_mode & 0o077:
            raise refuse(f"others can use it (mode {stat.S_IMODE(status.st_mode):04o})", f"chmod 600 {path}")
        key = os.read(fd, 4097).rstrip(b"\r\n")
    except OSError as exc:
        raise refuse((exc.strerror or str(exc)).lower()) from exc
    finally:
        os.close(fd)
    if not _MIN_KEY_BYTES <= len(key) <= 4096:
        cause = f"it holds {len(key)} bytes; a key has {_MIN_KEY_BYTES} to 4096"
        raise refuse(cause, f"head -c 32 /dev/urandom | base64 > {path}")
    return key
