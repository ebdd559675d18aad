"""One S3 server for all tests of the ground floor."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.shards.bucket import ENVIRONMENT, s3_server
from tests.shards.tars import make_data_set


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    """Port of an S3 server."""
    with s3_server() as port:
        yield port


@pytest.fixture
def s3_environment(s3_port: int, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Set credentials and endpoint of that server; a test may point the endpoint elsewhere."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3_port}")
    return monkeypatch


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 60 numbered pairs in 4 shards; tests copy it before they change it."""
    return make_data_set(tmp_path_factory.mktemp("pairs"), (20, 15, 0, 25))
