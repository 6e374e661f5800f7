"""Fingerprints: equal exactly when no identity component differs; differences complete and in order."""

from __future__ import annotations

import copy
import enum
import json
import math
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import guard
from guard.components import COMPONENTS, ComponentKind, component_of
from guard.fingerprint import to_json_value
from tests.unit.guard.conftest import make_fingerprint

NAMES = [component.name for component in COMPONENTS if not component.name.endswith("*")]
words = st.text('ab \nü"', max_size=5)
numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
scalars = st.none() | st.booleans() | numbers | words
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=5,
)
components = st.dictionaries(st.sampled_from([*NAMES, "lora.from_the_future", "attempt.hostname"]), values, max_size=8)


@settings(deadline=None, max_examples=200)
@given(components, components)
def test_two_fingerprints_are_one_run_exactly_when_no_identity_differs(old: Any, new: Any) -> None:
    one, other = guard.Fingerprint(old), guard.Fingerprint(new)
    changed = [difference for difference in one.differences(other) if difference.is_identity]
    assert one.same_run(other) == (changed == [])
    assert [d.name for d in one.differences(other)] == [d.name for d in other.differences(one)]


@settings(deadline=None, max_examples=200)
@given(components)
def test_a_fingerprint_survives_json_and_pickle(old: Any) -> None:
    one = guard.Fingerprint(old)
    again = guard.Fingerprint.from_json(json.loads(json.dumps(one.to_json())))
    assert again == one
    assert again.identity_digest == one.identity_digest
    assert one.differences(again) == ()
    assert pickle.loads(pickle.dumps(one)) == one
    assert hash(again) == hash(one)


@settings(deadline=None, max_examples=200)
@given(components)
def test_the_line_of_a_difference_never_shows_the_same_on_both_sides(old: Any) -> None:
    for difference in guard.Fingerprint(old).differences(guard.Fingerprint({})):
        name, _, change = str(difference).partition(": ")
        assert name == difference.name or (difference.name.startswith("lora.") and name.startswith("LoRA "))
        assert "\n" not in str(difference)
        assert change != "null -> null"


def test_differences_come_in_the_order_in_which_a_person_looks() -> None:
    new = make_fingerprint(
        training__save_steps=99,
        lora__r=16,
        dataset__digest="c" * 64,
        zeta__unknown=1,
        lora__from_the_future=1,
        model__digest="d" * 64,
        attempt__hostname="b",
        training__learning_rate=1,
    )
    differences = make_fingerprint().differences(new)
    assert [difference.name for difference in differences] == [
        "dataset.digest",
        "model.digest",
        "lora.r",
        "lora.from_the_future",
        "training.learning_rate",
        "training.save_steps",
        "attempt.hostname",
        "zeta.unknown",
    ]
    assert [difference.name for difference in differences if not difference.is_identity] == [
        "training.save_steps",
        "attempt.hostname",
    ]


def test_a_name_that_the_table_does_not_know_is_identity() -> None:
    assert component_of("lora.from_the_future").kind is ComponentKind.IDENTITY
    assert not make_fingerprint().same_run(make_fingerprint(lora__from_the_future=1))


def test_not_recorded_and_not_set_are_the_same() -> None:
    assert make_fingerprint().same_run(make_fingerprint(lora__eva_config=None))
    assert make_fingerprint().differences(make_fingerprint(lora__eva_config=None)) == ()


def test_a_name_stands_in_for_a_digest_that_is_not_known() -> None:
    """With digests the model's name is a note; without one on either side the name is all there is."""
    assert make_fingerprint(model__name="a").same_run(make_fingerprint(model__name="b"))
    one, other = (make_fingerprint(model__digest=None, model__name=name) for name in "ab")
    assert not one.same_run(other)
    assert [difference.is_identity for difference in one.differences(other)] == [True]
    known = make_fingerprint(model__name="b")
    assert all(difference.is_identity for difference in known.differences(one))


def test_the_factors_of_the_global_batch_are_notes() -> None:
    one = make_fingerprint(training__per_device_train_batch_size=4, training__gradient_accumulation_steps=2)
    other = make_fingerprint(training__per_device_train_batch_size=8, training__gradient_accumulation_steps=1)
    assert one.same_run(other)
    assert len(one.differences(other)) == 2


class Colour(enum.Enum):
    RED = "red"


@dataclass
class Config:
    paths: tuple[Path, ...]


def test_values_become_what_json_will_give_back() -> None:
    value = {
        "set": {"v", "q"},
        "enum": Colour.RED,
        "data": Config((Path("/a"),)),
        "one": 1.0,
        Colour.RED: 0.5,
    }
    assert to_json_value(value) == {
        "set": ["q", "v"],
        "enum": "red",
        "data": {"paths": ["/a"]},
        "one": 1,
        "red": 0.5,
    }
    assert make_fingerprint(lora__lora_alpha=16.0).same_run(make_fingerprint())
    assert not make_fingerprint(lora__use_dora=True).same_run(make_fingerprint(lora__use_dora=1))
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="no place in a fingerprint"):
            make_fingerprint(lora__r=bad)
    with pytest.raises(TypeError, match="bytes"):
        make_fingerprint(lora__r=b"8")


def test_lists_that_are_sets_have_no_order_and_others_keep_theirs() -> None:
    one, other = (make_fingerprint(lora__target_modules=modules) for modules in (["q", "v"], ("v", "q")))
    assert one.same_run(other)
    assert one == other
    one, other = (make_fingerprint(lora__alora_invocation_tokens=tokens) for tokens in ([1, 2], [2, 1]))
    assert not one.same_run(other)


def test_a_fingerprint_does_not_change_with_the_values_it_was_made_from() -> None:
    modules = ["q_proj"]
    one = make_fingerprint(lora__target_modules=modules)
    before = copy.deepcopy(one.to_json())
    modules.append("v_proj")
    assert one.to_json() == before
    with pytest.raises(TypeError):
        one.components["lora.r"] = 1  # type: ignore[index]


def test_long_values_are_shortened_but_never_look_alike() -> None:
    one, other = (make_fingerprint(tokenizer__chat_template="x" * 5000 + end) for end in "ab")
    (difference,) = one.differences(other)
    old, _, new = str(difference).removeprefix("tokenizer.chat_template: ").partition(" -> ")
    assert old != new
    assert len(old) < 120


def test_every_component_has_its_own_name_and_a_reason_of_one_line() -> None:
    names = [component.name for component in COMPONENTS]
    assert len(names) == len(set(names))
    for component in COMPONENTS:
        assert component.reason
        assert "\n" not in component.reason
        if component.instead_of is not None:
            assert component.kind is ComponentKind.NOTE
            assert component_of(component.instead_of).kind is ComponentKind.IDENTITY


def test_a_change_of_a_dataset_without_a_name_is_told_by_its_digests() -> None:
    """Where one name is not known, none is invented."""
    old, new = (
        guard.Fingerprint({"dataset.digest": "a", "dataset.name": "a.jsonl"}),
        guard.Fingerprint({"dataset.digest": "b"}),
    )
    assert old.explain_changes(new) == ("dataset.digest: a -> b",)
