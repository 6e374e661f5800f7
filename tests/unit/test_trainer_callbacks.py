"""What a run tells of itself while it trains."""

from __future__ import annotations

from daemon.trainer.callbacks import seconds_left


def test_the_first_step_says_nothing_of_how_long_the_others_take() -> None:
    """It loads and compiles what they find: counted as one of many, half a minute of it was hours."""
    assert seconds_left(0.0, steps=0, left=500) is None
    assert seconds_left(0.5, steps=1, left=499) == 249.5
    assert seconds_left(9.0, steps=9, left=0) == 0.0
    assert seconds_left(0.0, steps=0, left=0) == 0.0  # of a run of one step
