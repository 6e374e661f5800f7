"""The base model's identity: what an adapter was trained on, so that another base is never continued in silence.

Contents decide: the same files under another path or name are the same base. Weights, configuration, tokenizer and chat
template have a digest each, so that a person learns which of them is another one. Torch-free, and never downloads.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from blake3 import blake3

from daemon.recipe import ModelSettings
from daemon.text import escape
from guard.digest import DigestCache, FileDigest, digest_file, digest_files
from guard.json_text import parse_json

Digest = Callable[[Path], FileDigest]
OFFLINE_VARIABLE = "HF_HUB_OFFLINE"
CACHE_NAME = "digests.json"  # in the state directory
SHOWN_HEX = 12
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_TOKENIZER = (
    *("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt"),
    *("*.model", "*.tiktoken", "tekken.json"),
)
_TOKENIZER_CONFIG = "tokenizer_config.json"
# What libraries note of themselves, and the template, which is a part of its own.
_NOT_TOKENIZER = frozenset({"chat_template", "name_or_path", "transformers_version"})
_NOT_CONFIG = frozenset({"_name_or_path", "transformers_version"})


class BasePart(StrEnum):
    """What a base model consists of; each decides what an adapter learned."""

    WEIGHTS = "weights"
    CONFIG = "config"
    TOKENIZER = "tokenizer"
    CHAT_TEMPLATE = "chat_template"


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """A base model on this machine."""

    name: str  # as configured
    path: Path
    revision: str | None  # commit of the Hub snapshot, None for a local folder
    root: Path | None = None  # of Dropforge; a base model in it is named by a path that moves along with it

    @property
    def reference(self) -> str:
        """What libraries on this machine know it by: the Hub id, or the local folder."""
        return self.name if self.revision is not None else str(self.path)

    @property
    def portable_name(self) -> str:
        """What an adapter names as its base: the Hub id, `./PATH` from the root, or a folder elsewhere in full."""
        if self.revision is not None or self.root is None:
            return self.reference
        for folder in (expand_home(self.name), self.path):  # as it is named first: it may lead out by a link
            for root in (self.root, self.root.resolve()):
                if folder.is_absolute() and folder.is_relative_to(root):
                    return f"./{folder.relative_to(root)}"
        return self.reference


@dataclass(frozen=True, kw_only=True)
class BaseIdentity:
    """Name and contents of a base model, as a version's record keeps them."""

    name: str  # as `BaseModel.portable_name`
    commit: str | None  # of a Hub snapshot
    weights: str | None  # digests, 64 hex digits; None where there is nothing to digest
    config: str | None
    tokenizer: str | None
    chat_template: str | None

    def to_record(self) -> dict[str, str | None]:
        """Return it for `training_record.json`."""
        return asdict(self)

    def part(self, part: BasePart) -> str | None:
        """Return a part's digest."""
        digest: str | None = getattr(self, part)
        return digest

    def describe(self, parts: tuple[BasePart, ...]) -> str:
        """Name it for people, with the beginnings of the digests of `parts`."""
        digests = ", ".join(f"{part} {(self.part(part) or 'none')[:SHOWN_HEX]}" for part in parts)
        commit = f"@{self.commit[:SHOWN_HEX]}" if self.commit else ""
        return f"{escape(self.name, most=120)}{commit}{f' ({digests})' if digests else ''}"


def identify_base(base: BaseModel, digest: Digest = digest_file) -> BaseIdentity:
    """Digest a base model; its large files by `digest`. Raises GuardError and OSError for files that cannot be read."""
    config = _read_object(base.path / "config.json")
    tokenizer = _read_object(base.path / _TOKENIZER_CONFIG)
    tokenizer_files = digest_files(base.path, _TOKENIZER, digest)
    settings = {key: value for key, value in (tokenizer or {}).items() if key not in _NOT_TOKENIZER}
    return BaseIdentity(
        name=base.portable_name,
        commit=base.revision,
        weights=digest_files(base.path, _WEIGHTS, digest),
        config=_digest({key: value for key, value in (config or {}).items() if key not in _NOT_CONFIG}),
        tokenizer=_digest([tokenizer_files, settings]) if tokenizer_files or tokenizer is not None else None,
        chat_template=_digest(templates) if (templates := _chat_templates(base.path, tokenizer or {})) else None,
    )


def remembered(state_dir: Path) -> Digest:
    """Return a `digest_file` that knows files again by path, size, times and inode, from earlier calls as well."""
    return DigestCache(state_dir / CACHE_NAME).digest


def recorded_base(record: Mapping[str, Any]) -> BaseIdentity | None:
    """Return the base that a version's record names; None in a record of before bases were recorded."""
    base = record.get("base")
    if not isinstance(base, Mapping) or not isinstance(base.get("name"), str):
        return None
    known = {key: base.get(key) for key in BaseIdentity.__dataclass_fields__}
    return BaseIdentity(**{key: value if isinstance(value, str) else None for key, value in known.items()})  # type: ignore[arg-type]


def changed_parts(recorded: BaseIdentity, found: BaseIdentity) -> tuple[BasePart, ...]:
    """Return the parts whose contents differ; empty for the same base, whatever it is called."""
    return tuple(part for part in BasePart if recorded.part(part) != found.part(part))


@dataclass(frozen=True, kw_only=True)
class BaseChange:
    """Why an adapter cannot be used with a base model: a sentence, and the ways out."""

    parts: tuple[BasePart, ...]
    message: str
    hint: str


