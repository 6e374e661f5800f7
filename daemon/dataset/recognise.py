"""What a file really is, from its first bytes: a pure decision that names the kind and the way out.

What wraps another kind (a compression, an encoding) is opened and its inside is recognised in turn, so that a hint
never proposes what would be refused again.
"""

from __future__ import annotations

import binascii
import bz2
import lzma
import re
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from daemon.dataset.recognise_text import recognise_text
from daemon.dataset.signatures import (
    BOM_ENCODINGS,
    GZIP,
    SIGNATURES,
    UNPACK,
    ZIP_CONTENTS,
    ZIP_MAGIC,
    ZSTD,
    Recognised,
)
from daemon.dataset.source import BOM

SAMPLE_BYTES = 64 * 1024
DEEPEST = 4  # wrappers that are opened: some archives unpack to themselves
STEP_BYTES = 512  # of compressed data at once: few bytes may stand for very many
_CONTROL = bytes(byte for byte in range(32) if byte not in b"\t\n\r\f\x08\x1b\x1e")
_UTF_16_LINE = re.compile(rb"(?:[\x20-\x7e]\0){8}|(?:\0[\x20-\x7e]){8}")
_BASE64 = re.compile(rb"[A-Za-z0-9+/]{16}[A-Za-z0-9+/\r\n]*={0,2}\s*")
_UNDEFINED_1252 = re.compile(rb"[\x81\x8d\x8f\x90\x9d]")


def recognise(sample: bytes, *, whole: bool, depth: int = 0) -> Recognised | None:
    """What the file is that begins with `sample`; None when it begins as rows do, or holds nothing.

    `whole`: nothing follows the sample. `depth`: wrappers opened so far.
    """
    if depth > DEEPEST:
        return None
    if not sample.strip():
        return _nothing(sample) if whole else None
    return (
        _compressed(sample, whole, depth)
        or _zip(sample)
        or next((Recognised(what=known.what, hint=known.hint) for known in SIGNATURES if known.matches(sample)), None)
        or _safetensors(sample)
        or _base64(sample, whole, depth)
        or _zeros(sample)
        or _encoded(sample, whole, depth)
        or _binary(sample)
        or _eight_bit(sample, whole, depth)
        or recognise_text(sample, whole=whole)
    )


def _nothing(sample: bytes) -> Recognised:
    what = "nothing but white space: it holds no rows" if sample else "empty: it holds no rows"
    return Recognised(what=what, hint="write one JSON object a line into it, and drop it again")


def recognise_misnamed(raw: bytes, *, compression: str, whole: bool) -> Recognised | None:
    """What a file is whose name claims a compression (`gz`, `zst`) that its bytes do not have."""
    if raw.startswith(GZIP if compression == "gz" else ZSTD):
        return None
    found = recognise(raw, whole=whole)
    if found is None or not found.certain:
        what = f"not compressed, though its name ends in .{compression}"
        return Recognised(what=what, hint=f"rename it without .{compression}")
    return replace(found, what=f"{found.what}, though its name ends in .{compression}")


# -- wrappers: their inside decides what to do


def _wrapped(what: str, inside: bytes, *, first: str, hint: str, whole: bool, depth: int) -> Recognised:
    """`hint` when rows are inside, else `first` and then what the inside needs."""
    found = recognise(inside, whole=whole, depth=depth + 1) if inside else None  # damage leaves nothing to see
    if found is None:
        return Recognised(what=what, hint=hint)
    what = f"{what}, and what is inside is {found.what}"
    return Recognised(what=what, hint=f"{first}; then {found.hint}", first_row=found.first_row)


