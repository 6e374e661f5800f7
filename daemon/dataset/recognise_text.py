"""What a text is that does not hold a JSON object a line: JSON in other layouts, tables, pages, other notations."""

from __future__ import annotations

import ast
import csv
import io
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from daemon.dataset.signatures import DOWNLOADS, EXPORT, PAGE, Recognised
from daemon.dataset.source import BOM

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


def recognise_text(sample: bytes, *, whole: bool) -> Recognised | None:
    """What a text in UTF-8 is that begins with `sample`; None when it begins as rows do."""
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
