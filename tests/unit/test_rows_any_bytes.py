"""Any bytes whatsoever: a dataset whose rows read as json.loads reads them, or a report with line and column."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from hypothesis import example, given, settings
from hypothesis import strategies as st

from daemon.dataset import RejectedDataset, scan_dataset
from daemon.dataset.rows import Columns, Format, Rules, detect_format, iter_rows, normalise
from tests.unit.test_rows_formats import BAD, GOOD
from tests.unit.test_rows_strict_json import HOSTILE

COLUMNS = Columns(prompt="q", completion="a")
GOOD_LINES = [json.dumps(value, ensure_ascii=number % 2 == 0).encode() for number, (_, value, _) in enumerate(GOOD)]
LINES = GOOD_LINES + [case.values[1] for case in BAD] + [case.values[0][:500] for case in HOSTILE]
END = st.sampled_from([b"\n", b"\n", b"\n", b"\r\n", b"", b" ", b"\n\n", b"\xef\xbb\xbf"])


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A line of the tables with a few bytes put in, taken out or changed."""
    line = draw(st.sampled_from(LINES))
    start = draw(st.integers(0, len(line)))
    return line[:start] + draw(st.binary(max_size=3)) + line[start + draw(st.integers(0, 3)) :]


pieces = st.sampled_from(GOOD_LINES) | st.sampled_from(LINES) | damaged() | st.binary(max_size=20)
one_kind = st.sampled_from(GOOD_LINES).flatmap(lambda line: st.lists(st.just(line) | pieces, min_size=1, max_size=6))
files = st.tuples(one_kind | st.lists(pieces, max_size=6), st.lists(END, min_size=6, max_size=6)).map(
    lambda parts: b"".join(line + end for line, end in zip(*parts, strict=False))
)


@given(files, st.booleans())
@example(b'{"text": "\xe2\x80\xa8"}\r\n\xef\xbb\xbf{"text": 1}', False)
@settings(max_examples=500, deadline=None)
def test_any_bytes_are_rows_as_json_reads_them_or_are_refused_by_line_and_column(content: bytes, skip: bool) -> None:
    """Never another exception; under "skip", what is trained and what is left out together are every line."""
    rules = Rules(columns=COLUMNS, on_bad_rows="skip" if skip else "reject", max_bad_fraction=1.0)
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.jsonl")
        path.write_bytes(content)
        try:
            report = scan_dataset(path, rules).report
        except RejectedDataset as error:
            report = error.report
            assert report.reason
            assert report.hint
        else:
            rows = list(iter_rows(path, str(report.format), rules))
            assert len(rows) == report.rows
            assert skip or not report.bad_rows
            for row in rows:
                value = json.loads(lines[row.line - 1])
                expected = normalise(value, Format(str(report.format)), rules)
                assert all(getattr(row, name) == found for name, found in vars(expected).items()), (row, expected)
            formats = (detect_format(json.loads(lines[row.line - 1]), COLUMNS) for row in rows)
            assert Format(str(report.format)) in formats
            assert not {row.line for row in rows} & set(report.bad_lines)
    for problem in report.problems:
        assert 1 <= problem.line <= len(lines)
        assert 1 <= problem.column <= len(lines[problem.line - 1]) + 1
        assert problem.excerpt.isprintable()
