"""Every kind of file that is dropped under a wrong name is told as what it is, with what to do."""

from __future__ import annotations

import base64
import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import sqlite3
import subprocess
import tarfile
import zipfile
import zlib
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.dataset.recognise import SAMPLE_BYTES, recognise
from daemon.dataset.rows import Rules
from daemon.dataset.validate import RejectedDataset, scan_dataset
from tests.support.root import Root

ROW = '{"text": "a row"}\n'
ROWS = ROW * 3
OBJECTS = [{"text": "a row"}, {"text": "another"}]
ARRAY = json.dumps(OBJECTS)
PRETTY = json.dumps(OBJECTS[0], indent=2) + "\n"
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
CAFE = '{"text": "un café, déjà vu, mañana"}\n'


def zipped(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, "content")
    return buffer.getvalue()


def tarred(content: bytes = ROWS.encode()) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo("x.jsonl")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def database() -> bytes:
    with sqlite3.connect(":memory:") as connection:
        connection.execute("CREATE TABLE rows (text)")
        return connection.serialize()


SPREADSHEET = b"PK\x03\x04" + b"\0" * 26 + b"mimetypeapplication/vnd.oasis.opendocument.spreadsheetPK"

# content, what is said of it, what is said to do
KINDS = {
    # archives and compressed files
    "zip": (zipped("x.jsonl"), "a ZIP archive", "unpack it"),
    "empty_zip": (zipped(), "a ZIP archive", "unpack it"),
    "xlsx": (zipped("[Content_Types].xml", "xl/workbook.xml"), "an Excel workbook", "submit FILE.csv"),
    "ods": (SPREADSHEET, "a LibreOffice spreadsheet", "submit FILE.csv"),
    "docx": (zipped("[Content_Types].xml", "word/document.xml"), "a Word document", "drop the .jsonl file itself"),
    "torch": (zipped("archive/data.pkl"), "a PyTorch file", "drop the .jsonl file itself"),
    "npz": (zipped("ids.npy"), "a NumPy archive", "drop text"),
    "xls": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(500), "an old Microsoft Office file", "submit FILE.csv"),
    "tar": (tarred(), "a tar archive", "unpack it"),
    "7z": (b"7z\xbc\xaf\x27\x1c\0\x04rest", "a 7z archive", "unpack it"),
    "rar": (b"Rar!\x1a\x07\x01\0rest", "a RAR archive", "unpack it"),
    "xz": (lzma.compress(ROWS.encode()), "xz data", "xz -dc FILE"),
    "lzma": (lzma.compress(ROWS.encode(), format=lzma.FORMAT_ALONE), "xz data", "xz -dc FILE"),
    "bz2": (bz2.compress(ROWS.encode()), "bzip2 data", "bzip2 -dc FILE"),
    "lz4": (b"\x04\x22\x4d\x18\x64\x40\xa7rest", "LZ4 data", "lz4 -dc FILE"),
    "gzip": (gzip.compress(ROWS.encode()), "gzip data", "rename it so that it ends in .jsonl.gz"),
    "zstd": (zstandard.ZstdCompressor().compress(ROWS.encode()), "zstd data", "rename it so that it ends in .jsonl.zst"),
    "zlib": (zlib.compress(ROWS.encode() * 9), "zlib data", "gzip"),
    "tar_gz": (gzip.compress(tarred()), "gzip data, and what is inside is a tar archive", "gunzip); then unpack it"),
    "gzip_twice": (gzip.compress(gzip.compress(ROWS.encode())), "inside is gzip data", "gunzip); then rename it"),
    "array_in_xz": (lzma.compress(ARRAY.encode()), "inside is one JSON array", "unxz); then `dropforge submit FILE.json`"),
    # tables and databases
    "parquet": (b"PAR1\x15\x04\x15\x10restPAR1", "a Parquet file", "submit FILE.parquet"),
    "arrow": (b"ARROW1\0\0\xff\xff\xff\xff", "an Arrow (Feather) file", "read_feather"),
    "arrow_stream": (b"\xff\xff\xff\xff\x10\x01\0\0rest", "an Arrow stream", "Dataset.from_file"),
    "feather": (b"FEA1rest", "a Feather file", "read_feather"),
    "avro": (b"Obj\x01\x04\x14avro.codec", "an Avro file", "export its rows"),
    "sqlite": (database(), "an SQLite database", "sqlite3 -json FILE"),
    "hdf5": (b"\x89HDF\r\n\x1a\n\0", "an HDF5 file", "export its rows"),
    "numpy": (b"\x93NUMPY\x01\0v\0{'descr'", "a NumPy array", "drop text"),
    "csv": ("prompt,completion\na,b\nc,d\n", "a table (CSV)", "submit FILE.csv"),
    "csv_quoted": ('prompt,completion\n"a, b","two\nlines"\n"c",d\n', "a table (CSV)", "submit FILE.csv"),
    "csv_semicolons": ("prompt;completion\na;b\n", "a table (CSV)", "submit FILE.csv"),
    "csv_of_pandas": (",prompt,completion\n0,a,b\n", "a table (CSV)", "submit FILE.csv"),
    "csv_odd_names": ("What is asked?,Answer (short)\na,b\nc,d\n", "a table (CSV)", "[data.columns]"),
    "tsv": ("prompt\tcompletion\na\tb\n", "a table (TSV)", "submit FILE.tsv"),
    "csv_unknown_columns": ("question,answer\na,b\n", "a table (CSV)", 'prompt = "question", completion = "answer"'),
    # documents, models, programs, media
    "pdf": (b"%PDF-1.7\n%\xe2\xe3", "a PDF document", "drop the .jsonl file itself"),
    "rtf": (b"{\\rtf1\\ansi hello}", "an RTF document", "plain text"),
    "png": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "a PNG picture", "drop the .jsonl file itself"),
    "gguf": (b"GGUF\x03\0\0\0", "model weights (GGUF)", "drop the .jsonl file itself"),
    "safetensors": (b"\x20\0\0\0\0\0\0\0" + b'{"__metadata__":{}}', "model weights (safetensors)", "drop the .jsonl"),
    "elf": (b"\x7fELF\x02\x01\x01", "a program", "drop the .jsonl file itself"),
    "pgp": ("-----BEGIN PGP MESSAGE-----\n\nhQEM\n", "an encrypted or signed message", "decrypt it"),
    # what a download leaves
    "html": ("<!DOCTYPE html>\n<html><body>Sign in</body></html>", "an HTML page", "download the file again"),
    "html_after_space": ("\n\n  <html lang=en><head>", "an HTML page", "download the file again"),
    "s3_error": ('<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code></Error>', "(AccessDenied)", "expired"),
    "xml": ('<?xml version="1.0"?>\n<rows><row/></rows>', "XML", "export its rows"),
    "lfs": ("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n", "a Git LFS pointer", "git lfs pull"),
    "annex": ("/annex/objects/MD5E-s3--ab.jsonl\n", "a git-annex pointer", "git annex get"),
    "dvc": ("outs:\n- md5: ab\n  path: x.jsonl\n", "a DVC pointer", "dvc pull"),
    "hub_cache_link": ("../../blobs/0a1b2c3d4e5f", "a link of the Hugging Face cache", "cp -L"),
    "web_address": ("https://huggingface.co/x/resolve/main/y.jsonl\n", "a web address", "download what it names"),
    "hub_entry": ("Entry not found", '"Entry not found"', "download it again"),
    "hub_login": ("Invalid username or password.", "a refusal", "log in"),
    "raw_404": ("404: Not Found", "not found", "download the file again"),
    "json_error": ('{"error":"Entry not found"}', "an error that a download left (Entry not found)", "download"),
    "headers": ("HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n" + ROW, "HTTP headers", "without headers"),
    # JSON in other layouts
    "array": (ARRAY, "one JSON array", "jq -c '.[]' FILE"),
    "array_pretty": (json.dumps(OBJECTS, indent=4), "one JSON array", "jq -c '.[]' FILE"),
    "array_object_a_line": ('[\n{"text": "a"},\n{"text": "b"}\n]\n', "one JSON array", "submit FILE.json"),
    "array_leading_commas": ('[{"text": "a"}\n,{"text": "b"}\n]\n', "one JSON array", "jq -c '.[]' FILE"),
    "array_after_space": ("\n  " + ARRAY, "one JSON array", "jq -c '.[]' FILE"),
    "array_large": (json.dumps(OBJECTS * 5000), "one JSON array", "jq -c '.[]' FILE"),
    "array_of_one_large": (json.dumps([{"text": "x" * 90_000}]), "one JSON array", "jq -c '.[]' FILE"),
    "array_of_columns": ('[{"q": "a", "a": "b"}]', "one JSON array", 'prompt = "q", completion = "a"'),
    "array_of_strings": ('["a", "b"]', "one JSON array", "jq -c '.[] | {text: .}' FILE"),
    "array_of_conversations": (json.dumps([TURNS, TURNS]), "one JSON array", "jq -c '.[] | {messages: .}' FILE"),
    "array_cut": (ARRAY[:-3], "one JSON array, and not a sound one (see line 1, column", "write it anew"),
    "array_trailing_comma": ('[\n{"text": "a"},\n]\n', "not a sound one (see line ", "write it anew"),
    "conversation": (json.dumps(TURNS), "one conversation", "jq -c '{messages: .}' FILE"),
    "conversation_a_line": (f"{json.dumps(TURNS)}\n" * 2, "an array on each line", "jq -c '{messages: .}' FILE"),
    "pretty": (PRETTY, "JSON that spans lines", "jq -c . FILE"),
    "pretty_objects": (PRETTY * 3, "JSON that spans lines", "jq -c . FILE"),
    "pretty_large": (PRETTY * 5000, "JSON that spans lines", "jq -c . FILE"),
    "pretty_broken": ('{\n  "text": "a",\n}\n', "JSON that spans lines, and not sound (see line ", "write it anew"),
    "objects_on_a_line": ('{"text": "a"}{"text": "b"}\n', "several objects a line", "jq -c . FILE"),
    "objects_spaced": ('{"text": "a"} {"text": "b"}\n' * 2, "several objects a line", "jq -c . FILE"),
    "commas": ('{"text": "a"},\n{"text": "b"},\n', "a comma after each line", "sed"),
    "container": ('{"data": [{"text": "a"}]}', '"data"', "jq -c '.data[]' FILE"),
    "container_pretty": (json.dumps({"train": OBJECTS}, indent=1), '"train"', "jq -c '.train[]' FILE"),
    "container_large": (json.dumps({"rows": OBJECTS * 5000}), '"rows"', "jq -c '.rows[]' FILE"),
    "hub_rows": ('{"rows": [{"row_idx": 0, "row": {"text": "a"}}]}', '"rows"', "jq -c '.rows[].row' FILE"),
    "keyed_rows": (json.dumps({"a1": OBJECTS[0], "a2": OBJECTS[1]}), "holds all rows", "jq -c '.[]' FILE"),
    "pandas_columns": ('{"prompt": {"0": "a"}, "completion": {"0": "b"}}', "as pandas writes", "orient='records'"),
    "columns": ('{"prompt": ["a", "b"], "completion": ["c", "d"]}', "one JSON object of columns", "from_dict"),
    "notebook": ('{"cells": [], "nbformat": 4, "metadata": {}}', "a Jupyter notebook", "export"),
    "objects_between_commas": (PRETTY.rstrip() + ",\n" + PRETTY, "with commas between them", "put brackets around it"),
    "one_line_between_commas": ('{"text": "a"},{"text": "b"}', "with commas between them", "put brackets around it"),
    "numbers": ("1\n2\n3\n", "a JSON value on each line", "write each row as a JSON object"),
    "pairs_without_braces": ('"text": "a"\n"text": "b"\n', "plain text", "jq -cR"),
    "encoded_twice": (f"{json.dumps(json.dumps(OBJECTS[0]))}\n" * 2, "encoded as strings", "jq -c 'fromjson' FILE"),
    "array_encoded_twice": (json.dumps([json.dumps(OBJECTS[0])]), "encoded as strings", "jq -c '.[] | fromjson' FILE"),
    "toml": ('[[rows]]\ntext = "a"\n', "TOML", "export its rows"),
    "ini": ("[section]\nkey = value\n", "INI", "export its rows"),
    "log": ("[INFO] 12:00 started\n[INFO] 12:01 ended\n", "plain text", "jq -cR"),
    "transcript": ("User: hi\nAssistant: hello\nUser: bye\nAssistant: bye\n", "plain text", "jq -cR"),
    "prompts_as_text": ("<s>[INST] Hi [/INST] Hello</s>\n", "plain text", "jq -cR"),
    "json_with_comments": ("// rows\n[\n]\n", "JSON with comments", "write it anew"),
    "strings": ('"a"\n"b"\n', "a JSON string on each line", "jq -c '{text: .}' FILE"),
    "text_sequence": (f"\x1e{ROW}" * 2, "a JSON text sequence", "tr -d"),
    "server_events": ("data: " + ROW + "\n" + "data: [DONE]\n", "server-sent events", "sed"),
    "python": ("{'text': 'a'}\n{'text': 'b'}\n", "Python's way", "json.dumps"),
    "python_none": ('{"text": "a", "system": None}\n', "Python's way", "json.dumps"),
    "typographic_quotes": ("{“text”: “a”}\n", "typographic quotation marks", "sed"),
    "javascript_keys": ('{text: "a"}\n', "JavaScript objects", "write it anew"),
    "javascript": (f"const rows = {ARRAY};\n", "program text", "write it anew"),
    "jsonp": (f"callback({ARRAY})\n", "program text", "write it anew"),
    "markdown": (f"```json\n{ROW}```\n", "Markdown", "between"),
    "sql": ("INSERT INTO rows VALUES ('a');\n", "an SQL script", "export its rows"),
    "yaml": ("- text: a\n- text: b\n", "YAML", "yaml.safe_load(sys.stdin)"),
    "yaml_documents": ("---\ntext: a\n---\ntext: b\n", "YAML", "yaml.safe_load_all(sys.stdin)"),
    "text": ("Once upon a time, there was\na king.\n", "plain text", "jq -cR '{text: .}' FILE"),
    # encodings
    "utf16": (ROWS.encode("utf-16"), "UTF-16 text", "iconv -f UTF-16 "),
    "utf16_be": (b"\xfe\xff" + ROWS.encode("utf-16-be"), "UTF-16 text", "iconv -f UTF-16 "),
    "utf16_le_unmarked": (ROWS.encode("utf-16-le"), "UTF-16LE text", "iconv -f UTF-16LE "),
    "utf16_be_unmarked": (ROWS.encode("utf-16-be"), "UTF-16BE text", "iconv -f UTF-16BE "),
    "utf16_chinese": ('{"text": "你好世界"}\n'.encode("utf-16-le"), "UTF-16LE text", "iconv -f UTF-16LE "),
    "utf16_array": (ARRAY.encode("utf-16"), "inside is one JSON array", "iconv -f UTF-16 -t UTF-8); then `dropforge"),
    "utf32": (ROWS.encode("utf-32"), "UTF-32 text", "iconv -f UTF-32 "),
    "utf32_le_unmarked": (ROWS.encode("utf-32-le"), "UTF-32LE text", "iconv -f UTF-32LE "),
    "utf32_be_unmarked": (ROWS.encode("utf-32-be"), "UTF-32BE text", "iconv -f UTF-32BE "),
    "windows_1252": (CAFE.encode("cp1252"), "probably Windows-1252", "iconv -f WINDOWS-1252 "),
    "windows_1252_csv": (
        "text,note\ncafé au lait,déjà vu\n".encode("cp1252"), "inside is a table (CSV)", "then `dropforge submit"
    ),
    "shift_jis": ('{"text": "こんにちは世界"}\n'.encode("shift_jis"), "an encoding other than UTF-8", "file -i FILE"),
    "euc_kr": ('{"text": "안녕하세요 여러분"}\n'.encode("euc_kr"), "an encoding other than UTF-8", "file -i FILE"),
    "gbk": ('{"text": "你好，世界"}\n'.encode("gbk"), "an encoding other than UTF-8", "file -i FILE"),
    "windows_1251": ('{"text": "привет, мир"}\n'.encode("cp1251"), "an encoding other than UTF-8", "file -i FILE"),
    "old_mac": (ROWS.replace("\n", "\r"), "its lines end in CR", "tr '\\r' '\\n'"),
    # nothing at all
    "zeros": (bytes(4096), "nothing but zero bytes", "copy it again"),
    "zeros_at_the_end": (ROWS.encode() + bytes(4096), "text that goes over into zero bytes", "copy it again"),
    "noise": (bytes(range(256)) * 8, "binary data", "drop a text file"),
    "pickle": (pickle.dumps(OBJECTS), "a Python pickle", "export its rows"),
    "empty": (b"", "empty: it holds no rows", "write one JSON object a line"),
    "white_space": (b" \n\t\r\n", "nothing but white space", "write one JSON object a line"),
    "utf16_appended": (ROWS.encode() + ROWS.encode("utf-16-le"), "goes over into UTF-16", "write all of it in UTF-8"),
    "base64": (base64.encodebytes(ROWS.encode() * 9), "base64 text", "base64 -d FILE"),
    "base64_gzip": (base64.b64encode(gzip.compress(ROWS.encode())), "base64 text, and what is inside is gzip", "base64"),
}  # fmt: skip


