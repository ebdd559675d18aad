"""One fetch a shard a node, bounded bytes, and nothing half-written that is ever taken for a shard."""

import errno
import hashlib
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from shards.digest import file_sha256
from shards.read import ShardReader
from shards.store.base import Stored
from shards.store.cache import NodeCache
from shards.store.config import StoreConfig
from shards.store.statistics import Counters
from tests.shards.bucket import upload
from tests.shards.faulty_proxy import FaultyProxy
from tests.shards.range_server import RangeServer
from tests.shards.tars import flip_bit, make_data_set, pair

REPO = Path(__file__).resolve().parents[2]

READ_ALL = """
import sys
from shards.read import ShardReader
from shards.store.config import StoreConfig
url, cache, bound = sys.argv[1:]
reader = ShardReader(url, store=StoreConfig(cache=cache, cache_bytes=int(bound)))
for epoch in range(2):
    for shard, rows in enumerate(reader.rows_per_shard):
        for row in range(rows):
            sample = reader[shard, row]
            print(sample.key, sample.fields()["number"], sample.captions()[0])
"""


def start(code, *words):
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True
    )


def finished(process):
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    return out.splitlines()


def cached_files(cache):
    return {path.name: path for path in (cache / "objects").iterdir()}


def everything(reader):
    return [reader[shard, row] for shard, rows in enumerate(reader.rows_per_shard) for row in range(rows)]


class Bytes:
    """An object of so many bytes, which counts how often it is fetched."""

    def __init__(self, content):
        self.content, self.fetched = content, 0

    def size(self):
        return len(self.content)

    def fetch(self, sink):
        self.fetched += 1
        sink(0, memoryview(self.content))


def stored(source):
    return Stored("x", len(source.content), hashlib.sha256(source.content).hexdigest())


def test_processes_share_one_fetch_of_each_shard(pairs, s3_port, s3_environment, tmp_path):
    upload(pairs, s3_port, "shared")
    with FaultyProxy(s3_port) as proxy:
        s3_environment.setenv("AWS_ENDPOINT_URL", proxy.url)
        processes = [start(READ_ALL, "s3://shared", tmp_path / "cache", 10**9) for _ in range(4)]
        for process in processes:
            assert finished(process) == [f"k{n:04d} {n} caption {n}" for n in range(60)] * 2
    tars = [f"s-{shard:03d}.tar" for shard in (0, 1, 3)]
    assert [len(proxy.gets(name)) for name in tars] == [1, 1, 1]
    assert [len(proxy.gets(name.replace(".tar", ".index.arrow"))) for name in tars] == [1, 1, 1]
    digests = {file_sha256(path) for path in cached_files(tmp_path / "cache").values()}
    assert digests == set(cached_files(tmp_path / "cache"))
    assert digests == {file_sha256(path) for path in pairs.iterdir() if "002" not in path.name}


def test_a_second_pass_asks_the_store_for_the_manifest_alone(pairs, tmp_path):
    with RangeServer(pairs) as server:
        store = StoreConfig(cache=str(tmp_path / "cache"))
        assert everything(ShardReader(server.url, store=store)) == [pair(n) for n in range(60)]
        before = server.answered
        again = ShardReader(server.url, store=store)
        assert everything(again) == [pair(n) for n in range(60)]
        assert server.answered == before + 1
        counts = again.statistics()
        assert (counts.requests, counts.cache_hits, counts.cache_misses) == (1, 1 + 6, 0)


def test_a_fetcher_that_is_killed_midway_leaves_nothing_that_is_taken_for_a_shard(pairs, tmp_path):
    hold = lambda method, path, ranges, nth: "stall" if path.endswith("s-001.tar") and "bytes=8000-" in ranges else None  # noqa: E731
    cache = tmp_path / "cache"
    code = READ_ALL.replace("cache_bytes=int(bound)", "chunk_bytes=4000, concurrency=1, hedge_share=0.0")
    with RangeServer(pairs) as server, FaultyProxy(server.port, hold) as proxy:
        victim = start(code, proxy.url, cache, 0)
        _wait_for(lambda: any("bytes=8000-" in p.range for p in proxy.gets("s-001.tar")))
        waiter = start(code, proxy.url, cache, 0)  # it waits for the victim, and takes over
        [part] = [path for name, path in cached_files(cache).items() if name.endswith(".part")]
        assert part.stat().st_size == (pairs / "s-001.tar").stat().st_size
        time.sleep(0.5)
        proxy.faults = lambda *request: None
        victim.send_signal(signal.SIGKILL)
        victim.communicate()
        assert finished(waiter) == [f"k{n:04d} {n} caption {n}" for n in range(60)] * 2
    assert all(file_sha256(path) == name for name, path in cached_files(cache).items())


