"""A data set behind a URL: through the node's cache where there is one, else sample by sample by byte range."""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import pyarrow as pa

from shards.store.base import Stored, Tar
from shards.store.cache import NodeCache
from shards.store.config import StoreConfig
from shards.store.local import LocalTar
from shards.store.origin import Backend, Origin, Sink
from shards.store.place import shown
from shards.store.prefetch import Prefetcher
from shards.store.statistics import Counters, StoreStatistics


class RemoteStore:
    """A bucket, a server or another file system.

    Args:
        url: the root.
        backend: makes single requests to it.
        config: how they are made, and the cache.
    """

    def __init__(self, url: str, backend: Backend, config: StoreConfig) -> None:
        self.root = shown(url)
        self._counters = Counters()
        self._origin = Origin(url, backend, config, self._counters)
        self._config = config
        self._cache = _cache(config, self._counters)
        self._upcoming: Sequence[tuple[Stored, Stored]] = ()
        self._prefetcher = Prefetcher(self._prefetch)

    def tar(self, tar: Stored) -> Tar:
        """Open a shard: the node's copy of it, or the one at the origin by byte range."""
        descriptor = self._cache.open(tar, _AtOrigin(self._origin, tar)) if self._cache else None
        return RangeTar(self._origin, tar.name) if descriptor is None else LocalTar(descriptor)

    def whole(self, name: str, sha256: str | None = None) -> pa.Buffer:
        """Return all bytes of a small object, mapped from the cache where there is one."""
        if self._cache is None:
            return pa.py_buffer(self._origin.read_whole(name))
        if sha256 is None:
            data = self._origin.read_whole(name)
            stored = Stored(name, len(data), hashlib.sha256(data).hexdigest())
            descriptor = self._cache.open(stored, _InMemory(data))
            _close(descriptor)
            return pa.py_buffer(data)
        descriptor = self._cache.open(stored := Stored(name, None, sha256), _AtOrigin(self._origin, stored))
        return pa.py_buffer(self._origin.read_whole(name)) if descriptor is None else _map(descriptor)

    def size(self, name: str) -> int:
        """Return the size of an object in bytes."""
        return self._origin.size(name)

    def sha256(self, name: str) -> str:
        """Hash an object at its origin."""
        return self._origin.sha256(name)

    def names(self) -> set[str] | None:
        """List the objects directly below the root; None where the store cannot list."""
        found = self._origin.names()
        return None if found is None else set(found)

    def discard(self, stored: Stored) -> None:
        """Delete the cached copy of an object."""
        if self._cache:
            self._cache.discard(stored.sha256)

    @property
    def is_cached(self) -> bool:
        """Whether `expect` is of any use."""
        return self._cache is not None

    def expect(self, upcoming: Sequence[tuple[Stored, Stored]]) -> None:
        """Keep what is used next, and fetch the first of it that is missing."""
        if self._cache:
            self._upcoming = upcoming
            self._cache.expect([stored.sha256 for pair in upcoming for stored in pair])
            if self._config.prefetch and upcoming:
                self._prefetcher.start(min(self._config.prefetch, len(upcoming)))

    def statistics(self) -> StoreStatistics:
        """Return what reading took so far in this process."""
        return self._counters.snapshot()

    def _prefetch(self, number: int) -> None:
        """Fetch what is missing of the first shard that is not cached yet; those before it are in use already."""
        if self._cache is None or not self._cache.usable:
            return
        cache = self._cache
        missing = ((2 * i + j, stored) for i, pair in enumerate(self._upcoming) for j, stored in enumerate(pair) if not cache.has(stored))
        fetched = 0
        for place, stored in islice(missing, 2 * self._config.prefetch):  # others may be fetching some of them
            descriptor = cache.open(stored, _AtOrigin(self._origin, stored), later_than=place, wait=False)
            _close(descriptor)
            fetched += descriptor is not None
            if fetched == 2:
                return


class RangeTar:
    """A tar at its origin."""

    stale = False

    def __init__(self, origin: Origin, name: str) -> None:
        self._origin, self._name = origin, name

    def read(self, begin: int, size: int) -> bytes:
        """Read a range of bytes; fewer where the tar ends before them."""
        return self._origin.read(self._name, begin, size)

    def distrust(self, begin: int, size: int) -> None:
        """Do nothing: no copy is kept."""


class _AtOrigin:
    """A whole object to be fetched."""

    def __init__(self, origin: Origin, stored: Stored) -> None:
        self._origin, self._stored = origin, stored
        self._size = stored.size

    def size(self) -> int:
        if self._size is None:
            self._size = self._origin.size(self._stored.name)
        return self._size

    def fetch(self, sink: Sink) -> None:
        self._origin.download(self._stored.name, self.size(), sink)


class _InMemory:
    """An object that has just been fetched."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def size(self) -> int:
        return len(self._data)

    def fetch(self, sink: Sink) -> None:
        sink(0, memoryview(self._data))


def _cache(config: StoreConfig, counters: Counters) -> NodeCache | None:
    return None if config.cache is None else NodeCache(Path(config.cache), config.cache_bytes, config.deadline_s, counters)


def _map(descriptor: int) -> pa.Buffer:
    """Map an open file into memory and close it."""
    try:
        empty = os.fstat(descriptor).st_size == 0
        return pa.py_buffer(b"" if empty else mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ))
    finally:
        os.close(descriptor)


def _close(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)
