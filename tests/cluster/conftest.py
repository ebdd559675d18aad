"""One cluster for all tests here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster, missing
from tests.cluster.jobs import Jobs
from tests.training.conftest import glyphs, stage

__all__ = ["glyphs", "stage"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests here need what not every machine has; they say what is missing."""
    reason = missing() if any("tests/cluster" in str(item.path) for item in items) else None
    for item in items:
        if "tests/cluster" in str(item.path) and reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two hosts and a controller."""
    cluster = Cluster(2)
    yield cluster
    cluster.close()


@pytest.fixture(scope="session")
def jobs(cluster: Cluster, stage: Path, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """Runs of the tiny stage on the cluster."""
    return Jobs(cluster, stage, tmp_path_factory.mktemp("jobs"))
