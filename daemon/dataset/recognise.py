"""What a file really is, from its first bytes: a pure decision that names the kind and the way out.

What wraps another kind (a compression, an encoding) is opened and its inside is recognised in turn, so that a hint
never proposes what would be refused again.
"""

from __future__ import annotations

import ast
import binascii
import bz2
import csv
import io
import json
import lzma
import re
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from daemon.dataset.signatures import (
    BOM_ENCODINGS,
    DOWNLOADS,
    EXPORT,
    GZIP,
    PAGE,
    SIGNATURES,
    UNPACK,
    ZIP_CONTENTS,
    ZIP_MAGIC,
    ZSTD,
)
from daemon.dataset.source import BOM

SAMPLE_BYTES = 64 * 1024
DEEPEST = 4  # wrappers that are opened: some archives unpack to themselves
STEP_BYTES = 512  # of compressed data at once: few bytes may stand for very many
TABLE_RECORDS = 50  # of a table, that are looked at
DELIMITERS = (",", "\t", ";", "|")
CONTAINERS = ("data", "rows", "train", "examples", "items", "records", "samples", "results", "dataset", "instances")
ERROR_KEYS = frozenset({"error", "errors", "message", "msg", "detail", "code", "status", "documentation_url"})
SUBMIT_JSON = "`dropforge submit FILE.json` converts it (under a name with that ending)"
SUBMIT_TABLE = "`dropforge submit FILE{}` converts it (under a name with that ending)"
AS_TEXT = "to train each line as text: jq -cR '{text: .}' FILE > NEW.jsonl"
PER_LINE = "jq -c . FILE > NEW.jsonl"
ANEW = "write it anew with a JSON library, one object a line"
FROM_PYTHON = (
    "write rows with json.dumps, or convert them: python3 -c 'import ast, json, sys;"
    " [print(json.dumps(ast.literal_eval(line))) for line in sys.stdin]' < FILE > NEW.jsonl"
)
FROM_YAML = (
    "convert it: python3 -c 'import json, sys, yaml; [print(json.dumps(row)) for row in yaml.safe_load{}(sys.stdin)]'"
    " < FILE > NEW.jsonl"
)
_DECODER = json.JSONDecoder()
_COLUMN_NAME = re.compile(r"\S(?:.{0,58}\S)?")
_YAML_LINE = re.compile(r"\s*(?:- .*|-|[\w\"'.-]+:(?: .*)?|#.*|---.*|\.\.\.)|\s+\S.*")
_YAML_KEY = re.compile(r"(?:- )?[\w\"'.-]+:(?: |$)")
_CODE = re.compile(
    r"(?:export |module\.exports|const |var |let |import |from \w+ import|def |class |#!|[\w$.]+\(\s*[\[{]|[\w$.]+ ?= ?[\[{])"
)
_SQL = re.compile(r"(?:INSERT INTO|CREATE TABLE|BEGIN TRANSACTION|PRAGMA |SET |DROP TABLE|-- \w+)", re.IGNORECASE)
_STORAGE_ERROR = re.compile(r"<Code>(\w{1,60})</Code>")
_CONTROL = bytes(byte for byte in range(32) if byte not in b"\t\n\r\f\x08\x1b\x1e")
_UTF_16_LINE = re.compile(rb"(?:[\x20-\x7e]\0){8}|(?:\0[\x20-\x7e]){8}")
_BASE64 = re.compile(rb"[A-Za-z0-9+/]{16}[A-Za-z0-9+/\r\n]*={0,2}\s*")
_UNDEFINED_1252 = re.compile(rb"[\x81\x8d\x8f\x90\x9d]")


@dataclass(frozen=True, kw_only=True)
class Recognised:
    """A file that does not hold a JSON object a line. `what` completes "it is ...", `hint` says what to do."""

    what: str
    hint: str
    certain: bool = True  # False: its later lines may be rows; told only when the file is refused
    first_row: Mapping[str, Any] | None = None  # what the hint makes the first row of, where it can be seen
    converts: str = ""  # the suffix under which `dropforge submit` makes rows of it

    @property
    def reason(self) -> str:
        """One clause."""
        return f"it is {self.what}"


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
        or _text(sample, whole)
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


# -- kinds of text


