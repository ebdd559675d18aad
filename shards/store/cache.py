"""Objects on a disk of the node, fetched once for all its processes, within a bound of bytes.

    CACHE/objects/<sha256>         a whole object; it has this name only once its size and digest were right
    CACHE/objects/<sha256>.part    one that is being fetched, of its full size from the start, locked by whoever fetches it
    CACHE/expected/<id>            what a process will need next, see future.py
    CACHE/lock                     held for moments: to count, to delete, to reserve

Locks are flock(2) on open files. The system lets go of those of a killed process, so there is nothing to clean up after one: its `.part`
is taken over by the next that wants the object, and deleted when its bytes are needed for another. A file that is deleted while a
process reads from it stays readable until it is closed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from shards.store.base import Stored
from shards.store.eviction import Cached, victims
from shards.store.future import SharedFuture
from shards.store.origin import Sink
from shards.store.statistics import Counters

T = TypeVar("T")

logger = logging.getLogger(__name__)

PART = ".part"
POLL_S = (0.002, 0.05)
"""Shortest and longest pause while another process fetches."""


class Source(Protocol):
    """Where a missing object comes from."""

    def size(self) -> int:
        """Return its size in bytes."""

    def fetch(self, sink: Sink) -> None:
        """Hand all of it to a sink, in order."""


class NodeCache:
    """The cache of a node; any number of processes and threads use the same folder.

    Args:
        folder: created if it is not there.
        bound: of its size in bytes.
        patience_s: how long to wait for another process that fetches; then the caller does without the cache.
        counters: what is counted goes there.
    """

    def __init__(self, folder: Path, bound: int, patience_s: float, counters: Counters) -> None:
        self.folder = folder
        self._objects = folder / "objects"
        self._bound, self._patience_s, self._counters = bound, patience_s, counters
        self._future = SharedFuture(folder / "expected")
        self._unsound: set[str] = set()
        self._off = False
        self._or_do_without(self._prepare)

    def path(self, sha256: str) -> Path:
        """Return where an object is once it is cached."""
        return self._objects / sha256

    def open(self, stored: Stored, source: Source, *, later_than: int = -1, wait: bool = True) -> int | None:
        """Open an object, fetching it first if no process of the node has.

        Args:
            stored: what is wanted.
            source: where it comes from.
            later_than: make room only by deleting what is needed after this place of the future.
            wait: False returns at once where another process is fetching it.

        Returns:
            A file descriptor, or None where the caller has to do without the cache: the disk is full or refuses to be written to, the
            object does not fit, its content is not what it should be, or another process takes too long.

        Raises:
            FileNotFoundError, ShardError: it cannot be fetched.
        """
        found = self._cached(stored)
        if found is not None:
            self._counters.add(cache_hits=1)
            return found
        if self._off or (stored.size or 0) > self._bound or stored.sha256 in self._unsound:
            return None
        self._counters.add(cache_misses=1)
        return self._or_do_without(lambda: self._fetch_or_wait(stored, source, later_than, wait))

    def has(self, stored: Stored) -> bool:
        """Whether an object is cached."""
        return self.path(stored.sha256).exists()

    def discard(self, sha256: str) -> None:
        """Delete an object whose bytes went bad on the disk."""
        self._or_do_without(lambda: self.path(sha256).unlink(missing_ok=True))

    def expect(self, names: Sequence[str]) -> None:
        """Tell all processes of the node what this one will use next, in order."""
        if not self._off:
            self._or_do_without(lambda: self._expect(names))

    @property
    def usable(self) -> bool:
        """Whether anything may still be written to it."""
        return not self._off

    def _prepare(self) -> None:
        self._objects.mkdir(parents=True, exist_ok=True)
        (self.folder / "expected").mkdir(exist_ok=True)
        (self.folder / "lock").touch()

    def _expect(self, names: Sequence[str]) -> None:
        (self.folder / "expected").mkdir(exist_ok=True)
        with self._locked():
            self._future.write(names)

    def _cached(self, stored: Stored) -> int | None:
        try:
            descriptor = os.open(self.path(stored.sha256), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None  # whatever keeps it from being opened, the origin has it
        if stored.size not in (None, os.fstat(descriptor).st_size):
            os.close(descriptor)
            return None
        with contextlib.suppress(OSError):  # a read-only cache keeps no order of use
            os.utime(descriptor)
        return descriptor

    def _fetch_or_wait(self, stored: Stored, source: Source, later_than: int, wait: bool) -> int | None:
        part = self._objects / (stored.sha256 + PART)
        end, pause_s = time.monotonic() + self._patience_s, POLL_S[0]
        while True:
            descriptor = _lock(part)
            if descriptor is not None:
                try:
                    found = self._cached(stored)  # by the process that held the lock before
                    return found if found is not None else self._fill(descriptor, part, stored, source, later_than)
                finally:
                    if _is_at(descriptor, part):
                        part.unlink()
                    os.close(descriptor)
            found = self._cached(stored)
            if found is not None or not wait or time.monotonic() > end:
                return found
            time.sleep(pause_s)
            pause_s = min(POLL_S[1], 2 * pause_s)

    def _fill(self, descriptor: int, part: Path, stored: Stored, source: Source, later_than: int) -> int | None:
        """Fetch into the locked file and give it its name if it is what it should be; a wrong one is fetched once more."""
        if not self._reserve(descriptor, source.size(), later_than):
            return None
        for _ in range(2):
            if _fetch(descriptor, source) == stored.sha256:
                found = os.open(part, os.O_RDONLY | os.O_CLOEXEC)  # before it has its name, by which another may delete it at once
                part.rename(self.path(stored.sha256))
                return found
        self._unsound.add(stored.sha256)
        logger.warning(
            "%s differs from its sha256 in the manifest, twice fetched: it is not cached and its samples are read by byte range. "
            "Find the damaged ones with `mmscale shards verify --full`.",
            stored.name,
        )
        return None

    def _reserve(self, descriptor: int, size: int, later_than: int) -> bool:
        """Make room for an object within the bound, and take that room on the disk before a byte is fetched."""
        with self._locked():
            files = self._files()
            # the file that is to be filled counts with the size it may have from a killed process
            excess = sum(f.size for f in files) - os.fstat(descriptor).st_size + size - self._bound
            if excess > 0 and not self._make_room(files, excess, later_than):
                return False
            os.ftruncate(descriptor, 0)
            _allocate(descriptor, size)
        return True

    def _make_room(self, files: Sequence[Cached], excess: int, later_than: int) -> bool:
        with contextlib.ExitStack() as held:  # what is abandoned stays locked until it is deleted: nobody can take it over in between
            free = [f for f in files if not f.name.endswith(PART) or self._is_abandoned(f.name, held)]
            going = victims(free, self._future.read(), excess=excess, later_than=later_than)
            for file in going or ():
                (self._objects / file.name).unlink(missing_ok=True)
        return going is not None

    def _is_abandoned(self, name: str, held: contextlib.ExitStack) -> bool:
        """Whether a half-fetched file belongs to a process that is gone; if so, it is locked."""
        try:
            file = held.enter_context((self._objects / name).open("rb"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (FileNotFoundError, BlockingIOError):
            return False
        return True

    def _files(self) -> list[Cached]:
        found = []
        with os.scandir(self._objects) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
                    status = entry.stat()
                    found.append(Cached(entry.name, status.st_size, status.st_mtime))
        return found

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        # made again where a cleaner of old files has taken it; reading is enough for a lock, and for one that another user made
        descriptor = os.open(self.folder / "lock", os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _or_do_without(self, action: Callable[[], T]) -> T | None:
        """Turn the cache off for this process where the disk refuses; reading goes on from the origin."""
        try:
            return action()
        except FileNotFoundError:
            if self.folder.is_dir() and self._objects.is_dir():
                raise  # the origin's, not the cache's
            self._turn_off("the folder is gone")
        except OSError as e:  # of the disk: whatever the origin refuses is no OSError, but for a missing object
            self._turn_off(e.strerror or str(e))
        return None

    def _turn_off(self, problem: str) -> None:
        if not self._off:
            self._off = True
            logger.warning(
                "The cache %r cannot be written to: %s. This process goes on without it and reads from the origin by byte range. "
                "Free some space, lower `store.cache_bytes`, or set `store.cache` to a folder on a disk with room.",
                str(self.folder),
                problem,
            )


def _lock(part: Path) -> int | None:
    """Open and lock the file of an object that is being fetched; None where another process holds it."""
    while True:
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        if _is_at(descriptor, part):
            return descriptor
        os.close(descriptor)  # finished or given up between the two calls


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return path.stat().st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False


def _allocate(descriptor: int, size: int) -> None:
    """Take the room on the disk now: a full disk is known before anything is fetched."""
    try:
        if size:
            os.posix_fallocate(descriptor, 0, size)
    except OSError as e:
        if e.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(descriptor, size)  # a file system that cannot: the room is counted at least


def _fetch(descriptor: int, source: Source) -> str:
    """Fetch a whole object into a file and return its sha256."""
    digest = hashlib.sha256()

    def sink(offset: int, data: memoryview) -> None:
        digest.update(data)
        while data:
            written = os.pwrite(descriptor, data, offset)
            data, offset = data[written:], offset + written

    source.fetch(sink)
    return digest.hexdigest()
