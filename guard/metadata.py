"""Run metadata: whose checkpoints a model directory holds, in `.dataset_metadata.json`.

Three forms are told apart: the old one with four keys at most and no version, the present one, and later
ones, which are neither judged nor overwritten.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from .atomic import PathLike, rename_durable, write_atomic
from .errors import MetadataTooNew, MetadataUnusable, explain_os_error, storage_errors
from .fingerprint import Fingerprint, to_json_value
from .json_text import parse_json
from .layout import METADATA_NAME, ensure_staging, unused_name

SCHEMA_VERSION: Final = 2  # the old form, which had no version, counts as 1

# Metadata is a few kB; with a long chat template tens of them. Anything this large is something else.
_MAX_BYTES = 16 * 1024 * 1024


class MetadataKind(StrEnum):
    """What stands in the metadata's place."""

    MISSING = "missing"
    UNREADABLE = "unreadable"
    LEGACY = "legacy"
    CURRENT = "current"
    NEWER = "newer"


@dataclass(frozen=True, kw_only=True)
class RunMetadata:
    """Whose checkpoints these are.

    `dataset_hash` is md5 of `name:size`, for old readers; the content is in the fingerprint (None in the old
    form). `finished` names the version that the run was promoted as; None while the run is in progress.
    """

    dataset_name: str
    dataset_hash: str
    dataset_path: str
    lora_config: Mapping[str, Any]
    fingerprint: Fingerprint | None
    finished: str | None = None
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> dict[str, Any]:
        """The object that the file holds."""
        return {
            "schema_version": self.schema_version,
            "dataset_name": self.dataset_name,
            "dataset_hash": self.dataset_hash,
            "dataset_path": self.dataset_path,
            "lora_config": to_json_value(self.lora_config),
            "finished": self.finished,
            "components": self.fingerprint.to_json() if self.fingerprint is not None else {},
        }


@dataclass(frozen=True, kw_only=True)
class MetadataReading:
    """What was read: `run` for LEGACY and CURRENT, `reason` for the others."""

    kind: MetadataKind
    run: RunMetadata | None = None
    reason: str = ""


def read_metadata(model_dir: PathLike) -> MetadataReading:
    """Read the metadata; whatever is in its place, this returns and never raises."""
    raw, problem = _read_raw(Path(model_dir, METADATA_NAME))
    if raw is None:
        return problem
    if raw.startswith(b"\xef\xbb\xbf"):
        return _unreadable("it starts with a byte order mark")
    try:
        value = parse_json(raw.decode())
    except UnicodeDecodeError:
        return _unreadable("it is not UTF-8")
    except ValueError as exc:
        return _unreadable("it is empty" if not raw.strip() else f"it is not JSON ({exc})")
    if not isinstance(value, dict):
        return _unreadable("it is not a JSON object")
    return parse_metadata(value)


def load_raw_metadata(model_dir: PathLike) -> dict[str, Any] | None:
    """Return the metadata as the file has it.

    None when missing, unreadable or not an object.
    """
    raw, _ = _read_raw(Path(model_dir, METADATA_NAME))
    try:
        value = parse_json(raw.decode()) if raw is not None else None
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _read_raw(path: Path) -> tuple[bytes | None, MetadataReading]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return None, MetadataReading(kind=MetadataKind.MISSING, reason="there is no metadata")
    except OSError as exc:
        is_link = exc.errno == errno.ELOOP
        return None, _unreadable("it is a symbolic link" if is_link else explain_os_error(exc))
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            return None, _unreadable("it is not a regular file")
        if status.st_size > _MAX_BYTES:
            return None, _unreadable(f"it has {status.st_size:,} bytes, more than metadata can have")
        with os.fdopen(fd, "rb", closefd=False) as file:
            return file.read(status.st_size), MetadataReading(kind=MetadataKind.MISSING)
    except OSError as exc:
        return None, _unreadable(explain_os_error(exc))
    finally:
        os.close(fd)