def base_change(version: str, recorded: BaseIdentity, found: BaseIdentity) -> BaseChange | None:
    """Say how the base that `version` was trained on differs from the one that is there now; None when it does not."""
    parts = changed_parts(recorded, found)
    if not parts:
        return None
    if BasePart.WEIGHTS in parts or BasePart.CONFIG in parts:
        what, thing = "on another base model", "base model"
    elif BasePart.TOKENIZER in parts:
        what, thing = "with another tokenizer", "tokenizer"
    else:
        what, thing = "with another chat template", "template"
    accept = ", set allow_template_change = true under [model]" if parts == (BasePart.CHAT_TEMPLATE,) else ""
    return BaseChange(
        parts=parts,
        message=f"version {version} was trained {what}: {recorded.describe(parts)}, and now it is {found.describe(parts)}",
        hint=f'put that {thing} back{accept}, or set start_from = "base" under [training] to begin a new adapter',
    )


def expand_home(name: str) -> Path:
    """Return a path whose `~` is spelled out; as it is where nobody has that home."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def find_base(model: ModelSettings, root: Path | None = None) -> BaseModel | None:
    """Return the configured base model where it is on this machine: a folder, or a snapshot in the Hub's cache.

    None where it is not, or where that cannot be told: the trainer says why.
    """
    name, revision = model.model_name_or_path, model.revision or "main"
    if not name:
        return None
    try:
        local = expand_home(name)
        if local.is_dir():
            return BaseModel(name=name, path=local.resolve(), revision=None, root=root)
        folder = hub_folder(name)
        known = (folder / "snapshots" / revision).is_dir()
        commit = revision if known else (folder / "refs" / revision).read_text(encoding="utf-8").strip()
        path = folder / "snapshots" / commit
        return BaseModel(name=name, path=path, revision=path.name, root=root) if path.is_dir() else None
    except (OSError, ValueError, RuntimeError):  # RuntimeError: nobody has that home
        return None


@dataclass(frozen=True, kw_only=True)
class BaseProblem:
    """Why the configured base model cannot be used: a sentence, and what mends it."""

    message: str
    hint: str


def base_problem(model: ModelSettings) -> BaseProblem | None:
    """Say what keeps the configured base model from being used, as far as it shows without loading it; None when nothing does.

    One that may be fetched from the Hub is no problem yet.
    """
    name = model.model_name_or_path
    if not name:
        return BaseProblem(
            message="no base model is configured",
            hint="`dropforge config set model.model_name_or_path NAME`, a folder or what `hf download NAME` fetched",
        )
    local = expand_home(name)
    other = "`dropforge config set model.model_name_or_path NAME` names another one"
    try:
        if local.is_dir():
            return _folder_problem(local)
    except OSError as error:
        return BaseProblem(
            message=f"the base model {name} cannot be reached: {(error.strerror or str(error)).lower()}",
            hint=f"let this account read it, or {other}",
        )
    if local.is_absolute() or name.startswith((".", "~")):
        return BaseProblem(message=f"the base model {name} is not a folder", hint=f"bring it back, or {other}")
    is_offline = os.environ.get(OFFLINE_VARIABLE, "").upper() in ("1", "ON", "YES", "TRUE")
    if find_base(model) is not None or (model.allow_downloads and not is_offline):
        return None
    forbidden = f", and {OFFLINE_VARIABLE} is set" if is_offline else ""
    return BaseProblem(
        message=f"the base model {name} is neither a folder of the root nor in the local cache{forbidden}",
        hint=f"`hf download {name}` as the daemon's account fetches it, or {other}",
    )


def _folder_problem(folder: Path) -> BaseProblem | None:
    hint = "fetch the model again, or let this account read all its files"
    try:
        weights = sorted(path for path in folder.iterdir() if path.suffix == ".safetensors")
    except PermissionError:
        return BaseProblem(message=f"the base model in {folder} may not be read by this account", hint=hint)
    if not weights:
        return BaseProblem(
            message=f"the base model in {folder} has no *.safetensors weights",
            hint="pickled weights are never loaded; fetch the model again, or convert it to safetensors",
        )
    unreadable = [path.name for path in (folder / "config.json", *weights) if not _opens(path)]
    if unreadable:
        return BaseProblem(message=f"the base model in {folder} has no readable {', '.join(unreadable[:3])}", hint=hint)
    return None


def _opens(path: Path) -> bool:
    """Whether the file can be read; asked by opening it, since access(2) knows nothing of capabilities."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError:
        return False
    return True


def hub_folder(name: str) -> Path:
    """Return where the Hub's client keeps a model, whether it is there or not."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")
    return cache.expanduser() / f"models--{name.replace('/', '--')}"


def _chat_templates(folder: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """Every template by its name, as transformers finds them: a file of its own replaces the tokenizer's key."""
    found: dict[str, str] = {}
    match tokenizer_config.get("chat_template"):
        case str(text):
            found["default"] = text
        case list(entries):
            found |= {
                str(entry.get("name")): str(entry.get("template")) for entry in entries if isinstance(entry, dict)
            }
    match (_read_object(folder / "chat_template.json") or {}).get("chat_template"):
        case str(text):
            found["default"] = text
    named = [*folder.glob("chat_templates/*.jinja"), *folder.glob("additional_chat_templates/*.jinja")]
    for path in [*sorted(named), folder / "chat_template.jinja"]:
        if path.is_file():
            name = "default" if path.name == "chat_template.jinja" else path.stem
            found[name] = path.read_bytes().decode("utf-8", errors="surrogateescape")
    return found


def _read_object(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is no such file. One that is not JSON stands for its own bytes. Raises OSError."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        value = parse_json(text)
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {"not an object": blake3(text).hexdigest()}


def _digest(value: Any) -> str:
    """BLAKE3 of a JSON value in one spelling: the order of keys and white space are no difference."""
    return blake3(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
