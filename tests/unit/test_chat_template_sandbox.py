"""The sandbox of chat templates looks things up in less time, and gives and forbids what it did."""

from __future__ import annotations

import re
from typing import Any

import jinja2
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from daemon.trainer.chat_template import quicken

MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "Which fruit?", "items": "a key that is a dictionary's method", "__class__": "a key"},
    {"role": "assistant", "content": None, "_private": "of nobody", "tool_calls": [{"function": {"name": "weather"}}]},
]
EXPRESSIONS = [
    "m.role", "m.content", "m.missing", "m.missing.deeper", "m.missing is defined", "m.items", "m.items()", "m['items']",
    "m.get('role')", "m.tool_calls[0].function.name", "m.tool_calls.missing", "m._private", "m.__class__", "m['__class__']",
    "m.role.upper()", "m.role.format", "m.role.format(1)", "m.role.__class__", "m.role.missing", "m.content.missing",
    "m.update({'role': 'system'})", "m.pop('role')", "m.clear()", "m.keys() | list", "messages.append(m)", "messages.pop()",
    "messages.index(m)", "messages.sort", "loop.index0", "loop.last", "loop.__class__", "loop.previtem.role", "ns.at",
    "ns.missing", "ns.__init__", "ns.__dict__", "cycler.__init__.__globals__", "'{0.__class__}'.format(m)", "range.mro",
    "joiner.mro", "lipsum.__globals__", "self.__init__", "m.copy().role", "m.fromkeys", "messages.copy()[0].role",
]  # fmt: skip


def environment(*, quick: bool) -> Any:
    made = ImmutableSandboxedEnvironment()
    if quick:
        quicken(made)
    return made


def outcome(made: Any, expression: str) -> str:
    template = f"{{% set ns = namespace(at=1) %}}{{% for m in messages %}}{{{{ {expression} }}}};{{% endfor %}}"
    try:
        text = made.from_string(template).render(messages=[dict(message) for message in MESSAGES])
    except (jinja2.TemplateError, TypeError, AttributeError) as error:
        text = f"{type(error).__name__}: {error}"
    return re.sub(r" at 0x\w+", "", text)


EXPECTED = {expression: outcome(environment(quick=False), expression) for expression in EXPRESSIONS}


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_expression_comes_to_the_same(expression: str) -> None:
    quick = environment(quick=True)
    quicken(quick)  # a template may be compiled for several tokenizers
    assert [outcome(quick, expression), outcome(quick, expression)] == [EXPECTED[expression]] * 2


def test_what_was_asked_before_changes_no_verdict() -> None:
    quick = environment(quick=True)
    for _ in range(2):
        assert {expression: outcome(quick, expression) for expression in EXPRESSIONS} == EXPECTED
    assert EXPECTED["messages.append(m)"].startswith("SecurityError")
    assert EXPECTED["messages.index(m)"] == "0;1;"
