"""Any bytes whatsoever: a dataset whose rows read as json.loads reads them, or a report with line and column."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from daemon.dataset import keys
from daemon.dataset.rows import Columns, Format, Rules, check_row, count_answers, detect_format, iter_rows, normalise
from daemon.dataset.strict_json import LineError
from daemon.dataset.suggest import describe_unknown
from daemon.dataset.validate import RejectedDataset, scan_dataset
from tests.unit.test_rows_formats import BAD, GOOD
from tests.unit.test_rows_keys import LEARNED, REFUSALS
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
            read_alike = {Format.MESSAGES, Format.SHAREGPT}  # either key is read in a file of the other
            expected_formats = read_alike if report.format in read_alike else {Format(str(report.format))}
            assert expected_formats & set(formats)
            assert not {row.line for row in rows} & set(report.bad_lines)
    for problem in report.problems:
        assert 1 <= problem.line <= len(lines)
        assert 1 <= problem.column <= len(lines[problem.line - 1]) + 1
        assert problem.excerpt.isprintable()


PUBLISHED = [row for row, _ in LEARNED.values()] + [row for row, _, _ in REFUSALS.values()]
ODD: list[Any] = [
    [None],
    [[]],
    [{}],
    "[{",
    '[{"role": 1}]',
    "USER: a\nASSISTANT: <functioncall>",
    "<tool_call>x</tool_call>",
]
KNOWN = sorted(
    {name for used in keys.USED for name in used.names}
    | {name for group in keys.REFUSED for name in group.names[:2]}
    | {"type", "function", "arguments", "parameters", "id", "x", "thinking", "system"}
)
words = st.sampled_from(
    [*keys.ROLES, "", " ", "a", "text", "thinking", "{}", "[]", '[{"name": "f"}]', '{"name": "f", "arguments": "{}"}']
)
scalars = st.none() | st.booleans() | st.integers(-1, 3) | st.floats(0, 2, width=16) | words
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KNOWN), inner, max_size=4), max_leaves=12
)  # fmt: skip
turns = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(sorted(keys.ROLES)) | trees},
        optional=dict.fromkeys(
            ("content", *keys.MASK_KEYS, *keys.CALL_KEYS, *keys.REASONING_KEYS, "tools", "name"), trees
        ),
    )
    | trees,
    min_size=1,
    max_size=3,
)
rows = st.dictionaries(st.sampled_from(KNOWN), trees, max_size=4).flatmap(
    lambda row: st.sampled_from(sorted(keys.CONVERSATION_KEYS)).flatmap(
        lambda key: st.one_of(st.just(row), turns.map(lambda value: {**row, key: value}))
    )
)


@st.composite
def published(draw: st.DrawFn) -> dict[str, Any]:
    """A row of the tables with any value in the place of one of its values."""
    row = copy.deepcopy(draw(st.sampled_from(PUBLISHED)))
    holder: Any = row
    while True:
        key = draw(st.sampled_from(list(holder) if isinstance(holder, dict) else range(len(holder))))
        if not isinstance(holder[key], dict | list) or not holder[key] or draw(st.integers(0, 3)) == 0:
            holder[key] = draw(trees | st.sampled_from(ODD))
            return row
        holder = holder[key]


@given(rows | published(), st.sampled_from(list(Format)), st.sampled_from(["as_is", "chat"]))
@settings(max_examples=500, deadline=None)
def test_any_values_under_known_keys_are_a_row_of_the_normal_form_or_a_bad_row(
    row: dict[str, Any], format_: Format, style: str
) -> None:
    """Never another exception; and what the trainer gets has only the keys and types that it knows."""
    rules = Rules(columns=COLUMNS, prompt_completion=style)
    try:
        content = check_row(json.dumps(row).encode(), detect_format(row, COLUMNS) or format_, rules)
    except LineError:
        return
    finally:
        assert all(isinstance(words, str) for words in describe_unknown(row, rules))
    messages = [*(content.messages or [])]
    for part in (content.prompt, content.completion):
        messages += part if isinstance(part, list) else []
    for message in messages:
        assert message["role"] in ("system", "developer", "user", "assistant", "tool")
        assert isinstance(message["content"], str) or (message["content"] is None and message["tool_calls"])
        assert message.keys() <= {
            "role",
            "content",
            "name",
            "tool_call_id",
            "weight",
            "reasoning_content",
            "tool_calls",
        }
        assert message["role"] == "assistant" or not message.keys() & {"weight", "tool_calls", "reasoning_content"}
        assert message.get("weight", 1) in (0, 1)
        assert isinstance(message.get("weight", 1), int)
        assert all(isinstance(message.get(key, ""), str) for key in ("name", "tool_call_id", "reasoning_content"))
        for call in message.get("tool_calls", ()):
            assert call["type"] == "function"
            assert isinstance(call["function"]["name"], str)
            assert isinstance(call["function"]["arguments"], dict)
    for tool in content.tools or ():
        assert isinstance(tool["function"]["name"], str)
    count_answers(content, "auto")
