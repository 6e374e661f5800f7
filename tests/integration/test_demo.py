"""`dropforge demo`, whole: a newcomer's first minutes, and the main job with everything real."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.support.root import Root, dropforge
from tests.support.sound import assert_sound


@pytest.mark.timeout(600)
def test_every_claim_of_the_demonstration_holds(tmp_path: Path) -> None:
    """Two datasets trained, a killed trainer resumed, a replaced dataset's checkpoints cleared; what is printed is so."""
    folder = tmp_path / "demo root"
    done = dropforge("demo", str(folder), timeout=600, training=True)
    assert done.returncode == 0, done.stdout + done.stderr
    claims = done.stdout.partition("What has to be true")[2].partition("dropforge status")[0]
    assert claims.count("  yes  ") == 4
    assert "NO" not in claims
    for word in ("settled", "claimed", "BLAKE3", "verdict", "cleared", "planned", "held out", "tokens/s", "promoted"):
        assert word in done.stdout
    curves = done.stdout.partition("dropforge plot")[2].partition("dropforge versions")[0]
    assert all(f"000{number} " in curves for number in (1, 2, 3))
    assert "step " in curves
    picture = folder / "curves.png"
    assert picture.is_file() == (importlib.util.find_spec("matplotlib") is not None)
    assert "0003 *" in done.stdout.partition("dropforge versions")[2]
    assert "PeftModel.from_pretrained" in done.stdout
    assert_sound(Root(folder))
