"""Counts of what reading from a store took."""

from __future__ import annotations

import threading
from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreStatistics:
    """What this process has read from its store so far. All zero for a local folder, whose reads are not counted."""

    requests: int = 0
    """Requests made, repetitions and second askings included."""
    bytes_fetched: int = 0
    """Bytes that came in whole answers."""
    retries: int = 0
    """Requests made again after a failure."""
    hedges: int = 0
    """Requests made a second time because the first was slow."""
    cache_hits: int = 0
    """Shards and sidecars that were opened from the node's cache."""
    cache_misses: int = 0
    """Shards and sidecars that had to be fetched, or waited for while another process fetched them."""
    wait_s: float = 0.0
    """Seconds that readers waited for the store, added up over threads."""

    def __add__(self, other: StoreStatistics) -> StoreStatistics:
        """Add the counts of another store or process."""
        return StoreStatistics(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def __sub__(self, earlier: StoreStatistics) -> StoreStatistics:
        """Return what was counted since an earlier snapshot."""
        return StoreStatistics(**{f.name: getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)})


class Counters:
    """The same, growing; threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, float] = dict.fromkeys((f.name for f in fields(StoreStatistics)), 0)

    def add(self, **counts: float) -> None:
        """Add to the counts of these names."""
        with self._lock:
            for name, count in counts.items():
                self._counts[name] += count

    def snapshot(self) -> StoreStatistics:
        """Return the counts as they stand."""
        with self._lock:
            return StoreStatistics(**self._counts)  # type: ignore[arg-type]
