"""Read any sample of a data set by (shard, row): one checked read of exactly its bytes, no scan of its tar."""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from shards.errors import IntegrityError, ShardError
from shards.manifest import Manifest, ShardInfo, load_manifest
from shards.open_shard import OpenShard, stored
from shards.sample import Sample
from shards.store import open_store
from shards.store.base import Store, Stored
from shards.store.config import StoreConfig
from shards.store.place import joined, normal
from shards.store.statistics import StoreStatistics

OPEN_SHARDS = 128
"""Shards a reader keeps open by default: a file descriptor and a mapped sidecar each."""
RETRY_WAITS_S = (0.05, 0.2, 0.8)
"""Pauses before each further attempt at a read that the system refused; a store behind a URL has its own."""


class ShardReader:
    """Random access to the samples of a data set.

    `reader[shard, row]` returns a `Sample` whose every part matched its checksum. Threads may share a reader, forked processes may go on
    with their parent's (of a local folder), and pickling sends the place alone.

    Args:
        path: the data set's folder or URL, with its manifest.
        open_shards: how many shards are kept open.
        check_files: False opens a local data set whose shards are not all there, as verification must. Behind a URL the files are not
            listed in either case.
        store: requests and the node's cache, for a URL.

    Raises:
        ConfigError: a URL that cannot be opened.
        ShardError: no data set there, or an unfinished one.
    """

    def __init__(
        self, path: str | Path, *, open_shards: int = OPEN_SHARDS, check_files: bool = True, store: StoreConfig | None = None
    ) -> None:
        self.path = path
        self.open_shards = open_shards
        self._config = store
        self._load(check_files, None)

    def __len__(self) -> int:
        """Samples in the data set."""
        return self._rows

    @property
    def digest(self) -> str:
        """The data set's version."""
        return self.manifest.digest

    def __getitem__(self, place: tuple[int, int]) -> Sample:
        """Read one sample.

        Raises:
            IndexError: no such shard or row.
            IntegrityError: its bytes differ from the checksum, or the tar ends before them, also when fetched once more.
            ShardError: its tar or sidecar is missing, or it still cannot be read after all repetitions.
        """
        shard, row = place
        opened = self._open(shard)
        try:
            return opened.sample(row)
        except (OSError, IntegrityError) as e:
            return self._again(shard, row, e)

    def key(self, shard: int, row: int) -> str:
        """Return the key of a sample without reading it."""
        return self._open(shard).key(row)

    def index(self, shard: int) -> pa.Table:
        """Return the kept rows of a shard's sidecar (columns of `shards.sidecar.SCHEMA`), mapped into memory where all are kept."""
        return self._open(shard).kept_table()

    @property
    def is_cached(self) -> bool:
        """Whether shards are fetched into a cache of the node, so that `expect` is of use."""
        return self.store.is_cached

    def expect(self, upcoming: Sequence[int]) -> None:
        """Say which shards this node will read next, so that its cache fetches ahead and deletes what is needed last.

        Args:
            upcoming: shard numbers in the order of their next use by any process of the node, about as many as the cache holds. What is
                not among them goes first.
        """
        places: dict[str | None, list[tuple[Stored, Stored]]] = {}
        for info in (self.manifest.shards[shard] for shard in upcoming):
            places.setdefault(info.location, []).append(stored(info))
        for location, wanted in places.items():
            self.store_at(location).expect(wanted)

    def store_at(self, location: str | None) -> Store:
        """Return where the tars of a location of the manifest lie; None is the data set's own folder or URL."""
        if location is None:
            return self.store
        with self._lock:
            if location not in self._stores:
                self._stores[location] = open_store(joined(normal(self.path), location), self._config)
            return self._stores[location]

    def statistics(self) -> StoreStatistics:
        """Return what reading from the store took so far in this process; all zero for a local folder."""
        with self._lock:
            others = list(self._stores.values())
        return sum((store.statistics() for store in others), self.store.statistics())

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the place, not the open files."""
        return {"path": self.path, "open_shards": self.open_shards, "config": self._config, "manifest": self.manifest.file_sha256}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open the same data set in another process."""
        self.path, self.open_shards, self._config = state["path"], state["open_shards"], state["config"]
        self._load(True, state["manifest"])

    def _load(self, check_files: bool, expected: str | None) -> None:
        self.store: Store = open_store(self.path, self._config)
        self.manifest: Manifest = load_manifest(self.store, check_files=check_files, expected=expected)
        self.rows_per_shard = self.manifest.rows_per_shard
        self._rows = self.manifest.rows
        self._stores: dict[str, Store] = {}
        self._forget()

    def _open(self, shard: int) -> OpenShard:
        if self._pid != os.getpid():
            self._forget()  # another thread of the parent may have held the lock at the fork
        with self._lock:
            opened = self._opened.get(shard)
            if opened is not None:
                self._opened.move_to_end(shard)
                return opened
        if not 0 <= shard < len(self.manifest.shards):
            raise IndexError(f"There is no shard {shard}: the data set has {len(self.manifest.shards)}.")
        with self._lock:
            gate = self._gates.setdefault(shard, threading.Lock())
        with gate:  # one thread opens it, the others wait for that
            with self._lock:
                opened = self._opened.get(shard)
            return opened or self._keep(shard, self._attempt(shard))

    def _keep(self, shard: int, opened: OpenShard) -> OpenShard:
        with self._lock:
            for number in [n for n, o in self._opened.items() if o.stale]:
                del self._opened[number]  # deleted from the cache: its space is free only when it is closed
            self._opened[shard] = opened
            self._gates.pop(shard, None)
            while len(self._opened) > self.open_shards:
                self._opened.popitem(last=False)  # closed when the last thread that reads from it lets go
        return opened

    def _attempt(self, shard: int) -> OpenShard:
        """Open a shard, again after each pause where the system refuses."""
        info = self.manifest.shards[shard]
        for wait_s in (*RETRY_WAITS_S, None):
            try:
                return OpenShard(self.store_at(info.location), info)
            except FileNotFoundError as e:
                raise ShardError(self._gone(info)) from e
            except OSError as e:
                if wait_s is None:
                    raise ShardError(_refused(info.shard, e)) from e
                time.sleep(wait_s)
        raise AssertionError("unreachable")

    def _again(self, shard: int, row: int, error: Exception) -> Sample:
        """Read a sample once more where its bytes were wrong, a few times more where the system refused."""
        info = self.manifest.shards[shard]
        for wait_s in RETRY_WAITS_S:
            self._drop(shard)
            if isinstance(error, FileNotFoundError):
                raise ShardError(self._gone(info)) from error
            if isinstance(error, OSError):
                time.sleep(wait_s)
            opened = self._open(shard)
            try:
                opened.distrust(row)
                return opened.sample(row)
            except IntegrityError:
                raise
            except OSError as e:
                error = e
        raise ShardError(_refused(f"{info.shard}:{self.key(shard, row)}", error)) from error

    def _gone(self, info: ShardInfo) -> str:
        return f"The shard {info.shard!r} is no longer in {self.store_at(info.location).root!r}. Copy it there again."

    def _drop(self, shard: int) -> None:
        """Close a shard, and delete the cache's copy of it."""
        with self._lock:
            self._opened.pop(shard, None)
        info = self.manifest.shards[shard]
        self.store_at(info.location).discard(stored(info)[0])

    def _forget(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._opened: OrderedDict[int, OpenShard] = OrderedDict()
        self._gates: dict[int, threading.Lock] = {}


def _refused(where: str, error: Exception) -> str:
    attempts = len(RETRY_WAITS_S) + 1
    return f"{where} cannot be read, {attempts} times tried: {error}. Check the disk or the mount it is on."
