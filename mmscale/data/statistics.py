"""What a loader has done, in numbers that tell where its time goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from shards.sample import Sample
from shards.store.statistics import StoreStatistics

READ_TOGETHER = 16
"""Samples that a thread reads before it decodes them: a decode drives the reading's code and data out of the core's caches."""
LOCATED_TOGETHER = 16
"""Batches whose places in the shards are found in one call: finding 64 places takes half as long as finding 1,024."""
NOTHING = StoreStatistics()


@dataclass(slots=True)
class Work:
    """What threads and workers did for some samples; sums add up."""

    samples: int = 0
    """Samples read."""
    bytes: int = 0
    """Bytes of their parts."""
    read_s: float = 0.0
    """Seconds of fetching and comparing with the checksums, over all threads."""
    decode_s: float = 0.0
    """Seconds of decoding, cropping and augmenting, over all threads."""
    store: StoreStatistics = NOTHING
    """What reading from the store took."""

    @classmethod
    def of(cls, samples: Sequence[Sample], *, read_s: float, decode_s: float) -> Work:
        """Count some samples."""
        return cls(len(samples), sum(len(part) for sample in samples for part in sample.parts.values()), read_s, decode_s)

    def __iadd__(self, other: Work) -> Work:
        """Add other work to this."""
        self.samples += other.samples
        self.bytes += other.bytes
        self.read_s += other.read_s
        self.decode_s += other.decode_s
        if other.store is not NOTHING:
            self.store = self.store + other.store
        return self


class Counted(Protocol):
    """A reader that counts what its store does."""

    def statistics(self) -> StoreStatistics:
        """Return the counts of this process so far."""


class StoreMeter:
    """Tells what a reader's store did between two looks. A process has one, or it would count twice."""

    def __init__(self, reader: Counted) -> None:
        self._reader = reader
        self._seen = reader.statistics()

    def take(self) -> StoreStatistics:
        """Return the counts since the last look."""
        now = self._reader.statistics()
        if now == self._seen:
            return NOTHING
        since, self._seen = now - self._seen, now
        return since


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderStatistics:
    """A snapshot of a loader, counted from its start."""

    samples: int
    """Samples handed out."""
    bytes: int
    """Bytes that were read for them."""
    read_ms: float
    """Milliseconds of a thread to fetch one sample and compare it with its checksums, on average."""
    decode_ms: float
    """Milliseconds of a thread to decode, crop and augment one sample, on average."""
    wait_s: float
    """Seconds that whoever iterates has waited: near zero where the loader keeps up."""
    ready: int
    """Batches that lie finished, waiting to be taken: near zero where the loader does not keep up."""
    store: StoreStatistics
    """What reading from the store took."""

    @classmethod
    def of(cls, work: Work, *, wait_s: float, ready: int) -> LoaderStatistics:
        """Summarise work."""
        count = max(1, work.samples)
        return cls(
            samples=work.samples,
            bytes=work.bytes,
            read_ms=1000 * work.read_s / count,
            decode_ms=1000 * work.decode_s / count,
            wait_s=wait_s,
            ready=ready,
            store=work.store,
        )
