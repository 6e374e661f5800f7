"""Fingerprints: what a run computes, as named components, and how two of them differ."""

from __future__ import annotations

import enum
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass, is_dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from blake3 import blake3

from .atomic import PathLike
from .components import COMPONENTS, Component, ComponentKind, component_of, reading_order
from .digest import DigestCache, FileDigest, digest_file, digest_model_files, digest_tokenizer_files
from .errors import DatasetUnreadable, FileUnreadable, NotFound

__all__ = [
    "COMPONENTS",
    "JSON",
    "Component",
    "ComponentKind",
    "DatasetFingerprint",
    "Difference",
    "DigestCache",
    "FileDigest",
    "Fingerprint",
    "component_of",
    "digest_file",
    "digest_model_files",
    "digest_tokenizer_files",
    "fingerprint_dataset",
    "name_size_hash",
]

JSON = None | bool | int | float | str | list[Any] | dict[str, Any]
DatasetMode = Literal["content", "name_size"]


@dataclass(frozen=True, kw_only=True)
class DatasetFingerprint:
    """What identifies a dataset.

    `digest` is BLAKE3 of the bytes (64 hex digits) in mode `content`, md5 of `name:size` (32) in `name_size`.
    """

    name: str
    size_bytes: int
    digest: str
    mode: DatasetMode

    def components(self) -> dict[str, JSON]:
        return {
            "dataset.digest": self.digest,
            "dataset.name": self.name,
            "dataset.size_bytes": self.size_bytes,
        }


def fingerprint_dataset(path: PathLike, *, mode: DatasetMode = "content") -> DatasetFingerprint:
    """Identify a dataset by its content, or by name and size (`mode`).

    Raises DatasetUnreadable, NotFound, and FileChanged when the file changes while it is read.
    """
    name = Path(path).name
    if mode == "name_size":
        size_bytes, digest = name_size_hash(path)
        return DatasetFingerprint(name=name, size_bytes=size_bytes, digest=digest, mode=mode)
    try:
        content = digest_file(path)
    except FileUnreadable as exc:
        raise DatasetUnreadable(operation="read dataset", path=path, cause=exc.cause, hint=exc.hint) from exc
    return DatasetFingerprint(name=name, size_bytes=content.size_bytes, digest=content.blake3_hex, mode=mode)