def refusal(path: Path, rules: Rules | None = None) -> tuple[str, str]:
    with pytest.raises(RejectedDataset) as caught:
        scan_dataset(path, rules or Rules())
    return caught.value.report.reason, caught.value.report.hint


@pytest.mark.parametrize("kind", KINDS)
def test_another_kind_of_file_is_named_with_what_to_do(tmp_path: Path, kind: str) -> None:
    """One sentence, without a parser's own words and without one complaint a line."""
    content, what, hint = KINDS[kind]
    path = tmp_path / "x.jsonl"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(RejectedDataset) as caught:
        scan_dataset(path, Rules())
    report = caught.value.report
    assert what in report.reason
    assert hint in report.hint
    assert not report.problems
    assert not [word for word in ("Expecting", "expecting", "codec", "Error -3", "decode") if word in report.reason]


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_cut_anywhere_is_never_an_error(kind: str) -> None:
    """Whatever the first bytes are, there is an answer or none."""
    content = KINDS[kind][0]
    raw = content.encode() if isinstance(content, str) else content
    for end in {1, 2, 3, 4, 7, 15, 64, 259, len(raw) // 2}:
        recognise(raw[:end], whole=True)
        recognise(raw[:end], whole=False)


CONTENTS = st.sampled_from(
    [content.encode() if isinstance(content, str) else content for content, _, _ in KINDS.values()]
)


@given(CONTENTS, CONTENTS, st.integers(0, 300), st.integers(0, 300), st.binary(max_size=4), st.sampled_from([1, 5000]))
@settings(max_examples=400, deadline=2000)
def test_what_is_damaged_or_put_together_is_named_or_left_to_the_pass(
    first: bytes, second: bytes, cut: int, start: int, odd: bytes, times: int
) -> None:
    """Never an error, and never slow: no expression looks at the same text again and again."""
    content = (first[:cut] + odd * times + second[start:])[:SAMPLE_BYTES]
    for whole in (True, False):
        found = recognise(content, whole=whole)
        assert found is None or (found.what and found.hint)


@pytest.mark.parametrize(
    "content",
    [
        ROWS,
        "\ufeff" + ROWS,
        '{"text": "' + "x" * 2 * SAMPLE_BYTES + '"}\n',
        '{"text": "' + "語" * SAMPLE_BYTES + '"}\n',
        '{"text": "naïve – “quoted” {\'a\': None}"}\n' * 4000,
        '{"text": ["a"]}\n{"text": 1}\n',
        "\ufeff\ufeff" + ROWS,
        '{"text": 1}\n' + ROWS,
    ],
)
def test_what_begins_as_rows_is_left_to_the_pass(content: str) -> None:
    """Also a row that is longer than the sample."""
    raw = content.encode()
    assert recognise(raw[:SAMPLE_BYTES], whole=len(raw) <= SAMPLE_BYTES) is None


@pytest.mark.parametrize("first", ["# a comment", "text,note", "hello", "- a", '"a"', "{'text': 1}", '{"text": "a"},'])
def test_one_odd_line_before_good_rows_is_a_bad_row_and_no_kind_of_file(tmp_path: Path, first: str) -> None:
    """Under on_bad_rows = "skip" it is left out; else it is named by its line, and the good rows are counted."""
    path = tmp_path / "x.jsonl"
    path.write_text(f"{first}\n{ROW * 200}")
    assert scan_dataset(path, Rules(on_bad_rows="skip")).dataset.rows == 200
    assert "line 1, column" in refusal(path)[0]


def test_an_array_is_refused_also_where_bad_rows_are_skipped(tmp_path: Path) -> None:
    """Its last line alone would be taken for the data set."""
    path = tmp_path / "x.jsonl"
    path.write_text('[\n{"text": "a"},\n{"text": "b"}\n]\n')
    assert "one JSON array" in refusal(path, Rules(on_bad_rows="skip", max_bad_fraction=1.0))[0]


@pytest.mark.parametrize(
    ("name", "content", "what", "hint"),
    [
        ("x.jsonl.gz", ROWS.encode(), "not compressed, though its name ends in .gz", "rename it without .gz"),
        ("x.jsonl.zst", ROWS.encode(), "not compressed, though its name ends in .zst", "rename it without .zst"),
        ("x.jsonl.gz", zstandard.ZstdCompressor().compress(ROWS.encode()), "zstd data, though", ".jsonl.zst"),
        ("x.jsonl.gz", zipped("x.jsonl"), "a ZIP archive, though", "unpack it"),
        ("x.jsonl.gz", b"<html>Sign in</html>", "an HTML page, though", "download the file again"),
        ("x.jsonl.gz", gzip.compress(ARRAY.encode()), "it is one JSON array", "jq -c '.[]' FILE"),
        ("x.jsonl.gz", gzip.compress(tarred()), "it is a tar archive", "unpack it"),
        ("x.jsonl.gz", gzip.compress(gzip.compress(ROWS.encode())), "it is gzip data", "rename it"),
        ("x.jsonl.gz", gzip.compress(ROWS.encode()) + b"garbage!", "other bytes follow its gzip data", "zcat"),
        ("x.jsonl.gz", gzip.compress(ROWS.encode())[:-12], "the gzip data is cut short", "copy it again"),
        ("x.jsonl.gz", b"", "it is empty: it holds no rows, though its name ends in .gz", "write one JSON"),
        (
            "x.jsonl.zst",
            zstandard.ZstdCompressor().compress(ROWS.encode() * 99)[:-9],
            "the zstd data is cut short",
            "copy",
        ),
    ],
    ids=[
        "plain_gz", "plain_zst", "zstd_gz", "zip_gz", "page_gz", "array_inside", "tar_inside", "gzip_inside",
        "garbage_behind", "cut_gz", "empty", "cut_zst",
    ],
)  # fmt: skip
def test_what_a_compressed_name_holds_is_named(tmp_path: Path, name: str, content: bytes, what: str, hint: str) -> None:
    """The name's claim, the damage, or the kind inside."""
    path = tmp_path / name
    path.write_bytes(content)
    reason, found = refusal(path)
    assert what in reason
    assert hint in found


def test_two_gzip_members_are_one_file(tmp_path: Path) -> None:
    """As every gzip reader takes them."""
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(ROWS.encode()) + gzip.compress(ROW.encode()))
    assert scan_dataset(path, Rules()).dataset.rows == 4


