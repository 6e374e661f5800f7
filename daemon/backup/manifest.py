"""The manifest of a backup: every file with its digest, and what a restore has to know. Pure values; nothing is opened.

Names in a backup are `dropforge.toml`, and paths below `state/`, `current_model/`, `inbox/` and `base_model/`, wherever those
parts lie on the machine. `parse_manifest` refuses what would lead out of them: a backup may come from a stranger.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import msgspec
from blake3 import blake3

from daemon.config import CONFIG_NAME
from daemon.root_identity import MARK, Part
from daemon.text import escape
from guard.fingerprint import canonical_json
from guard.json_text import parse_json

MANIFEST_NAME = "dropforge-backup.json"
SCHEMA_VERSION = 1
MAX_MANIFEST_BYTES = 2**29  # some millions of files
QUEUE_NAME = f"{Part.STATE}/queue.sqlite3"
BASE = "base_model"  # the base model's place in a backup, when it is saved
TOPS = (*Part, BASE)
MARK_NAMES = frozenset(f"{part}/{MARK}" for part in Part)


@dataclass(frozen=True, kw_only=True)
class SavedFile:
    """One regular file of a backup."""

    size_bytes: int
    blake3: str
    mode: int
    mtime_ns: int


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """Something of the root that the backup does not hold, and why."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a backup holds. `files`, `folders` (mode) and `links` (target) are by their names in the backup."""

    root_id: str
    root: str  # where the root lay
    created_at: str
    program: str  # the version of Dropforge that wrote it
    current_version: str | None
    newest_version: int  # the highest number that was ever used
    jobs: Mapping[str, int]  # by state
    with_checkpoints: bool
    base_folder: str = ""  # where the base model lay; empty when it comes from the Hub
    base_path: str = ""  # relative to the root, when the base model is saved as `base_model/`
    schema_version: int = SCHEMA_VERSION
    files: Mapping[str, SavedFile] = field(default_factory=dict)
    folders: Mapping[str, int] = field(default_factory=dict)
    links: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[LeftOut, ...] = ()
    warnings: tuple[str, ...] = ()  # what of the root was damaged when it was saved

    @property
    def size_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(file.size_bytes for file in self.files.values())

    @property
    def versions(self) -> tuple[str, ...]:
        """The names of the versions that it holds, oldest first."""
        prefix = f"{Part.MODEL}/versions/"
        names = (name.removeprefix(prefix) for name in self.folders if name.startswith(prefix))
        return tuple(sorted((name for name in names if name.isdecimal()), key=int))


class DamagedManifest(ValueError):
    """A manifest that cannot be believed; `str()` says why."""


def render_manifest(manifest: Manifest) -> bytes:
    """Return the bytes of `dropforge-backup.json`, which end with the digest of the rest."""
    value = msgspec.to_builtins(manifest)
    return (json.dumps({**value, "digest": _digest(value)}, indent=1) + "\n").encode("ascii")


def parse_manifest(raw: bytes) -> Manifest:
    """Read a manifest. Raises DamagedManifest when it is not one, is not whole, or names what would lead astray."""
    try:
        value = parse_json(raw)
        digest, version = value.pop("digest"), value["schema_version"]
        due = _digest(value)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedManifest(f"{MANIFEST_NAME} is not a manifest") from error
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise DamagedManifest(f"its form {escape(str(version))} is newer than this program knows ({SCHEMA_VERSION})")
    if digest != due:
        raise DamagedManifest(f"{MANIFEST_NAME} is not as it was written")
    try:
        manifest = msgspec.convert(value, Manifest)
    except (msgspec.ValidationError, UnicodeEncodeError) as error:
        raise DamagedManifest(f"{MANIFEST_NAME} is not a manifest: {escape(str(error))}") from error
    for fault in _faults(manifest):
        raise DamagedManifest(fault)
    return manifest


def name_fault(name: str) -> str:
    """Say why a name may not stand in a backup; empty when it may."""
    parts = name.split("/")
    if name.startswith("/"):
        return "it is an absolute path"
    if "\0" in name or any(part in ("", ".", "..") for part in parts):
        return "it leads out of the backup"
    if parts[0] not in TOPS and name not in (CONFIG_NAME, MANIFEST_NAME):
        return "it belongs to no part of a root"
    return ""


def link_fault(name: str, target: str) -> str:
    """Say why a link may not stand in a backup; empty when it stays inside its part whatever the other links are.

    `..` is allowed at the beginning alone, where it leads through real folders: what follows goes down.
    """
    parts = target.split("/")
    ups = next((number for number, part in enumerate(parts) if part != ".."), len(parts))
    if not target or target.startswith("/") or "\0" in target:
        return f"it leads to {escape(target) or 'nothing'}, which is not a relative path"
    depth = name.count("/") - 1  # folders between the part and the link
    if ups > depth or ".." in parts[ups:]:
        return f"it leads to {escape(target)}, out of its part of the root"
    return ""


def with_warnings(manifest: Manifest, warnings: tuple[str, ...]) -> Manifest:
    """Return the manifest with further warnings."""
    return replace(manifest, warnings=(*manifest.warnings, *warnings))


def _faults(manifest: Manifest) -> Iterator[str]:
    kinds = (manifest.files, manifest.folders, manifest.links)
    for names in kinds:
        for name in names:
            if fault := name_fault(name):
                yield f"{escape(name)} may not be in a backup: {fault}"
            parent = posixpath.dirname(name)
            if parent and parent not in manifest.folders:
                yield f"{escape(name)} may not be in a backup: {escape(parent)} is not a folder of it"
    if len(frozenset().union(*kinds)) < sum(map(len, kinds)):
        yield "a name stands for two things"
    for name, target in manifest.links.items():
        if fault := link_fault(name, target):
            yield f"the link {escape(name)} may not be in a backup: {fault}"
    for name in (MANIFEST_NAME, CONFIG_NAME, *TOPS):
        wrong = manifest.links if name in TOPS else {**manifest.links, **manifest.folders}
        if name in wrong or (name in TOPS and name in manifest.files):
            yield f"{name} may not be in a backup as it is: it is of another kind"
    if MANIFEST_NAME in manifest.files:
        yield f"{MANIFEST_NAME} may not name itself"
    if any(part not in manifest.folders for part in Part):
        yield f"it lacks one of {', '.join(f'{part}/' for part in Part)}"
    if any(mode & ~0o7777 for mode in (*manifest.folders.values(), *(file.mode for file in manifest.files.values()))):
        yield "a mode is not one"
    base = manifest.base_path
    if base and (base.startswith("/") or "\0" in base or any(part in ("", ".", "..") for part in base.split("/"))):
        yield f"the base model's place {escape(base)} leads out of the root"
    if bool(base) != (BASE in manifest.folders):
        yield "it does not say where the base model belongs"


def _digest(value: object) -> str:
    return blake3(canonical_json(value)).hexdigest()  # type: ignore[arg-type]  # builtins alone
