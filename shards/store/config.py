"""How shards behind a URL are read: typed, frozen, one docstring a key."""

from __future__ import annotations

from dataclasses import dataclass

from shards.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreConfig:
    """Requests to an object store and the cache of a node. A local folder of shards needs none of it."""

    cache: str | None = None
    """Folder on a disk of the node that keeps fetched shards, for all its processes and runs; null reads each sample by byte range."""
    cache_bytes: int = 100 * 2**30
    """Largest size of that folder in bytes."""
    prefetch: int = 2
    """Shards of the known future that are fetched ahead of their use, in a thread; 0 for none."""
    chunk_bytes: int = 8 * 2**20
    """Size in bytes of the requests that a whole shard is fetched by."""
    concurrency: int = 8
    """Requests in flight at once for one shard."""
    request_timeout_s: float = 30.0
    """Longest time of one request; then it is made again."""
    deadline_s: float = 120.0
    """Longest time of one read with all its repetitions; then the run fails."""
    retries: int = 8
    """How often a read is repeated after a transient failure."""
    hedge_share: float = 0.05
    """Largest share of requests that is spent on asking again for what is slower than usual; the first answer wins. What has stalled (16
    times as long as usual, and over a second) is asked for again in any case. 0 turns both off."""

    def check(self) -> None:
        """Check what types alone cannot say.

        Raises:
            ConfigError: a value out of range.
        """
        at_least = {"cache_bytes": 1, "prefetch": 0, "chunk_bytes": 1, "concurrency": 1, "retries": 0}
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise ConfigError(f"`store.{name}` must be at least {least}; got {getattr(self, name)}.")
        for name in ("request_timeout_s", "deadline_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"`store.{name}` must be above 0 seconds; got {getattr(self, name)}.")
        if not 0.0 <= self.hedge_share <= 0.5:
            raise ConfigError(f"`store.hedge_share` must be 0 to 0.5; got {self.hedge_share}.")
        if self.cache is not None and "://" in self.cache:
            raise ConfigError(f"`store.cache` must be a folder of this machine; got {self.cache!r}. Give a path on a local disk.")
