"""What the tests of checkpoints share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.checkpoint.forks import Forks
from tests.shards.bucket import s3_server


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Calls functions on several ranks: `forks(function, ranks, name=value, ...)`."""
    runner = Forks()
    yield runner
    runner.close()


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    """Port of an S3 server."""
    with s3_server() as port:
        yield port
