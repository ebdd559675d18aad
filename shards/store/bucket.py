"""A place in an object store that is written to: objects are put, listed, fetched and deleted.

An upload's requests are repeated part by part, by obstore; what fails all the same, and every read, by `Origin`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from shards.errors import ConfigError
from shards.store.config import StoreConfig
from shards.store.objects import ObjectBackend
from shards.store.origin import Origin
from shards.store.place import is_bucket, normal, shown
from shards.store.statistics import Counters

MOST_PARTS = 10_000
"""Parts of one upload that S3 takes."""
REPETITIONS = 2
"""Of a whole request, inside which obstore has repeated already."""


class Bucket:
    """Objects below a URL. Threads may share it.

    Args:
        url: of an object store; credentials and endpoint come from the environment.
        config: of requests. Its cache has no part in this.

    Raises:
        ConfigError: a URL that is no object store's, or that cannot be opened.
    """

    def __init__(self, url: str, config: StoreConfig) -> None:
        if not is_bucket(url):
            raise ConfigError(
                f"{shown(url)!r} is no object store. Give a URL such as s3://bucket/path, gs://bucket/path, az://container/path."
            )
        config.check()
        place = normal(url)
        self._config = config
        self._writer = ObjectBackend(place, config.request_timeout_s, retries=config.retries, deadline_s=config.deadline_s)
        self._origin = Origin(place, ObjectBackend(place, config.request_timeout_s), config, Counters())
        self.root = self._origin.root
        """As it is printed: without credentials."""

    def put(self, name: str, source: Path | bytes) -> None:
        """Write an object: there whole or not at all.

        Args:
            name: below the root.
            source: a file, of which `store.chunk_bytes` times `store.concurrency` are held in memory, or the bytes.

        Raises:
            OSError: the file cannot be read.
            ShardError: the store refuses it, or every repetition failed.
        """
        size = source.stat().st_size if isinstance(source, Path) else len(source)
        part_bytes = max(self._config.chunk_bytes, -(-size // MOST_PARTS))
        self._origin.insist(name, lambda: self._writer.write(name, source, part_bytes, self._config.concurrency), "written", REPETITIONS)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """List the objects below a prefix (of whole path segments): name below the root to size in bytes."""
        return self._origin.insist(prefix, lambda: self._writer.below(prefix), "listed", REPETITIONS)

    def delete(self, names: Sequence[str]) -> None:
        """Delete objects; those that are not there are passed over."""
        if names:
            self._origin.insist(names[0], lambda: self._writer.remove(names), "deleted", REPETITIONS)

    def read(self, name: str) -> bytes:
        """Read a small object.

        Raises:
            FileNotFoundError: there is none.
            ShardError: it is refused, or every repetition failed.
        """
        return self._origin.read_whole(name)

    def fetch(self, name: str, size: int, path: Path) -> str:
        """Read an object into a new file and make it durable; the file is shorter where the object is.

        Returns:
            The sha256 of what came, hexadecimal.

        Raises:
            FileNotFoundError: there is no such object.
            ShardError: it is refused, or every repetition failed.
        """
        digest = hashlib.sha256()
        with path.open("xb") as file:

            def take(_: int, data: memoryview) -> None:
                file.write(data)
                digest.update(data)

            self._origin.download(name, size, take)
            file.flush()
            os.fsync(file.fileno())
        return digest.hexdigest()
