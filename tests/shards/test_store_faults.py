"""Through a store that fails, stalls and cuts answers short, everything is read once and right; what stays broken is told in time."""

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from shards.errors import ShardError
from shards.order import GlobalOrder
from shards.read import ShardReader
from shards.store.config import StoreConfig
from shards.store.failure import brief, is_retryable
from shards.store.hedge import BURST, FIRST_S, KNOWN_AFTER, Hedge, size_class
from tests.shards.bucket import upload
from tests.shards.faulty_proxy import Faults, FaultyProxy
from tests.shards.range_server import RangeServer
from tests.shards.tars import make_data_set, pair


@pytest.mark.parametrize("cached", [False, True])
def test_a_pass_through_faults_loses_nothing_and_repeats_nothing(tmp_path, s3_port, s3_environment, cached):
    folder = make_data_set(tmp_path / "d", (100, 80, 120))
    bucket = f"faults-{cached}".lower()
    upload(folder, s3_port, bucket)
    store = StoreConfig(cache=str(tmp_path / "cache") if cached else None, chunk_bytes=4096, deadline_s=60)
    with FaultyProxy(s3_port, Faults(fail=0.05, stall=0.01, truncate=0.01, throttle=0.01, reset=0.01, seed=3)) as proxy:
        s3_environment.setenv("AWS_ENDPOINT_URL", proxy.url)
        reader = ShardReader(f"s3://{bucket}", store=store)
        order = GlobalOrder(reader.rows_per_shard, seed=5)
        _, shards, rows = order.locate(np.arange(300))
        with ThreadPoolExecutor(8) as threads:
            samples = list(threads.map(reader.__getitem__, zip(shards.tolist(), rows.tolist(), strict=True)))
    faults = Counter(passed.fault for passed in proxy.passed)
    assert min(faults[name] for name in ("fail", "stall", "truncate", "throttle", "reset")) >= 1
    local = ShardReader(folder)
    assert samples == [local[place] for place in zip(shards.tolist(), rows.tolist(), strict=True)]
    assert Counter(sample.key for sample in samples) == Counter(f"k{number:04d}" for number in range(300))
    counts = reader.statistics()
    assert counts.retries >= faults["fail"] + faults["truncate"] + faults["throttle"] + faults["reset"] - counts.hedges
    assert counts.hedges <= 0.05 * counts.requests + BURST + 2 * faults["stall"]
    assert len(proxy.passed) <= counts.requests <= len(proxy.passed) + counts.hedges  # some are called off before they are sent


def test_a_stalled_read_is_asked_for_again_and_not_waited_for(pairs):
    stall_once = lambda method, path, ranges, nth: "stall" if path.endswith("s-000.tar") and nth == 0 else None  # noqa: E731
    with RangeServer(pairs) as server, FaultyProxy(server.port, stall_once) as proxy:
        reader = ShardReader(proxy.url)
        begin = time.monotonic()
        assert reader[0, 0] == pair(0)
        assert FIRST_S <= time.monotonic() - begin < 10
        assert (reader.statistics().hedges, reader.statistics().retries) == (1, 0)


def test_without_hedging_a_stalled_request_is_repeated_after_its_timeout(pairs):
    stall_once = lambda method, path, ranges, nth: "stall" if path.endswith("s-000.tar") and nth == 0 else None  # noqa: E731
    with RangeServer(pairs) as server, FaultyProxy(server.port, stall_once) as proxy:
        reader = ShardReader(proxy.url, store=StoreConfig(hedge_share=0.0, request_timeout_s=0.4))
        assert reader[0, 0] == pair(0)
        assert (reader.statistics().hedges, reader.statistics().retries) == (0, 1)


def test_a_store_that_keeps_failing_is_given_up_by_count(pairs):
    with RangeServer(pairs) as server, FaultyProxy(server.port, lambda *request: "fail") as proxy:
        with pytest.raises(
            ShardError, match=r"manifest\.parquet' cannot be read, 3 times tried within 120 s: HTTP 500 Internal Server Error\."
        ):
            ShardReader(proxy.url, store=StoreConfig(retries=2))
        assert len(proxy.passed) == 3


def test_a_store_that_never_answers_is_given_up_at_the_deadline(pairs):
    with RangeServer(pairs) as server, FaultyProxy(server.port, lambda *request: "stall") as proxy:
        begin = time.monotonic()
        with pytest.raises(ShardError, match=r"cannot be read, 1 times tried within 0\.6 s: the deadline passed\. Check the store and the"):
            ShardReader(proxy.url, store=StoreConfig(deadline_s=0.6))
        with pytest.raises(
            ShardError, match=r"cannot be read, [2-5] times tried within 0\.9 s: (no answer in 0\.2 s|timed out|the deadline passed)\."
        ):
            ShardReader(proxy.url, store=StoreConfig(deadline_s=0.9, request_timeout_s=0.2, hedge_share=0.0))
        assert time.monotonic() - begin < 4


def test_a_server_that_is_not_there():
    with pytest.raises(
        ShardError, match=r"'http://127\.0\.0\.1:1/d/manifest\.parquet' cannot be read, 2 times tried .*: Connection refused\."
    ):
        ShardReader("http://127.0.0.1:1/d", store=StoreConfig(retries=1))


def test_hedging_keeps_to_its_share():
    hedge = Hedge(0.1)
    assert hedge.pauses_s("4^7") == [(FIRST_S, False), (15 * FIRST_S, True), (48 * FIRST_S, True)]
    for number in range(KNOWN_AFTER):
        hedge.observe("4^7", 0.001 * number)
    assert hedge.pauses_s("4^7") == [(pytest.approx(0.018), False), (pytest.approx(FIRST_S - 0.018), True), (3 * FIRST_S, True)]
    assert hedge.pauses_s("4^2")[0] == (FIRST_S, False)
    assert [hedge.take(False) for _ in range(5)] == [True] * int(BURST) + [False]
    assert hedge.take(True)
    taken = 0
    for _ in range(1000):
        hedge.observe("4^7", 0.01)
        taken += hedge.take(False)
    assert taken == pytest.approx(100, abs=BURST)
    assert Hedge(0.0).pauses_s("4^7") == []
    assert [size_class(size) for size in (1000, 4000, 5000, 20000)] == ["4^5", "4^6", "4^6", "4^7"]


@pytest.mark.parametrize(
    ("text", "retryable", "words"),
    [
        ("Server returned non-2xx status code: 503 Service Unavailable: <html>", True, "HTTP 503 Service Unavailable"),
        ("Server returned non-2xx status code: 429 Too Many Requests: x", True, "HTTP 429 Too Many Requests"),
        ("Server returned non-2xx status code: 400 Bad Request: err", False, "HTTP 400 Bad Request"),
        ("HTTP error: error sending request\n\nsource: ConnectionReset", True, "connection reset"),
        ("HTTP error: builder error", False, "HTTP error: builder error"),
        ("odd http://u:p@h/x?sig=1 thing\nmore", True, "odd http://h/x?... thing"),
        ("", True, "no reason given"),
    ],
)
def test_failures_are_sorted(text, retryable, words):
    assert (is_retryable(text), brief(text)) == (retryable, words)