def _text(sample: bytes, whole: bool) -> Recognised | None:
    text = sample.removeprefix(BOM).decode("utf-8", "replace").lstrip("\ufeff \t\r\n")
    if not text:
        return None
    start = text[:400].lower()
    for beginning, what, hint in DOWNLOADS:
        if start.startswith(beginning):
            return Recognised(what=what, hint=hint, certain=whole)
    if text.startswith("<") and (markup := _markup(text, start)) is not None:
        return markup
    if "\n" not in text and re.search(r"[\]}][ \t]*\r[\r \t]*[\[{]", text):
        return Recognised(
            what="one line: its lines end in CR, as on old Macs", hint="convert it: tr '\\r' '\\n' < FILE > NEW.jsonl"
        )
    if text.startswith("{"):
        return _object(text, whole)
    if re.match(r"\[\[?[\w .-]+\]\]?[ \t]*\r?\n[\w#;-]", text):
        return Recognised(what="TOML or an INI file", hint=EXPORT)
    is_array = text.startswith("[") and not re.match(r"\[[^\]{\"\[]*\] *[^\s\]]", text)  # [INFO] begins a log's line
    return _array(text, whole) if is_array else _other_text(text, whole)


def _markup(text: str, start: str) -> Recognised | None:
    if code := _STORAGE_ERROR.search(text):
        return Recognised(
            what=f"an error that a download left ({code.group(1)})",
            hint="the link has expired or is not public: get a new one, then download it again",
        )
    if re.match(r"<!doctype html|<html|<head|<body|<script|<meta|<!--", start) or "<html" in start:
        return Recognised(what="an HTML page", hint=PAGE)
    return Recognised(what="XML", hint=EXPORT) if re.match(r"<\?xml|<\w+[^>|]*>\s*<", start) else None


def _array(text: str, whole: bool) -> Recognised | None:
    """`text` begins with a bracket."""
    array, end = _decode(text)
    rest = text[end:].strip() if array is not None else ""
    if array is not None and rest:
        if not rest.startswith("["):
            return None  # one odd line before others
        return _of_values(array, "an array on each line, not an object", ".", certain=False)
    if array is None and whole:
        if re.match(r"\[\s*(?:\{\s*)?[bu]?'", text) and _python(text):
            return Recognised(what="one Python list, not JSON", hint=ANEW)
        place = _place_of_fault(text)
        return Recognised(what=f"one JSON array, and not a sound one ({place})", hint=ANEW)
    elements = array if array is not None else [_decode(text[1:].lstrip())[0]]
    if elements and _is_turn(elements[0]):
        return _of_values(elements, "one conversation, not one JSON object a line", ".")
    if array is None and elements == [None] and re.match(r"\[\s*\{", text):
        elements = [{}]  # an object that is longer than the sample
    if not elements:
        return Recognised(what="an empty JSON array", hint=EXPORT)
    return _of_values(elements[0], "one JSON array, not one object a line", ".[]")


def _of_values(value: Any, what: str, path: str, *, certain: bool = True) -> Recognised:
    """What to do with an array's element, or with a line that is one, at the jq `path`."""
    head = value[0] if isinstance(value, list) and value else None
    if isinstance(value, dict):
        hint = f"{SUBMIT_JSON}, or: jq -c '{path}' FILE > NEW.jsonl"
        return Recognised(what=what, hint=hint, first_row=value or None, certain=certain, converts=".json")
    pipe = "" if path == "." else f"{path} | "
    if _is_turn(head):
        key = "messages" if "role" in value[0] else "conversations"
        return Recognised(
            what=what, hint=f"jq -c '{pipe}{{{key}: .}}' FILE > NEW.jsonl", first_row={key: value}, certain=certain
        )
    if isinstance(value, str) and isinstance(inner := _decode(value)[0], dict):
        what = f"{what}, and the objects are encoded as strings"
        hint = f"jq -c '{pipe}fromjson' FILE > NEW.jsonl"
        return Recognised(what=what, hint=hint, first_row=inner, certain=certain)
    if isinstance(value, str):
        return Recognised(
            what=what, hint=f"jq -c '{pipe}{{text: .}}' FILE > NEW.jsonl", first_row={"text": value}, certain=certain
        )
    return Recognised(what=what, hint="write each row as a JSON object on a line of its own", certain=certain)


def _is_turn(value: Any) -> bool:
    return isinstance(value, dict) and (("role" in value and "content" in value) or {"from", "value"} <= value.keys())


def _object(text: str, whole: bool) -> Recognised | None:
    """`text` begins with a brace."""
    line, _, later = text.partition("\n")
    value, end = _decode(text)
    if value is None:
        return _no_object(text, line, whole)
    rest = text[end:].lstrip(" \t\r")
    if rest.startswith(",") and ("\n" in text[:end] or rest[1:].lstrip(" \t").startswith("{")):
        hint = "put brackets around it, [ and ], and `dropforge submit FILE.json` (under a name with that ending)"
        what = "JSON objects with commas between them, not one object a line"
        return Recognised(what=what, hint=hint, first_row=value, certain="\n" in text[:end])
    if "\n" in text[:end]:
        held = _container(value) if whole and not rest.strip() else None
        what = "JSON that spans lines; one object a line is needed"
        return held or Recognised(what=what, hint=f"convert it: {PER_LINE}", first_row=value, converts=".json")
    if rest.startswith("{"):
        what = "JSON with several objects a line; one object a line is needed"
        return Recognised(what=what, hint=f"convert it: {PER_LINE}", first_row=value, certain=False, converts=".json")
    if rest.startswith(",") and (not rest[1:].strip() or rest[1:].lstrip(" \t\r").startswith("\n")):
        hint = "take the commas away: sed 's/,[[:space:]]*$//' FILE > NEW.jsonl"
        return Recognised(what="JSON with a comma after each line", hint=hint, first_row=value, certain=False)
    if whole and not later.strip() and not rest.strip() and (held := _container(value)) is not None:
        return replace(held, certain=False)
    return None


