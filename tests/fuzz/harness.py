"""Inputs for the targets: the kept ones, and odd ones made of them; and what a target makes of one."""

from __future__ import annotations

import re
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).parent / "corpus"
READ_SECONDS = 1.0  # of processor time, for one input; a sound one takes milliseconds
MAX_BYTES = 128 * 1024
IN_MEMORY = Path("/dev/shm")

_TOKENS = re.compile(rb'"(?:[^"\\]|\\.)*"|[\w.+-]+|\s+|.', re.DOTALL)
# In the place of a token or between two: what JSON, TOML, numbers and names have at their edges.
ODD = (
    *(b"null", b"true", b"false", b"0", b"-1", b"1.5", b"1e999", b"-1e999", b"NaN", b"Infinity", b"inf", b"nan", b"1e308"),
    *(b"9" * 5000, b"0x" + b"f" * 400, b"9" * 20, b"0" * 300, b"1" + b"0" * 400, b"1979-05-27T07:32:00Z", b"99:99:99"),
    *(b"[]", b"{}", b'""', b"''", b'"\\ud800"', b'"\\u0000"', b'"\\n\\u001b[31m\\u202e"', b'"../../x"', b'"/"', b'"~a\\u0000"'),
    *(b'"$A"', b'"${"', b'"$$"', b'"0"', b'"2"', b'"99999"', b'"' + b"1" * 5000 + b'"', b'"' + b"a" * 5000 + b'"'),
    *(b"[" * 20_000, b'{"a":' * 20_000, b"a." * 3000 + b"a", b"[" * 90 + b"]" * 90, b'"\xc4\xb1"', '"٣٣٣٣"'.encode()),
    *(b"\xff", b"\0", b"\n", b"\r", b"\t", b"\\", b'"', b",", b":", b"=", b".", b"[", b"]", b"{", b"}", b"#", b"\xef\xbb\xbf"),
    *("\ufeff\u2028\u202e\U000e0001".encode(), b"\xed\xa0\x80", b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"a" * 300),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Finding:
    """An input over which a target raised what is not documented, or took too long."""

    target: str
    data: bytes
    place: str  # the innermost line of our own and the kind of error: two findings of one place are one
    report: str


def kept_inputs(target: str) -> list[Path]:
    """Return the files of a target's corpus, by name."""
    return sorted((CORPUS / target).iterdir())


def examine(target: str, data: bytes) -> Finding | None:
    """Let a target read `data` in an empty folder; None when it takes it or refuses it as it should."""
    with tempfile.TemporaryDirectory(dir=IN_MEMORY if IN_MEMORY.is_dir() else None) as folder:
        begun = time.process_time()
        try:
            TARGETS[target](data, Path(folder))
        except Exception as error:
            frames = [
                frame for frame in traceback.extract_tb(error.__traceback__) if "/site-packages/" not in frame.filename
            ]
            ours = [frame for frame in frames if {"daemon", "guard", "fuzz"} & set(Path(frame.filename).parts)][-1]
            place = f"{Path(ours.filename).name}:{ours.name}: {type(error).__name__}"
            return Finding(target=target, data=data, place=place, report=traceback.format_exc())
        seconds = time.process_time() - begun
    if seconds <= READ_SECONDS:
        return None
    return Finding(target=target, data=data, place="it takes long", report=f"{seconds:.1f} s for {len(data):,} bytes")


def mutate(data: bytes, random: Random, others: Sequence[bytes] = ()) -> bytes:
    """Return `data` with some of its tokens replaced, removed, repeated, swapped or joined by odd ones.

    `others`: inputs from which tokens may come as well. Equal arguments give equal results.
    """
    tokens = _TOKENS.findall(data)
    for _ in range(random.choice((1, 1, 1, 2, 3, 6))):
        at = random.randrange(len(tokens) + 1)
        match random.randrange(7):
            case 0 | 1:
                tokens[at : at + 1] = [random.choice(ODD)]
            case 2:
                tokens[at:at] = [random.choice(ODD)]
            case 3:
                del tokens[at : at + random.choice((1, 1, 2, 5))]
            case 4:
                span = tokens[at : at + random.choice((1, 3, 10, 40))]
                tokens[at:at] = span * random.choice((1, 1, 2, 200))
            case 5 if others:
                theirs = _TOKENS.findall(random.choice(others))
                start = random.randrange(len(theirs) + 1)
                tokens[at : at + random.choice((0, 1, 5))] = theirs[start : start + random.choice((1, 1, 7, 30))]
            case _ if at < len(tokens) and tokens[at]:
                token = bytearray(tokens[at])
                token[random.randrange(len(token))] = random.randrange(256)
                tokens[at] = bytes(token)
    return b"".join(tokens)[:MAX_BYTES]