def _compressed(sample: bytes, whole: bool, depth: int) -> Recognised | None:
    decompress: Callable[[bytes], bytes]
    if sample.startswith(GZIP):
        inflater = zlib.decompressobj(wbits=31)
        decompress, what = lambda data: inflater.decompress(data, SAMPLE_BYTES), "gzip data"
        first, hint = "decompress it (gunzip)", "rename it so that it ends in .jsonl.gz"
    elif sample.startswith(ZSTD):
        import zstandard

        decompress, what = zstandard.ZstdDecompressor().decompressobj().decompress, "zstd data"
        first, hint = "decompress it (unzstd)", "rename it so that it ends in .jsonl.zst"
    elif sample.startswith(b"BZh") and sample[3:4].isdigit():
        bunzip = bz2.BZ2Decompressor()
        decompress, what = lambda data: bunzip.decompress(data, SAMPLE_BYTES), "bzip2 data"
        first, hint = "decompress it (bunzip2)", "decompress it: bzip2 -dc FILE > NEW.jsonl"
    elif sample.startswith((b"\xfd7zXZ", b"\x5d\0\0")):
        unxz = lzma.LZMADecompressor()
        decompress, what = lambda data: unxz.decompress(data, SAMPLE_BYTES), "xz data"
        first, hint = "decompress it (unxz)", "decompress it: xz -dc FILE > NEW.jsonl"
    elif len(sample) > 2 and sample[0] == 0x78 and sample[1] in b"\x01\x5e\x9c\xda":
        return Recognised(
            what="zlib data, which is not gzip", hint="compress its text with gzip or zstd, or not at all"
        )
    else:
        return None
    inside = _first_bytes(sample, decompress)
    return _wrapped(what, inside, first=first, hint=hint, whole=whole and len(inside) < SAMPLE_BYTES, depth=depth)


