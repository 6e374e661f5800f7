"""Definitions of tools that many rows repeat are read once, and each row has what it says."""

from __future__ import annotations

import json
from typing import Any

import pytest

from daemon.dataset import tools as module
from daemon.dataset.rows import Format, Rules, check_row
from daemon.dataset.strict_json import LineError


def definition(default: Any, name: str = "weather") -> dict[str, Any]:
    properties = {"days": {"type": "integer", "default": default}}
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


def read(tools: Any) -> Any:
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "tools": tools}
    return check_row(json.dumps(row).encode(), Format.MESSAGES, Rules()).tools


@pytest.mark.parametrize(
    "written", [lambda tools: tools, json.dumps, lambda tools: [json.dumps(tool) for tool in tools]]
)
def test_values_that_python_takes_for_one_another_are_told_apart(written: Any) -> None:
    """1, 1.0 and true are equal there, and a template writes each as it is."""
    for default in (1, True, 1.0, 0, False, None, "1", 2**70, 1):
        tools = [definition(default)]
        expected = [definition(default)]
        if default is None and written(tools) is tools:  # what `datasets` fills up is as if absent
            del expected[0]["function"]["parameters"]["properties"]["days"]["default"]
        assert json.dumps(read(written(tools))) == json.dumps(expected)


def test_the_order_of_keys_is_each_rows_own() -> None:
    one = definition(1)
    other = {"function": dict(reversed(one["function"].items())), "type": "function"}
    assert [json.dumps(read([tool])) for tool in (one, other, one)] == [
        json.dumps([tool]) for tool in (one, other, one)
    ]


def test_a_fault_is_told_of_each_row_that_has_it() -> None:
    for _ in range(2):
        with pytest.raises(LineError, match="a tool needs its function's name"):
            read([definition(1), {"type": "function", "function": {"description": "?"}}])


def test_definitions_are_remembered_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_known", {})
    long = definition(1, "n" * module._REMEMBERED_BYTES)
    assert read([long]) == [long]
    assert not module._known
    for number in range(3 * module._REMEMBERED):
        assert read([definition(number)]) == [definition(number)]
    assert 0 < len(module._known) <= module._REMEMBERED
