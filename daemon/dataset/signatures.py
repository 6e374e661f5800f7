"""What a file can turn out to be: the value that says so, and the first bytes by which other kinds are known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

UNPACK = "unpack it, and drop the .jsonl file that is in it"
EXPORT = "export its rows as one JSON object a line, and drop that file"
WORKBOOK = "save the sheet as CSV (UTF-8), then `dropforge submit FILE.csv`"
FEATHER = "convert it: pandas.read_feather(FILE).to_json(NEW, orient='records', lines=True)"
OTHER = "drop the .jsonl file itself"
PAGE = "it is not the data: download the file again, by its raw or resolve link"


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


@dataclass(frozen=True)
class Signature:
    """Bytes at a fixed place that no text file has there."""

    magic: bytes
    what: str  # completes "it is ..."
    hint: str
    offset: int = 0

    def matches(self, sample: bytes) -> bool:
        """Whether the sample has these bytes in their place."""
        return sample.startswith(self.magic, self.offset)


SIGNATURES = (
    Signature(b"PAR1", "a Parquet file", "`dropforge submit FILE.parquet` converts it (under a name with that ending)"),
    Signature(b"PARE", "an encrypted Parquet file", EXPORT),
    Signature(b"ARROW1", "an Arrow (Feather) file", FEATHER),
    Signature(b"FEA1", "a Feather file", FEATHER),
    Signature(b"\xff\xff\xff\xff", "an Arrow stream", "convert it: datasets.Dataset.from_file(FILE).to_json(NEW)"),
    Signature(b"ORC", "an ORC file", EXPORT),
    Signature(b"Obj\x01", "an Avro file", EXPORT),
    Signature(
        b"SQLite format 3\0",
        "an SQLite database",
        "export a query: sqlite3 -json FILE 'SELECT ...' | jq -c '.[]' > NEW.jsonl",
    ),
    Signature(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Microsoft Office file (.xls, .doc)", WORKBOOK),
    Signature(b"\x89HDF\r\n\x1a\n", "an HDF5 file", EXPORT),
    Signature(b"\x93NUMPY", "a NumPy array", "drop text, not arrays of tokens"),
    *(Signature(bytes((0x80, version)), "a Python pickle", EXPORT) for version in (2, 3, 4, 5)),
    Signature(b"GGUF", "model weights (GGUF)", OTHER),
    Signature(b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
    Signature(b"Rar!\x1a\x07", "a RAR archive", UNPACK),
    Signature(b"ustar", "a tar archive", UNPACK, offset=257),
    Signature(b"!<arch>\n", "an ar archive or a Debian package", UNPACK),
    Signature(b"MSCF", "a CAB archive", UNPACK),
    Signature(b"xar!", "a xar archive", UNPACK),
    Signature(b"\xed\xab\xee\xdb", "an RPM package", UNPACK),
    Signature(b"070701", "a cpio archive", UNPACK),
    Signature(b"070707", "a cpio archive", UNPACK),
    Signature(b"\x04\x22\x4d\x18", "LZ4 data", "decompress it: lz4 -dc FILE > NEW.jsonl"),
    Signature(b"\x02\x21\x4c\x18", "LZ4 data", "decompress it: lz4 -dc FILE > NEW.jsonl"),
    Signature(b"\xff\x06\x00\x00sNaPpY", "Snappy data", "decompress it, or compress it with gzip or zstd"),
    Signature(b"LZIP", "lzip data", "decompress it: lzip -dc FILE > NEW.jsonl"),
    Signature(b"\x89LZO\0\r\n\x1a\n", "LZO data", "decompress it: lzop -dc FILE > NEW.jsonl"),
    Signature(b"\x1f\x9d", "data of `compress` (.Z)", "decompress it: zcat FILE > NEW.jsonl"),
    Signature(b"%PDF-", "a PDF document", OTHER),
    Signature(b"%!PS", "a PostScript document", OTHER),
    Signature(b"{\\rtf", "an RTF document", "save it as plain text, one JSON object a line"),
    Signature(b"bplist00", "a property list of macOS", OTHER),
    Signature(b"\x00\x05\x16\x07", "what macOS keeps beside a file (AppleDouble)", OTHER),
    Signature(b"\x89PNG\r\n\x1a\n", "a PNG picture", OTHER),
    Signature(b"\xff\xd8\xff", "a JPEG picture", OTHER),
    Signature(b"GIF8", "a GIF picture", OTHER),
    Signature(b"RIFF", "a sound, film or picture (RIFF)", OTHER),
    Signature(b"ID3", "an MP3 recording", OTHER),
    Signature(b"OggS", "an Ogg recording", OTHER),
    Signature(b"fLaC", "a FLAC recording", OTHER),
    Signature(b"ftyp", "an MP4 film", OTHER, offset=4),
    Signature(b"\x1aE\xdf\xa3", "a Matroska film", OTHER),
    Signature(b"\x7fELF", "a program", OTHER),
    Signature(b"MZ\x90\0", "a Windows program", OTHER),
    Signature(b"\xca\xfe\xba\xbe", "a program", OTHER),
    Signature(b"-----BEGIN PGP", "an encrypted or signed message", "decrypt it first"),
    Signature(b"-----BEGIN ", "a key or a certificate", OTHER),
    Signature(b"age-encryption.org/", "an encrypted file (age)", "decrypt it first"),
    Signature(b"Salted__", "an encrypted file (OpenSSL)", "decrypt it first"),
)

GZIP = b"\x1f\x8b"
# zstd's frames, and the skippable ones that some tools write first.
ZSTD = (b"\x28\xb5\x2f\xfd", *(bytes((0x50 + number,)) + b"\x2a\x4d\x18" for number in range(16)))

BOM_ENCODINGS = (  # in this order: the mark of UTF-32 begins with that of UTF-16
    (b"\xff\xfe\0\0", "utf-32"),
    (b"\0\0\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
    (b"+/v8", "utf-7"),
    (b"+/v9", "utf-7"),
)

# Inside a ZIP archive, the names of its first members say what wrote it.
ZIP_MAGIC = (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08")
ZIP_CONTENTS = (
    (b"xl/", "an Excel workbook", WORKBOOK),
    (b"opendocument.spreadsheet", "a LibreOffice spreadsheet", WORKBOOK),
    (b"word/", "a Word document", OTHER),
    (b"opendocument.text", "a LibreOffice document", OTHER),
    (b"ppt/", "a PowerPoint presentation", OTHER),
    (b"application/epub", "an EPUB book", OTHER),
    (b"data.pkl", "a PyTorch file", OTHER),
    (b".npy", "a NumPy archive", "drop text, not arrays of tokens"),
)

# How the pages and notes begin that a download leaves in place of the data.
DOWNLOADS = (
    ("version https://git-lfs.github.com/spec/", "a Git LFS pointer, not the data", "fetch the data: `git lfs pull` in its repository, or download it again"),
    ("version https://hawser.github.com/spec/", "a Git LFS pointer, not the data", "fetch the data: `git lfs pull` in its repository, or download it again"),
    ("/annex/objects/", "a git-annex pointer, not the data", "fetch the data: `git annex get FILE`"),
    ("../.git/annex/", "a git-annex pointer, not the data", "fetch the data: `git annex get FILE`"),
    ("../../blobs/", "a link of the Hugging Face cache, not the data", "copy what it points to: cp -L FILE NEW.jsonl"),
    ("https://", "a web address, not the data", "download what it names, and drop that"),
    ("http://", "a web address, not the data", "download what it names, and drop that"),
    ("outs:\n- md5:", "a DVC pointer, not the data", "fetch the data: `dvc pull`"),
    ("# xet version", "a Xet pointer, not the data", "download the file again with `hf download`"),
    ("entry not found", "the answer \"Entry not found\" of a download", "look up the file's name in its repository, then download it again"),
    ("repository not found", "the answer \"Repository not found\" of a download", "look up the repository's name, log in if it is private, then download it again"),
    ("invalid username or password", "a refusal that a download left", "log in, then download it again"),
    ("invalid credentials", "a refusal that a download left", "log in, then download it again"),
    ("access to dataset", "a refusal that a download left", "ask for access to the data set, then download it again"),
    ("access to model", "a refusal that a download left", "ask for access, then download it again"),
    ("cannot access gated repo", "a refusal that a download left", "ask for access, then download it again"),
    ("access denied", "a refusal that a download left", "ask for access, then download it again"),
    ("unauthorized", "a refusal that a download left", "log in, then download it again"),
    ("forbidden", "a refusal that a download left", "ask for access, then download it again"),
    ("404: not found", "an answer \"not found\" that a download left", PAGE),
    ("404 page not found", "an answer \"not found\" that a download left", PAGE),
    ("not found", "an answer \"not found\" that a download left", PAGE),
    ("internal server error", "an error that a download left", "download it again"),
    ("bad gateway", "an error that a download left", "download it again"),
    ("too many requests", "an error that a download left", "wait a little, then download it again"),
    ("error code: ", "an error that a download left", "download it again"),
    ("curl: (", "an error that a download left", "download it again"),
    ("http/1.", "an answer with its HTTP headers", "download it again without headers (curl without -i)"),
    ("http/2 ", "an answer with its HTTP headers", "download it again without headers (curl without -i)"),
    ("[internetshortcut]", "a link of Windows, not the data", PAGE),
)  # fmt: skip
