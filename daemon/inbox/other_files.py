"""Files that are not taken under their names: why, and what their owner can do."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from daemon.dataset.convert import conversion_of
from daemon.dataset.recognise import SAMPLE_BYTES, recognise
from daemon.inbox.layout import ROW_SUFFIXES, NameKind, name_kind
from daemon.text import escape

UNFINISHED = (
    "an unfinished file, by its name, that has not changed for long: if its writer is gone, rename it so that it ends in"
    " .jsonl, or delete it"
)
TAKEN = "the daemon takes *.jsonl and *.ndjson, plain or with .gz or .zst"
RENAME = "rename it so that it ends in .jsonl"
_ROWS = r"\.(?:jsonl|ndjson)"
_FURTHER_COPY = re.compile(rf".+{_ROWS}(?:\.gz|\.zst)?(?: ?\(\d+\)|\.\d+|[ ._-]copy(?: \d+)?)")  # as browsers name them
_PACKED = re.compile(r"\.(?:bz2|xz|lzma|lz4|br|7z|rar|tar|tgz|zip|z|tar\.\w+)$")
_LIKE_ROWS = re.compile(rf"(?:\.jsonlines|\.ldjson|\.jl|\.jsonls|{_ROWS}\.\w{{1,8}})(?:\.gz|\.zst)?$")
_SHEET = re.compile(r"\.(?:xlsx?|xlsm|xlsb|ods|numbers)$")


def names_unfinished_dataset(name: str) -> bool:
    """Whether a temporary name seems to be that of a dataset on its way, or of what `submit` left when it was killed."""
    if name_kind(name) is not NameKind.UNFINISHED:
        return False
    return name.startswith(".submit-") or any(suffix in name.lower() for suffix in ROW_SUFFIXES)


@dataclass(frozen=True, kw_only=True)
class OtherName:
    """Why a name is not taken. `meant`: it seems to be a dataset all the same."""

    reason: str
    meant: bool


def explain_other_name(name: str) -> OtherName:
    """Say why a file of this name is left alone, by the name only."""
    lower = name.lower()
    if (suffix := conversion_of(name)) is not None:
        return OtherName(reason=f"a {suffix} file: `dropforge submit FILE` converts and drops it", meant=True)
    if _FURTHER_COPY.fullmatch(lower):
        return OtherName(reason=f"a further copy, by its name: {RENAME}", meant=True)
    if _PACKED.search(lower):
        return OtherName(reason="an archive or another compression: unpack it, or use gzip or zstd instead", meant=True)
    if _LIKE_ROWS.search(lower):
        return OtherName(reason=f"perhaps JSON lines: {RENAME}", meant=True)
    if _SHEET.search(lower):
        return OtherName(reason="a spreadsheet: save it as CSV (UTF-8), then `dropforge submit FILE.csv`", meant=True)
    return OtherName(reason="not a .jsonl or .ndjson file", meant=False)


def explain_other_file(path: Path) -> tuple[str, str]:
    """Say why a file that exists is not taken under its name, and what to do by its first bytes. Raises OSError."""
    kind = name_kind(path.name)
    if kind is NameKind.UNFINISHED:
        return "its name is that of an unfinished file (it begins with a dot or ends as temporary files do)", RENAME
    if kind is NameKind.SIDECAR:
        return "it is a sidecar, not a dataset", "lay it beside its dataset, under the same name"
    if (suffix := conversion_of(path.name)) is not None:
        return f"it is a {suffix} file; {TAKEN}", f"`dropforge submit {escape(str(path))}` converts and drops it"
    with path.open("rb") as opened:
        sample = opened.read(SAMPLE_BYTES + 1)
    found = recognise(sample[:SAMPLE_BYTES], whole=len(sample) <= SAMPLE_BYTES)
    if found is None:
        return f"its name does not say that it is a dataset; {TAKEN}", RENAME
    return f"{found.reason}, and its name does not say that it is a dataset; {TAKEN}", found.hint
