"""What the tests of checkpoints share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.checkpoint.forks import Forks


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Calls functions on several ranks: `forks(function, ranks, name=value, ...)`."""
    runner = Forks()
    yield runner
    runner.close()