def _unreadable(reason: str) -> MetadataReading:
    return MetadataReading(kind=MetadataKind.UNREADABLE, reason=reason)


def parse_metadata(value: dict[str, Any]) -> MetadataReading:
    """Tell the form of a JSON object, and read it; never raises."""
    version = value.get("schema_version", 1)
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        return _unreadable(f"its schema_version is {version!r}")
    if version > SCHEMA_VERSION:
        reason = f"its schema_version is {version}; this program knows {SCHEMA_VERSION} and earlier"
        return MetadataReading(kind=MetadataKind.NEWER, reason=reason)
    name, digest = value.get("dataset_name"), value.get("dataset_hash")
    path, lora_config = value.get("dataset_path", ""), value.get("lora_config", {})
    if not (isinstance(name, str) and isinstance(digest, str) and isinstance(path, str)):
        return _unreadable("it names no dataset")
    if not isinstance(lora_config, dict):
        return _unreadable("its lora_config is not an object")
    try:
        to_json_value(lora_config)
    except (ValueError, TypeError) as exc:
        return _unreadable(f"its lora_config holds a value that cannot be read ({exc})")
    metadata = RunMetadata(
        dataset_name=name, dataset_hash=digest, dataset_path=path, lora_config=lora_config, fingerprint=None
    )
    if version == 1:
        return MetadataReading(
            kind=MetadataKind.LEGACY,
            run=replace(metadata, schema_version=1),
            reason="it has the old form, which does not say what the dataset held",
        )
    finished = value.get("finished")
    if finished is not None and not isinstance(finished, str):
        return _unreadable(f"its finished is {finished!r}")
    try:
        fingerprint = Fingerprint.from_json(value.get("components"))
    except (ValueError, TypeError) as exc:
        return _unreadable(f"it holds a value that cannot be read ({exc})")
    current = replace(metadata, fingerprint=fingerprint, finished=finished)
    return MetadataReading(kind=MetadataKind.CURRENT, run=current)


def write_metadata(model_dir: PathLike, metadata: RunMetadata) -> None:
    """Write the metadata, durably. Under the model directory's lock.

    Raises MetadataTooNew over a later form. What cannot be read is renamed to
    `.dataset_metadata.json.unreadable-<time>` first, never overwritten.
    """
    path = Path(model_dir, METADATA_NAME)
    reading = read_metadata(model_dir)
    require_known_form(model_dir, reading)
    with storage_errors("write", path):
        if reading.kind is MetadataKind.UNREADABLE:
            moment = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
            aside = unused_name(path.parent, f"{path.name}.unreadable-{moment}")
            rename_durable(path, path.with_name(aside))
        # The temporary file goes where leftovers are looked for, not among the model's own files.
        staging = ensure_staging(model_dir)
        write_atomic(path, json.dumps(metadata.to_json(), indent=2) + "\n", temp_dir=staging)


def require_known_form(model_dir: PathLike, reading: MetadataReading) -> None:
    """Raise MetadataTooNew for metadata of a later form."""
    if reading.kind is MetadataKind.NEWER:
        raise MetadataTooNew(
            operation="use the metadata in",
            path=Path(model_dir, METADATA_NAME),
            cause=reading.reason,
            hint="run the version of this program that wrote it, or move the model directory aside",
        )


def mark_finished(model_dir: PathLike, version: str) -> None:
    """Record that the run of the metadata was promoted as `version`.

    What that run left behind is no longer resumed from. Raises MetadataUnusable when there is no metadata of the
    present form, MetadataTooNew for a later one.
    """
    reading = read_metadata(model_dir)
    require_known_form(model_dir, reading)
    if reading.kind is not MetadataKind.CURRENT or reading.run is None:
        raise MetadataUnusable(
            operation="mark as finished",
            path=Path(model_dir, METADATA_NAME),
            cause=reading.reason or "it is missing",
        )
    write_metadata(model_dir, replace(reading.run, finished=version))
