"""The explorer in a browser: one is started for each file, and what goes wrong on a page fails its test."""

from collections.abc import Iterator
from typing import Any

import pytest
from browsing import Faults, launched


# For a file and no longer: while playwright is open, no other test in its process may run an event loop.
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as found:
        yield found


@pytest.fixture
def faults() -> Iterator[Faults]:
    """What goes wrong on pages that are opened with it fails the test in the end."""
    found = Faults()
    yield found
    assert not found, "\n".join(found)