def _no_object(text: str, line: str, whole: bool) -> Recognised | None:
    """The first value that `text` begins is not sound, or not within the sample."""
    if re.match(r"\{\s*[bu]?'", line) or (re.search(r": ?(?:None|True|False)\b", line) and _python(line)):
        hint = FROM_PYTHON if _python(line) else "write rows with json.dumps"
        return Recognised(what="Python's way of writing objects, not JSON", hint=hint, certain=False)
    if re.match(r"\{\s*[“”„«]", line):
        hint = "replace them: sed 's/[“”„]/\"/g' FILE > NEW.jsonl (look whether texts have them too)"
        return Recognised(what="JSON with typographic quotation marks", hint=hint, certain=False)
    if re.match(r"\{\s*[A-Za-z_$][\w$]*\s*:", line):
        return Recognised(what="JavaScript objects, not JSON: keys need quotation marks", hint=ANEW, certain=False)
    held = re.match(r'\{\s*"([^"]{1,60})"\s*:\s*\[\s*\{', text)
    if held and not whole and held.group(1) in CONTAINERS:
        first, _ = _decode(text[held.end() - 1 :])
        return replace(_listed(held.group(1), first), certain=False)
    if re.match(r'\{\s*"[^"]{1,60}"\s*:\s*\{\s*"0"\s*:', text):
        return _table_object()
    position = _fault(text)
    if position is None or position <= len(line):
        return None  # the fault is in the first line: it is told with its column
    if whole:
        return Recognised(what=f"JSON that spans lines, and not sound ({_place_of_fault(text)})", hint=ANEW)
    return Recognised(
        what="JSON that spans lines; one object a line is needed", hint=f"convert it: {PER_LINE}", converts=".json"
    )


def _container(value: Mapping[str, Any]) -> Recognised | None:
    """A whole file that is one object: what holds the rows in it, when that can be seen."""
    if value.keys() <= ERROR_KEYS and value:
        told = next((item for item in value.values() if isinstance(item, str)), "")
        return Recognised(
            what=f"an error that a download left ({told[:80]!s})" if told else "an error that a download left",
            hint=PAGE,
        )
    if {"cells", "nbformat"} <= value.keys():
        return Recognised(what="a Jupyter notebook", hint=EXPORT)
    lists = {key: item for key, item in value.items() if isinstance(item, list) and item and isinstance(item[0], dict)}
    known = [key for key in lists if key in CONTAINERS]
    if known:
        return _listed(known[0], lists[known[0]][0])
    items = list(value.values())
    if items and all(isinstance(item, dict) and "0" in item for item in items):
        return _table_object()
    if items and all(isinstance(item, list) and item and not isinstance(item[0], dict | list) for item in items):
        hint = "convert it: datasets.Dataset.from_dict(json.load(open(FILE))).to_json(NEW)"
        return Recognised(what="one JSON object of columns, not one object a row", hint=hint)
    if len(items) > 1 and all(isinstance(item, dict) and item.keys() == items[0].keys() for item in items):
        what = "one JSON object that holds all rows, not one object a line"
        return Recognised(what=what, hint="convert it: jq -c '.[]' FILE > NEW.jsonl", first_row=items[0])
    return None


def _listed(key: str, first: Any) -> Recognised:
    inner = ".row" if isinstance(first, dict) and isinstance(first.get("row"), dict) else ""
    return Recognised(
        what=f'one JSON object with all rows under "{key}", not one object a line',
        hint=f"convert it: jq -c '.{key}[]{inner}' FILE > NEW.jsonl",
        first_row=(first["row"] if inner else first) if isinstance(first, dict) else None,
    )


def _table_object() -> Recognised:
    hint = "write it with DataFrame.to_json(NEW, orient='records', lines=True)"
    return Recognised(what="one JSON object of columns, as pandas writes a table", hint=hint)


