"""One machine for all the tests of this folder; each test has the service to itself."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.system.machine import Machine, missing


@pytest.fixture(scope="session")
def machine() -> Iterator[Machine]:
    """A booted machine. Skips with the reason where none can be booted."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    booted = Machine()
    try:
        booted.start()
        yield booted
    finally:
        booted.stop()