def _base64(sample: bytes, whole: bool, depth: int) -> Recognised | None:
    """Text of letters and digits only is taken for base64 where something known is inside."""
    if not _BASE64.fullmatch(sample):
        return None
    letters = b"".join(sample.split())
    inside = binascii.a2b_base64(letters[: len(letters) // 4 * 4])
    if not inside.startswith((b"{", b"[", GZIP, *ZSTD, *ZIP_MAGIC)):
        return None
    hint = "decode it: base64 -d FILE > NEW.jsonl"
    return _wrapped("base64 text", inside, first="decode it (base64 -d)", hint=hint, whole=whole, depth=depth)


def _first_bytes(sample: bytes, decompress: Callable[[bytes], bytes]) -> bytes:
    """What is inside, as far as it is sound and wanted."""
    inside = b""
    with suppress(Exception):  # damage: every library has its own errors, and what came before is what counts
        for start in range(0, len(sample), STEP_BYTES):
            inside += decompress(sample[start : start + STEP_BYTES])
            if len(inside) >= SAMPLE_BYTES:
                break
    return inside[:SAMPLE_BYTES]


def _encoded(sample: bytes, whole: bool, depth: int) -> Recognised | None:
    """UTF-16 and UTF-32, with a byte order mark or by where the zero bytes stand; UTF-7 with its mark."""
    encoding = marked_encoding(sample)
    if encoding is None:
        return None
    text = sample.decode(encoding, "ignore").removeprefix("\ufeff")
    return _wrapped(
        f"{encoding.upper()} text, not UTF-8",
        text.encode("utf-8", "ignore"),
        first=f"convert it to UTF-8 (iconv -f {encoding.upper()} -t UTF-8)",
        hint=f"convert it: iconv -f {encoding.upper()} -t UTF-8 FILE > NEW.jsonl",
        whole=whole,
        depth=depth,
    )


def marked_encoding(sample: bytes) -> str | None:
    """The encoding other than UTF-8 that a text shows by a byte order mark, or by where its zero bytes stand."""
    marked = next((name for mark, name in BOM_ENCODINGS if sample.startswith(mark)), None)
    return marked or _encoding_by_zeros(sample)


def _encoding_by_zeros(sample: bytes) -> str | None:
    zeros = "".join("0" if byte == 0 else "x" for byte in sample[:4])
    encoding = {"x000": "utf-32le", "000x": "utf-32be"}.get(zeros) or {"x0": "utf-16le", "0x": "utf-16be"}.get(
        zeros[:2]
    )
    if encoding is None:
        return None
    text = sample[:400].decode(encoding, "ignore")
    return encoding if text and all(char.isprintable() or char.isspace() for char in text) else None


def _eight_bit(sample: bytes, whole: bool, depth: int) -> Recognised | None:
    """Text whose letters beyond ASCII are not UTF-8. Damage to single bytes of UTF-8 text is not meant."""
    with suppress(UnicodeDecodeError):
        sample.decode("utf-8")
        return None
    odd = sample.decode("utf-8", "surrogateescape")
    if not whole:
        odd = odd[:-4]  # a character may be cut in two
    lines = [line for line in odd.split("\n") if not line.isascii()]
    beyond = [char for line in lines for char in line if ord(char) > 127]
    bad = sum(_is_odd(char) for char in beyond)
    # Pairs of odd bytes look like UTF-8 by chance, now and then; a whole line of text does not.
    if bad < len(beyond) - bad or not all(any(map(_is_odd, line)) for line in lines):
        return None
    western = re.findall(rb"[A-Za-z \"'][\x80-\xff]{1,2}(?=[A-Za-z \"'.,;:!?)-])", sample)
    if 2 * len(western) < bad or _UNDEFINED_1252.search(sample):
        return Recognised(
            what="text in an encoding other than UTF-8",
            hint="find out which (file -i FILE guesses), then convert it: iconv -f ENCODING -t UTF-8 FILE > NEW.jsonl",
            certain=False,
        )
    found = _wrapped(
        "text in an encoding other than UTF-8, probably Windows-1252 (Latin-1)",
        sample.decode("cp1252").encode(),
        first="convert it to UTF-8 (iconv -f WINDOWS-1252 -t UTF-8)",
        hint="convert it: iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW.jsonl",
        whole=whole,
        depth=depth,
    )
    return replace(found, certain=False)


def _is_odd(char: str) -> bool:
    """Whether it stands for a byte that is not UTF-8."""
    return "\udc80" <= char <= "\udcff"


# -- kinds that are not text


def _zip(sample: bytes) -> Recognised | None:
    if not sample.startswith(ZIP_MAGIC):
        return None
    found = next(((what, hint) for mark, what, hint in ZIP_CONTENTS if mark in sample), ("a ZIP archive", UNPACK))
    return Recognised(what=found[0], hint=found[1])


def _safetensors(sample: bytes) -> Recognised | None:
    header = int.from_bytes(sample[:8], "little")
    if sample[8:10] == b'{"' and 2 <= header < 2**32:
        return Recognised(what="model weights (safetensors)", hint="drop the .jsonl file itself")
    return None


def _zeros(sample: bytes) -> Recognised | None:
    """What a copy leaves that set the size first, and a file system after a power cut."""
    if _UTF_16_LINE.search(sample) and sample.lstrip().startswith((b"{", BOM)) and sample[1:2] != b"\0":
        return Recognised(
            what="text in UTF-8 that goes over into UTF-16 (as PowerShell's >> appends)",
            hint="write all of it in UTF-8",
        )
    text = sample.rstrip(b"\0")
    if len(sample) - len(text) <= len(sample) // 2 or b"\0" in text:
        return None
    what = "text that goes over into zero bytes" if text else "nothing but zero bytes"
    return Recognised(what=what, hint="its copy or download never ended: copy it again")


def _binary(sample: bytes) -> Recognised | None:
    """Noise: too many bytes that no text has."""
    share = 1 - len(sample.translate(None, _CONTROL)) / len(sample)
    if share <= (0.1 if sample.lstrip().startswith(b"{") else 0.02):
        return None
    return Recognised(
        what="binary data of an unknown kind", hint="drop a text file in UTF-8 with one JSON object a line"
    )