def _other_text(text: str, whole: bool) -> Recognised | None:
    """`text` begins with neither bracket nor brace nor a tag."""
    lines = [line for line in text.split("\n") if line.strip(" \t\r")]
    lines = lines if whole or len(lines) == 1 else lines[:-1]
    first = lines[0]
    if first.startswith("\x1e"):
        return Recognised(
            what="a JSON text sequence, with a separator before each object",
            hint="take them away: tr -d '\\036' < FILE > NEW.jsonl",
        )
    if re.match(r"data: ?[\[{]", first):
        hint = "keep what is sent: sed -n 's/^data: *//p' FILE > NEW.jsonl"
        return Recognised(what="a stream of server-sent events", hint=hint, certain=False)
    if first.startswith("```"):
        return Recognised(what="Markdown", hint="keep only the lines between its ``` marks")
    values = [_decode(line) for line in lines[:TABLE_RECORDS]]
    if all(end and not line[end:].strip() for line, (_, end) in zip(lines, values, strict=False)):
        kind = "string" if isinstance(values[0][0], str) else "value"
        return _of_values(values[0][0], f"a JSON {kind} on each line, not an object", ".", certain=False)
    if _SQL.match(first):
        return Recognised(what="an SQL script", hint=EXPORT, certain=False)
    if _CODE.match(first):
        return Recognised(what="program text, not JSON", hint=ANEW, certain=False)
    if (table := _table(text, whole)) is not None:
        return table
    if any(line.lstrip().startswith("{") for line in lines):
        return None  # rows come later: what is before them is told line by line
    if first.startswith(("//", "/*")):
        return Recognised(what="JSON with comments, or program text", hint=ANEW, certain=False)
    if _is_yaml(lines):
        first = next((line for line in lines if not line.startswith(("#", "---"))), "")
        return Recognised(what="YAML", hint=FROM_YAML.format("" if first.startswith("-") else "_all"), certain=False)
    return Recognised(what="plain text, not JSON", hint=AS_TEXT, certain=False)


def _is_yaml(lines: Sequence[str]) -> bool:
    """A list, or keys of which none comes twice in one document: a transcript's speakers do."""
    keys = [line.partition(":")[0] for line in lines if _YAML_KEY.match(line)]
    if not keys or not all(_YAML_LINE.fullmatch(line) for line in lines):
        return False
    return lines[0].startswith(("- ", "---", "%YAML")) or len(set(keys)) == len(keys)


def _table(text: str, whole: bool) -> Recognised | None:
    """CSV or its like: a header of names, and records with as many fields."""
    for delimiter in DELIMITERS:
        records = _records(text, delimiter, whole)
        if len(records) > 1 and _is_header(records[0]) and {len(record) for record in records} == {len(records[0])}:
            kind, ending = ("TSV", ".tsv") if delimiter == "\t" else ("CSV", ".csv")
            return Recognised(
                what=f"a table ({kind}), not JSON",
                hint=SUBMIT_TABLE.format(ending),
                certain=False,
                first_row=dict(zip(records[0], records[1], strict=True)),
                converts=ending,
            )
    return None


def table_delimiter(text: str, *, whole: bool) -> str:
    """What separates the fields of a table: the one that gives every record as many fields, and the most of them."""
    widths = {delimiter: {len(record) for record in _records(text, delimiter, whole)} for delimiter in DELIMITERS}
    fields = {delimiter: max(found) for delimiter, found in widths.items() if len(found) == 1 and max(found) > 1}
    return max(fields, key=lambda delimiter: fields[delimiter], default=",")


def _records(text: str, delimiter: str, whole: bool) -> list[list[str]]:
    """The first records, without the one that the sample cuts; none when quotation marks stand where none can be."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        records = [record for record in islice(reader, TABLE_RECORDS) if record]
    except csv.Error:
        return []
    return records if whole or len(records) >= TABLE_RECORDS else records[:-1]


def _is_header(names: Sequence[str]) -> bool:
    named = [name for name in names if name]
    return len(names) > 1 and len(set(named)) == len(named) and all(_COLUMN_NAME.fullmatch(name) for name in named)


# -- JSON and Python, leniently


def _decode(text: str) -> tuple[Any, int]:
    """The first JSON value in `text` and where it ends; None and 0 when there is none that is whole."""
    try:
        value, end = _DECODER.raw_decode(text)
    except (ValueError, RecursionError):
        return None, 0
    return value, end


def _fault(text: str) -> int | None:
    try:
        _DECODER.raw_decode(text)
    except json.JSONDecodeError as error:
        return error.pos
    except (ValueError, RecursionError):
        return None
    return None


def _place_of_fault(text: str) -> str:
    position = _fault(text) or 0
    line, column = text.count("\n", 0, position) + 1, position - text.rfind("\n", 0, position)
    return f"see line {line}, column {column}"


def _python(text: str) -> bool:
    """Whether it is a literal of Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes, which are none of our business
            ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False
    return True
