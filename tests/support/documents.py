"""The fenced blocks of the documents, so that tests run what people will type."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.root import REPOSITORY

README = REPOSITORY / "README.md"
OPERATIONS = REPOSITORY / "docs" / "operations.md"


@dataclass(frozen=True, kw_only=True)
class Block:
    """What stands between two fences. `kind` is the word behind the first: sh, python, logrotate, text."""

    path: Path
    heading: str  # the nearest one above, without its marks
    kind: str
    lines: tuple[str, ...]


def blocks(path: Path) -> Iterator[Block]:
    """Every fenced block of a document, in order."""
    heading, kind, lines = "", "", None
    for line in path.read_text().splitlines():
        if lines is None and line.startswith("#"):
            heading = line.lstrip("# ")
        elif line.startswith("```") and lines is None:
            kind, lines = line.removeprefix("```").strip(), list[str]()
        elif line.startswith("```") and lines is not None:
            yield Block(path=path, heading=heading, kind=kind, lines=tuple(lines))
            lines = None
        elif lines is not None:
            lines.append(line)


def commands_of(path: Path, heading: str, kind: str = "sh") -> list[str]:
    """The shell blocks right below a heading, each as a script; or those of another kind."""
    return ["\n".join(block.lines) for block in blocks(path) if (block.kind, block.heading) == (kind, heading)]