def name_size_hash(path: PathLike) -> tuple[int, str]:
    """Return size in bytes and md5 of `name:size`, as old metadata has it.

    It does not see a same-size edit.
    """
    file = Path(path)
    try:
        size_bytes = file.stat().st_size
    except OSError as exc:
        kind = NotFound if isinstance(exc, FileNotFoundError) else DatasetUnreadable
        raise kind(operation="read dataset", path=path, cause=(exc.strerror or str(exc)).lower()) from exc
    # surrogateescape: a file name may hold any bytes.
    text = f"{file.name}:{size_bytes}".encode(errors="surrogateescape")
    return size_bytes, hashlib.md5(text, usedforsecurity=False).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One component that changed; None stands for "not recorded" and for "not set" alike."""

    name: str
    old: JSON
    new: JSON
    kind: ComponentKind

    @property
    def is_identity(self) -> bool:
        return self.kind is ComponentKind.IDENTITY

    def __str__(self) -> str:
        return f"{_label(self.name)}: {_shown(self.old)} -> {_shown(self.new)}"


@dataclass(frozen=True, init=False)
class Fingerprint:
    """What a run computes, as named components (`guard.components` says which of them are identity).

    Values are kept as JSON: tuples become lists, sets and what is a set in all but name sorted lists, enums
    their values, whole floats ints, and dataclasses objects. A component that is None counts as one that is
    not there. NaN and infinity raise ValueError, other types TypeError.
    """

    components: Mapping[str, JSON]

    def __init__(self, components: Mapping[str, Any]) -> None:
        plain = {str(name): _component_value(str(name), value) for name, value in components.items()}
        ordered = {name: plain[name] for name in sorted(plain, key=reading_order)}
        object.__setattr__(self, "components", MappingProxyType(ordered))

    def __hash__(self) -> int:
        return hash(self.identity_digest)

    def __reduce__(self) -> tuple[Any, ...]:
        return Fingerprint, (dict(self.components),)

    @cached_property
    def identity(self) -> dict[str, JSON]:
        """The components that decide whether a checkpoint may be continued."""
        return {
            name: value
            for name, value in self.components.items()
            if value is not None and self._kind_of(name) is ComponentKind.IDENTITY
        }

    @cached_property
    def identity_digest(self) -> str:
        """BLAKE3 (64 hex digits) of the identity: equal exactly when no identity component differs."""
        return blake3(canonical_json(self.identity)).hexdigest()

    def _kind_of(self, name: str) -> ComponentKind:
        component = component_of(name)
        if component.instead_of is not None and self.components.get(component.instead_of) is None:
            return ComponentKind.IDENTITY
        return component.kind

    def differences(self, new: Fingerprint) -> tuple[Difference, ...]:
        """List every component that differs from `new`, notes included, in reading order."""
        names = sorted({*self.components, *new.components}, key=reading_order)
        return tuple(
            Difference(
                name=name,
                old=self.components.get(name),
                new=new.components.get(name),
                kind=min(self._kind_of(name), new._kind_of(name)),  # "identity" sorts before "note"
            )
            for name in names
            if canonical_json(self.components.get(name)) != canonical_json(new.components.get(name))
        )

    def explain_changes(self, new: Fingerprint) -> tuple[str, ...]:
        """Say in what the identity differs from `new`, a sentence each; datasets by name where both are known."""
        names = self.components.get("dataset.name"), new.components.get("dataset.name")
        return tuple(
            _dataset_change(names, change) if change.name == "dataset.digest" and all(names) else str(change)
            for change in self.differences(new)
            if change.is_identity
        )

    def same_run(self, other: Fingerprint) -> bool:
        return self.identity_digest == other.identity_digest

    def to_json(self) -> dict[str, JSON]:
        return dict(self.components)

    @classmethod
    def from_json(cls, value: object) -> Fingerprint:
        """Raises ValueError when `value` is not an object of components."""
        if not isinstance(value, dict):
            raise ValueError("components are not an object")
        return cls(value)


def _component_value(name: str, value: Any) -> JSON:
    plain = to_json_value(value)
    if isinstance(plain, list) and component_of(name).unordered:
        return sorted(plain, key=canonical_json)
    return plain


def to_json_value(value: Any) -> JSON:
    """Return a value as it reads after a round trip through JSON.

    So old and new compare as equals.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, enum.Enum):
        return to_json_value(value.value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value} has no place in a fingerprint")
        # 1 and 1.0 are one value to every reader of a recipe; JSON would keep them apart.
        return int(value) if value.is_integer() and abs(value) < 2**53 else float(value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, os.PathLike):
        return os.fsdecode(value)
    if is_dataclass(value) and not isinstance(value, type):
        return to_json_value(asdict(value))
    if isinstance(value, Mapping):
        return {str(_plain_key(key)): to_json_value(item) for key, item in value.items()}
    if isinstance(value, AbstractSet):
        return sorted((to_json_value(item) for item in value), key=canonical_json)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return [to_json_value(item) for item in value]
    raise TypeError(f"a {type(value).__name__} has no place in a fingerprint: {value!r}")


def _plain_key(key: Any) -> Any:
    return key.value if isinstance(key, enum.Enum) else key


def canonical_json(value: JSON) -> bytes:
    """One spelling for one value: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


_LORA_LABELS = {"lora_alpha": "alpha", "lora_dropout": "dropout"}


def _label(name: str) -> str:
    """The component as people call it: `LoRA alpha` for `lora.lora_alpha`."""
    section, _, field = name.partition(".")
    return f"LoRA {_LORA_LABELS.get(field, field)}" if section == "lora" and field else name


def _dataset_change(names: tuple[JSON, JSON], change: Difference) -> str:
    """`Dataset changed: a.jsonl → b.jsonl (digest 55bde7546e2ee32d → a97c6a8e1a0c056f)`."""
    old, new = map(_shown, names)
    what = f"{old} → {new}" if old != new else f"the content of {old}"
    return f"Dataset changed: {what} (digest {_shown(change.old)} → {_shown(change.new)})"


def _shown(value: JSON) -> str:
    """Short enough for a line, and never the same for two different values."""
    text = value if isinstance(value, str) and value.isprintable() and value else json.dumps(value, sort_keys=True)
    if len(text) == 64 and all(character in "0123456789abcdef" for character in text):
        return text[:16]
    if len(text) <= 80:
        return text
    return f"{text[:40]}... ({len(text):,} characters, {blake3(canonical_json(value)).hexdigest()[:12]})"
