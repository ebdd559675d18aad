"""A data set in a folder: the system's own reads, nothing in between."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from shards.digest import file_sha256
from shards.store.base import Stored
from shards.store.statistics import StoreStatistics


class LocalTar:
    """An open file."""

    def __init__(self, descriptor: int) -> None:
        self._fd = descriptor

    def __del__(self) -> None:
        os.close(self._fd)

    def read(self, begin: int, size: int) -> bytes:
        """Read a range of bytes; fewer where the tar ends before them."""
        return os.pread(self._fd, size, begin)

    def distrust(self, begin: int, size: int) -> None:
        """Ask the system to forget its copy of a range, so that the next read comes from the disk itself."""
        os.posix_fadvise(self._fd, begin, size, os.POSIX_FADV_DONTNEED)

    @property
    def stale(self) -> bool:
        """Whether the file has been deleted."""
        return os.fstat(self._fd).st_nlink == 0


class LocalStore:
    """A folder of this machine or of a mount."""

    def __init__(self, folder: Path) -> None:
        self.root = str(folder)
        self._folder = folder

    def tar(self, tar: Stored) -> LocalTar:
        """Open a shard for reading by range."""
        return LocalTar(os.open(self._folder / tar.name, os.O_RDONLY | os.O_CLOEXEC))

    def whole(self, name: str, sha256: str | None = None) -> pa.Buffer:
        """Map a file into memory."""
        return map_file(self._folder / name)

    def size(self, name: str) -> int:
        """Return the size of a file in bytes."""
        return (self._folder / name).stat().st_size

    def sha256(self, name: str) -> str:
        """Hash a file."""
        return file_sha256(self._folder / name)

    def names(self) -> set[str]:
        """List the folder."""
        return set(os.listdir(self._folder))  # noqa: PTH208  (names alone: a data set may have a million entries)

    def discard(self, stored: Stored) -> None:
        """Do nothing: there is no copy."""

    is_cached = False

    def expect(self, upcoming: Sequence[tuple[Stored, Stored]]) -> None:
        """Do nothing: there is nothing to fetch."""

    def statistics(self) -> StoreStatistics:
        """Return zeros."""
        return StoreStatistics()


def map_file(path: Path) -> pa.Buffer:
    """Map a file into memory; an empty one is an empty buffer. Holds no descriptor, as Python's own mmap would."""
    os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))  # raises what the system says, where Arrow has words of its own
    if path.stat().st_size == 0:
        return pa.py_buffer(b"")
    with pa.memory_map(str(path)) as file:
        return file.read_buffer()
