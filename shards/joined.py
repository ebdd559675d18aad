"""Several data sets read as one: their shards are numbered one data set after the other, their keys get the data set's name in front."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

from shards.read import ShardReader
from shards.sample import Sample
from shards.store.statistics import StoreStatistics


class JoinedReader:
    """Random access to the samples of several data sets by (shard, row), as `ShardReader`. Picklable, and shared by threads.

    Args:
        readers: of each data set.
        names: of each, all different; `NAME/KEY` is a sample's key.
    """

    def __init__(self, readers: Sequence[ShardReader], names: Sequence[str]) -> None:
        self.readers = tuple(readers)
        self.names = tuple(names)
        self.rows_per_shard = tuple(rows for reader in readers for rows in reader.rows_per_shard)
        self._firsts = list(accumulate((len(reader.rows_per_shard) for reader in readers[:-1]), initial=0))

    def __len__(self) -> int:
        """Samples in all data sets."""
        return sum(map(len, self.readers))

    def __getitem__(self, place: tuple[int, int]) -> Sample:
        """Read one sample.

        Raises:
            IndexError, IntegrityError, ShardError: as `ShardReader`.
        """
        source = bisect_right(self._firsts, place[0]) - 1
        sample = self.readers[source][place[0] - self._firsts[source], place[1]]
        return replace(sample, key=f"{self.names[source]}/{sample.key}")

    def key(self, shard: int, row: int) -> str:
        """Return the key of a sample without reading it."""
        source = bisect_right(self._firsts, shard) - 1
        return f"{self.names[source]}/{self.readers[source].key(shard - self._firsts[source], row)}"

    @property
    def is_cached(self) -> bool:
        """Whether any of the data sets is fetched into a cache of the node."""
        return any(reader.is_cached for reader in self.readers)

    def expect(self, upcoming: Sequence[int]) -> None:
        """Say which shards will be read next, in order, to each data set of them."""
        wanted: list[list[int]] = [[] for _ in self.readers]
        for shard in upcoming:
            source = bisect_right(self._firsts, shard) - 1
            wanted[source].append(shard - self._firsts[source])
        for reader, shards in zip(self.readers, wanted, strict=True):
            reader.expect(shards)

    def statistics(self) -> StoreStatistics:
        """Return what reading from the stores of all data sets took so far in this process."""
        return sum((reader.statistics() for reader in self.readers), StoreStatistics())

    @property
    def digest(self) -> str:
        """The version of the whole: sha256 over names and versions, in order."""
        lines = (f"{name}\t{reader.digest}\n" for name, reader in zip(self.names, self.readers, strict=True))
        return hashlib.sha256("".join(lines).encode()).hexdigest()
