"""The loader over a data set behind a URL: the cache of the node is told what comes next."""

import time

import pytest

from mmscale.data.dataset import ShardDataset
from mmscale.data.loader import StepLoader
from shards.store.config import StoreConfig
from shards.store.statistics import StoreStatistics
from tests.data.tiny import SIZE, collator, write
from tests.shards.range_server import RangeServer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("remote") / "d", rows=(9,) * 6)


def batches(dataset, folder, **options):
    made = collator(folder.parent, folder)
    with StepLoader(dataset, made, global_batch=6, micro_batch=6, rank=0, size=1, steps=18, **options) as loader:
        return [(step.keys, step.micro[0].pixels_NCHW, step.work.store) for step in loader]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_set_behind_a_url_gives_the_same_batches_and_is_fetched_once(folder, tmp_path, workers):
    local = batches(ShardDataset(folder, seed=4, image_size=SIZE), folder)
    with RangeServer(folder) as server:
        store = StoreConfig(cache=str(tmp_path / "cache"))
        remote = batches(ShardDataset(server.url, seed=4, image_size=SIZE, store=store), folder, workers=workers)
        fetched = [path for path in server.paths if path.endswith(".tar")]
    assert [keys for keys, *_ in remote] == [keys for keys, *_ in local]
    assert all((a == b).all() for (_, a, _), (_, b, _) in zip(remote, local, strict=True))
    assert sorted(fetched) == sorted(set(fetched))
    assert len(fetched) == 6
    assert sum((store for *_, store in local), StoreStatistics()) == StoreStatistics()
    # counted once, whichever process has asked: the cache's tars, and a sidecar for each process that opens one
    counted = sum((store for *_, store in remote), StoreStatistics())
    tars = sum(path.stat().st_size for path in folder.glob("*.tar"))
    assert tars <= counted.bytes_fetched < 2 * tars
    assert counted.requests >= 6
    assert counted.cache_misses + counted.cache_hits >= 12


def test_what_the_next_steps_need_is_fetched_before_it_is_asked_for(folder, tmp_path):
    with RangeServer(folder) as server:
        store = StoreConfig(cache=str(tmp_path / "cache"), prefetch=6)
        dataset = ShardDataset(server.url, seed=4, image_size=SIZE, store=store)
        made = collator(folder.parent, folder)
        with StepLoader(dataset, made, global_batch=1, micro_batch=1, rank=0, size=1, steps=54, prefetch=1) as loader:
            next(iter(loader))  # one sample of one shard, and the others are on their way
            end = time.monotonic() + 30
            while len({path for path in server.paths if path.endswith(".tar")}) < 6 and time.monotonic() < end:
                time.sleep(0.01)
        assert len({path for path in server.paths if path.endswith(".tar")}) == 6
    assert not ShardDataset(folder).reader.is_cached