def _wait_for(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_file_that_went_bad_in_the_cache_is_fetched_again_and_replaced(pairs, tmp_path):
    with RangeServer(pairs) as server:
        store = StoreConfig(cache=str(tmp_path / "cache"))
        reader = ShardReader(server.url, store=store)
        assert reader[1, 3] == pair(23)
        tar, sidecar = (cached_files(tmp_path / "cache")[digest] for digest in _digests(reader, 1))
        for path in (tar, sidecar):
            flip_bit(path, path.stat().st_size // 2)
        tar.write_bytes(bytes(tar.stat().st_size))
        again = ShardReader(server.url, store=store)
        assert [again[1, row] for row in range(15)] == [pair(n) for n in range(20, 35)]
        assert again.statistics().cache_misses == 2
        assert all(file_sha256(path) == name for name, path in cached_files(tmp_path / "cache").items())
        tar.write_bytes(b"short")
        assert ShardReader(server.url, store=store)[1, 3] == pair(23)


def _digests(reader, shard):
    info = reader.manifest.shards[shard]
    return info.sha256, info.index_sha256


def test_what_differs_from_the_manifest_at_its_origin_is_not_cached_but_read(pairs, tmp_path, caplog):
    folder = shutil.copytree(pairs, tmp_path / "d")
    flip_bit(folder / "s-001.tar", 100)  # of a tar header: no sample is hurt
    with RangeServer(folder) as server:
        reader = ShardReader(server.url, store=StoreConfig(cache=str(tmp_path / "cache")))
        assert [reader[1, row] for row in range(15)] == [pair(n) for n in range(20, 35)]
    assert [r.message for r in caplog.records] == [
        "s-001.tar differs from its sha256 in the manifest, twice fetched: it is not cached and its samples are read by byte range. "
        "Find the damaged ones with `mmscale shards verify --full`."
    ]
    assert _digests(reader, 1)[0] not in cached_files(tmp_path / "cache")


def test_the_bound_holds_with_several_processes_and_readers_of_deleted_files_go_on(tmp_path):
    folder = make_data_set(tmp_path / "d", (30,) * 8)
    largest = max(path.stat().st_size for path in folder.glob("*.tar"))
    bound = 3 * largest
    with RangeServer(folder) as server:
        processes = [start(READ_ALL, server.url, tmp_path / "cache", bound) for _ in range(4)]
        sizes = []
        while any(process.poll() is None for process in processes):
            sizes.append(_folder_bytes(tmp_path / "cache" / "objects"))
            time.sleep(0.005)
        for process in processes:
            assert finished(process) == [f"k{n:04d} {n} caption {n}" for n in range(240)] * 2
    assert largest < max(sizes) <= bound
    assert all(file_sha256(path) == name for name, path in cached_files(tmp_path / "cache").items())


def _folder_bytes(folder):
    total = 0
    for path in folder.iterdir() if folder.is_dir() else ():
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def test_a_shard_larger_than_the_cache_is_read_by_range(pairs, tmp_path):
    with RangeServer(pairs) as server:
        reader = ShardReader(server.url, store=StoreConfig(cache=str(tmp_path / "cache"), cache_bytes=20_000))
        assert everything(reader) == [pair(n) for n in range(60)]
        assert not any(digest in cached_files(tmp_path / "cache") for digest, _ in (_digests(reader, shard) for shard in (0, 1, 3)))


def test_deleted_files_are_closed_when_the_next_shard_is_opened(tmp_path):
    folder = make_data_set(tmp_path / "d", (10,) * 6)
    bound = 2 * max(path.stat().st_size for path in folder.glob("*.tar")) + 20_000
    with RangeServer(folder) as server:
        reader = ShardReader(server.url, store=StoreConfig(cache=str(tmp_path / "cache"), cache_bytes=bound))
        assert everything(reader) == [pair(n) for n in range(60)]
        held = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        ours = [path for path in held if str(tmp_path / "cache/objects") in path]
        assert 1 <= len(ours) < 6
        assert not any(path.endswith("(deleted)") for path in ours)


def test_what_is_expected_is_fetched_ahead_and_stays_what_is_needed_last_goes(tmp_path):
    folder = make_data_set(tmp_path / "d", (10,) * 6)
    size = max(path.stat().st_size for path in folder.glob("*.tar"))
    sidecars = sum(path.stat().st_size for path in folder.glob("*.arrow")) + (folder / "manifest.parquet").stat().st_size
    with RangeServer(folder) as server:
        reader = ShardReader(server.url, store=StoreConfig(cache=str(tmp_path / "cache"), cache_bytes=3 * size + sidecars))
        other = ShardReader(server.url, store=StoreConfig(cache=str(tmp_path / "cache"), cache_bytes=3 * size + sidecars))

        def held():
            return [n for n in range(6) if _digests(reader, n)[0] in cached_files(tmp_path / "cache")]

        reader.expect([4, 2, 0, 1])
        _wait_for(lambda: held() == [2, 4])
        assert reader[0, 0] == pair(0)
        assert held() == [0, 2, 4]
        assert other[5, 0] == pair(50)  # of another process, so to speak: it knows what this one expects
        assert held() == [2, 4, 5]
        assert other[1, 0] == pair(10)
        assert held() == [1, 2, 4]
        reader.expect([5, 1, 3])
        _wait_for(lambda: held() == [1, 3, 5])  # 1 was there: the two that were missing


def test_a_future_of_a_process_that_is_gone_counts_no_more(tmp_path):
    cache = NodeCache(tmp_path, 100, 1.0, Counters())
    sources = [Bytes(bytes([n]) * 40) for n in range(4)]
    gone = NodeCache(tmp_path, 100, 1.0, Counters())
    gone.expect([stored(sources[0]).sha256])
    os.close(cache.open(stored(sources[0]), sources[0]))
    os.close(cache.open(stored(sources[1]), sources[1]))
    os.close(cache.open(stored(sources[2]), sources[2]))
    assert cache.has(stored(sources[0]))
    del gone
    os.utime(cache.path(stored(sources[0]).sha256), (0, 0))
    os.close(cache.open(stored(sources[3]), sources[3]))
    assert not cache.has(stored(sources[0]))
    assert list((tmp_path / "expected").iterdir()) == []


def test_threads_of_one_process_fetch_once(pairs, tmp_path):
    cache, source = NodeCache(tmp_path, 10**6, 30.0, Counters()), Bytes(b"x" * 100_000)
    threads = [threading.Thread(target=lambda: os.close(cache.open(stored(source), source))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert source.fetched == 1


def test_what_a_killed_process_left_is_deleted_when_its_bytes_are_needed(tmp_path):
    cache = NodeCache(tmp_path, 100, 1.0, Counters())
    (tmp_path / "objects" / "abandoned.part").write_bytes(bytes(90))
    source = Bytes(b"y" * 50)
    os.close(cache.open(stored(source), source))
    assert set(cached_files(tmp_path)) == {stored(source).sha256}


def test_one_process_that_fetches_for_ever_does_not_hold_up_the_others(tmp_path):
    cache, source = NodeCache(tmp_path, 100, 0.2, Counters()), Bytes(b"z" * 50)
    entered, leave = threading.Event(), threading.Event()
    slow = Bytes(source.content)
    slow.fetch = lambda sink: (entered.set(), leave.wait(10), sink(0, memoryview(slow.content)))
    thread = threading.Thread(target=lambda: os.close(cache.open(stored(source), slow)))
    thread.start()
    assert entered.wait(10)
    assert cache.open(stored(source), source, wait=False) is None
    assert cache.open(stored(source), source) is None
    another = Bytes(b"w" * 60)
    assert cache.open(stored(another), another) is None  # what is being fetched makes no room
    leave.set()
    thread.join()
    os.close(cache.open(stored(source), source))
    assert source.fetched == 0


def _one_warning(caplog, text):
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert text in record.getMessage()
    assert "This process goes on without it and reads from the origin by byte range. Free some space, lower" in record.getMessage()


def test_a_disk_that_refuses_a_large_file_while_caching(pairs, tmp_path, caplog):
    size = (pairs / "s-001.tar").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with RangeServer(pairs) as server:
        reader = ShardReader(server.url, store=StoreConfig(cache=str(tmp_path / "cache")))
        assert reader[0, 0] == pair(0)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, before[1]))
        try:
            assert [reader[1, row] for row in range(15)] == [pair(n) for n in range(20, 35)]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert everything(reader) == [pair(n) for n in range(60)]
    _one_warning(caplog, f"The cache {str(tmp_path / 'cache')!r} cannot be written to: {os.strerror(errno.EFBIG)}.")
    assert all(file_sha256(path) == name for name, path in cached_files(tmp_path / "cache").items())


def test_a_cache_folder_that_cannot_be_written_to(pairs, tmp_path, caplog):
    (tmp_path / "file").touch()
    with RangeServer(pairs) as server:
        reader = ShardReader(server.url, store=StoreConfig(cache=str(tmp_path / "file" / "cache")))
        reader.expect([1])
        assert everything(reader) == [pair(n) for n in range(60)]
    _one_warning(caplog, os.strerror(errno.ENOTDIR))


def test_a_cache_folder_that_is_deleted_while_it_is_used(pairs, tmp_path, caplog):
    with RangeServer(pairs) as server:
        reader = ShardReader(server.url, store=StoreConfig(cache=str(tmp_path / "cache")))
        assert reader[0, 0] == pair(0)
        shutil.rmtree(tmp_path / "cache")
        assert everything(reader) == [pair(n) for n in range(60)]
    _one_warning(caplog, "the folder is gone")


@pytest.mark.cluster
def test_a_full_disk_while_caching(tmp_path, caplog):
    folder = make_data_set(tmp_path / "d", (60,) * 6)
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(path.stat().st_size for path in folder.glob("*.tar"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size // 2}", "none", disk], check=True)
    try:
        with RangeServer(folder) as server:
            reader = ShardReader(server.url, store=StoreConfig(cache=str(disk / "cache")))
            assert everything(reader) == [pair(n) for n in range(360)]
            del reader
        assert len(cached_files(disk / "cache")) > 2
        assert all(file_sha256(path) == name for name, path in cached_files(disk / "cache").items())
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
    _one_warning(caplog, os.strerror(errno.ENOSPC))


def test_an_interpreter_that_ends_while_it_fetches_ahead_ends_at_once(pairs, tmp_path):
    code = """
import sys, time
from shards.read import ShardReader
from shards.store.config import StoreConfig
reader = ShardReader(sys.argv[1], store=StoreConfig(cache=sys.argv[2]))
reader.expect([0, 1])
time.sleep(0.5)
print("done")
"""
    with RangeServer(pairs) as server, FaultyProxy(server.port, lambda m, path, r, n: "stall" if path.endswith(".tar") else None) as proxy:
        begin = time.monotonic()
        assert finished(start(code, proxy.url, tmp_path / "cache")) == ["done"]
        assert time.monotonic() - begin < 15


def test_a_lock_and_a_folder_of_futures_that_a_cleaner_of_old_files_took_are_made_again(pairs, tmp_path):
    with RangeServer(pairs) as server:
        reader = ShardReader(server.url, store=StoreConfig(cache=str(tmp_path / "cache")))
        everything(reader)
        shutil.rmtree(tmp_path / "cache" / "expected")
        (tmp_path / "cache" / "lock").unlink()
        for file in cached_files(tmp_path / "cache").values():
            file.unlink()
        again = ShardReader(server.url, store=StoreConfig(cache=str(tmp_path / "cache")))
        shutil.rmtree(tmp_path / "cache" / "expected")
        (tmp_path / "cache" / "lock").unlink()
        assert everything(again) == [pair(n) for n in range(60)]
    assert (tmp_path / "cache" / "lock").exists()
    assert cached_files(tmp_path / "cache")
