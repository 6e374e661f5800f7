"""What others write is read or refused in our own words, in little time: over the kept inputs, and odd ones made of them.

`make fuzz` looks for more, for as long as you like; what it finds goes into `corpus/`, under a name that says what it is.
"""

from __future__ import annotations

from random import Random

import pytest

from tests.fuzz import harness, targets

MUTATIONS = 250  # for each target: about a second


def refuse(found: list[harness.Finding]) -> None:
    shown = "\n\n".join(f"{finding.data[:300]!r}\n{finding.report}" for finding in found[:5])
    assert not found, shown


@pytest.mark.parametrize("target", targets.TARGETS)
def test_every_kept_input_is_read_or_refused_in_our_own_words(target: str) -> None:
    kept = {path.name: path.read_bytes() for path in harness.kept_inputs(target)}
    assert kept
    harness.examine(target, b"")  # what is imported late takes its time once
    refuse([finding for data in kept.values() if (finding := harness.examine(target, data))])


@pytest.mark.parametrize("target", targets.TARGETS)
def test_so_are_odd_inputs_that_are_made_of_them(target: str) -> None:
    """The same ones each time: a failure here comes again."""
    random, kept = Random(target), [path.read_bytes() for path in harness.kept_inputs(target)]
    harness.examine(target, b"")
    mutated = (harness.mutate(random.choice(kept), random, kept) for _ in range(MUTATIONS))
    refuse([finding for data in mutated if (finding := harness.examine(target, data))])


def test_an_error_that_is_not_documented_and_a_slow_read_are_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the tests above could not fail."""

    def stumble(data: bytes, folder: object) -> None:
        if data == b"slow":
            monkeypatch.setattr(harness, "READ_SECONDS", -1.0)
        else:
            raise KeyError(data)

    monkeypatch.setattr(harness, "TARGETS", {"odd": stumble})
    found, slow = harness.examine("odd", b"x"), harness.examine("odd", b"slow")
    assert found is not None
    assert found.place == "test_fuzz.py:stumble: KeyError"
    assert slow is not None
    assert "4 bytes" in slow.report
