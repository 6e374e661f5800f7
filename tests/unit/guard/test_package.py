"""The package itself: what it imports, what it exports, how its errors read."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest

import guard
from guard import errors


def test_importing_it_needs_blake3_and_nothing_else() -> None:
    """No daemon, no torch, no transformers, no third-party module but blake3; also for the command."""
    code = (
        "import sys; before = set(sys.modules); import guard, guard.cli; "
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "print(sorted(new - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['blake3', 'guard']"


def test_everything_exported_is_there() -> None:
    pytest.importorskip("transformers")
    for name in guard.__all__:
        assert getattr(guard, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = guard.nothing


def test_an_error_says_what_could_not_be_done_and_what_to_do() -> None:
    error = guard.SealBroken(operation="verify", path="model/checkpoint-4000", cause="it was damaged", hint="look")
    assert str(error) == "cannot verify model/checkpoint-4000: it was damaged\nhint: look"
    assert str(guard.SealBroken(operation="verify", path="x", cause="y")) == "cannot verify x: y"


def test_errors_cross_a_process_pool() -> None:
    error = guard.ModelLocked(operation="lock", path="model", cause="it is in use", holder={"pid": 7})
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is guard.ModelLocked
    assert str(again) == str(error)
    assert again.holder == {"pid": 7}


def test_every_error_has_an_exit_code_of_the_table() -> None:
    classes = [item for item in vars(errors).values() if isinstance(item, type) and issubclass(item, guard.GuardError)]
    assert len(classes) > 10
    assert {item.exit_code for item in classes} <= {1, 2, 3, 4, 5}
    assert guard.ModelLocked.exit_code == 5
    assert guard.NotFound.exit_code == 4
    assert guard.UsageError.exit_code == 2