def test_an_archive_that_unpacks_to_itself_has_an_end() -> None:
    """Some do."""
    content = ROWS.encode()
    for _ in range(40):
        content = gzip.compress(content)
    found = recognise(content, whole=True)
    assert found is not None
    assert found.what.count("gzip") <= 6


@pytest.mark.parametrize(
    "kind", ["array", "pretty_objects", "objects_on_a_line", "container", "conversation", "text", "encoded_twice"]
)
def test_the_jq_command_that_is_proposed_makes_a_file_that_passes(tmp_path: Path, kind: str) -> None:
    """A hint does not lead from one refusal to the next."""
    path, made = tmp_path / "x.jsonl", tmp_path / "new.jsonl"
    path.write_text(str(KINDS[kind][0]))
    _, hint = refusal(path)
    command = hint[hint.index("jq") :].replace("FILE", str(path)).replace("NEW.jsonl", str(made))
    if subprocess.run(["sh", "-c", "command -v jq"], capture_output=True, check=False).returncode:
        pytest.skip("jq is not installed")
    subprocess.run(command, shell=True, check=True)
    assert scan_dataset(made, Rules()).dataset.rows >= 1


@pytest.mark.parametrize(
    "kind", ["commas", "old_mac", "python", "utf16", "utf16_le_unmarked", "windows_1252", "xz", "bz2", "base64"]
)
def test_the_shell_command_that_is_proposed_makes_a_file_that_passes(tmp_path: Path, kind: str) -> None:
    """Run as it is written."""
    content = KINDS[kind][0]
    path, made = tmp_path / "x.jsonl", tmp_path / "new.jsonl"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    _, hint = refusal(path)
    command = hint.partition(": ")[2].replace("FILE", str(path)).replace("NEW.jsonl", str(made))
    subprocess.run(command, shell=True, check=True, env={**os.environ, "LC_ALL": "C.UTF-8"})
    assert scan_dataset(made, Rules()).dataset.rows >= 1


def test_check_tells_the_same_in_one_sentence(tmp_path: Path) -> None:
    """The command, as a process: exit 3, reason and hint."""
    path = tmp_path / "x.jsonl"
    path.write_text(ARRAY)
    done = Root(tmp_path / "root").run("check", str(path))
    assert done.returncode == 3
    assert "it is one JSON array" in done.stdout
    assert "jq -c '.[]'" in done.stdout
    assert "column" not in done.stdout
