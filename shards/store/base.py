"""What the reader, the manifest and verification ask of the place where shards lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa

from shards.store.statistics import StoreStatistics


@dataclass(frozen=True, slots=True)
class Stored:
    """An object whose content is known beforehand."""

    name: str
    """Below the root of the store."""
    size: int | None
    """Bytes; None where nobody has recorded it."""
    sha256: str
    """Of its content."""


class Tar(Protocol):
    """An open tar. Threads may share it; it is closed when nobody refers to it any more."""

    def read(self, begin: int, size: int) -> bytes:
        """Read a range of bytes; fewer where the tar ends before them."""

    def distrust(self, begin: int, size: int) -> None:
        """Drop the system's own copy of a range, so that the next read comes from where the tar is kept."""

    @property
    def stale(self) -> bool:
        """Whether the file behind it is gone, so that holding it open only takes space."""


class Store(Protocol):
    """A folder or a URL that holds a data set. Missing objects are FileNotFoundError, in every method."""

    root: str
    """As it is printed: without credentials."""

    def tar(self, tar: Stored) -> Tar:
        """Open a shard for reading by range."""

    def whole(self, name: str, sha256: str | None = None) -> pa.Buffer:
        """Return all bytes of a small object.

        Args:
            name: below the root.
            sha256: what its content must be, if known: then a node's cache may have it. The bytes returned are still to be compared.
        """

    def size(self, name: str) -> int:
        """Return the size of an object in bytes."""

    def sha256(self, name: str) -> str:
        """Hash an object as it lies there, past any cache."""

    def names(self) -> set[str] | None:
        """List the objects directly below the root; None where the store cannot list."""

    def discard(self, stored: Stored) -> None:
        """Forget a copy whose bytes were wrong, so that the next one comes from where the data set lies."""

    @property
    def is_cached(self) -> bool:
        """Whether fetched shards are kept on the node, so that `expect` is of use."""

    def expect(self, upcoming: Sequence[tuple[Stored, Stored]]) -> None:
        """Say which (tar, sidecar) will be used next on this node, in order."""

    def statistics(self) -> StoreStatistics:
        """Return what reading took so far in this process."""
