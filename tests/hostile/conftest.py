"""The guard that all hostile files are opened under."""

from collections.abc import Iterator

import pytest

from hostile.guard import Guard


@pytest.fixture(scope="session")
def guard() -> Iterator[Guard]:
    """One fork server for all tests of a session."""
    with Guard() as started:
        yield started
