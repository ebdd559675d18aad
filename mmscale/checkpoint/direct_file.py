"""A file that is hashed while it is written, past the page cache where the file system lets us (O_DIRECT).

Going through the page cache costs a copy and the kernel's work for each page, which holds a fast disk to half of its rate, and it throws
out what the run's loader reads again and again.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

ALIGNMENT = 4096
"""Addresses, offsets and lengths of direct writes are multiples of it, which suits any file system's blocks."""
BUFFER_BYTES = 1 << 23
BUFFERS = 3
"""One is filled while others are written and hashed."""
_DIRECT = getattr(os, "O_DIRECT", 0)


class DirectFile:
    """A new file, written from its begin to its end. One thread writes and another hashes what the caller has copied in meanwhile."""

    def __init__(self, descriptor: int, writing: ThreadPoolExecutor, hashing: ThreadPoolExecutor) -> None:
        self._descriptor = descriptor
        self._writing, self._hashing = writing, hashing
        self._digest = hashlib.sha256()
        self._buffers = [memoryview(mmap.mmap(-1, BUFFER_BYTES)) for _ in range(BUFFERS)]  # whole pages, hence aligned
        self._busy: list[list[Future[None]]] = [[] for _ in range(BUFFERS)]
        self._turn = self._filled = self._size = 0

    def write(self, content: memoryview) -> None:
        """Write bytes. The caller may change them afterwards.

        Raises:
            OSError: of this or an earlier write.
        """
        while content.nbytes:
            taken = min(content.nbytes, BUFFER_BYTES - self._filled)
            self._buffers[self._turn][self._filled : self._filled + taken] = content[:taken]
            self._filled += taken
            content = content[taken:]
            if self._filled == BUFFER_BYTES:
                self._pass_on()

    def close(self) -> tuple[int, str]:
        """Make all of it durable.

        Returns:
            Bytes, and their sha256.

        Raises:
            OSError: no space, or the disk failed.
        """
        self._pass_on()
        for turn in range(BUFFERS):
            self._wait(turn)
        os.fsync(self._descriptor)
        return self._size, self._digest.hexdigest()

    def _pass_on(self) -> None:
        """Have the buffer written and hashed, and take the next one once it is free."""
        content = self._buffers[self._turn][: self._filled]
        self._size += self._filled
        self._busy[self._turn] = [self._writing.submit(self._put, content), self._hashing.submit(self._digest.update, content)]
        self._turn, self._filled = (self._turn + 1) % BUFFERS, 0
        self._wait(self._turn)

    def _wait(self, turn: int) -> None:
        busy, self._busy[turn] = self._busy[turn], []
        for future in busy:
            future.result()

    def _put(self, content: memoryview) -> None:
        """Write whole blocks past the cache, and what is left of the last one through it."""
        whole = content.nbytes - content.nbytes % ALIGNMENT
        try:
            write_all(self._descriptor, content[:whole])
        except OSError as e:
            if e.errno != errno.EINVAL or not _is_direct(self._descriptor):
                raise
            # some file systems take the flag and refuse the write; others write a part, from whose end no direct write can go on
            _make_plain(self._descriptor)
            done = os.lseek(self._descriptor, 0, os.SEEK_CUR) % BUFFER_BYTES
            write_all(self._descriptor, content[done:whole])
        if whole < content.nbytes:
            _make_plain(self._descriptor)
            write_all(self._descriptor, content[whole:])


@contextmanager
def direct_file(path: Path) -> Iterator[DirectFile]:
    """Open a new file for writing.

    Raises:
        FileExistsError: it is there already.
        OSError: it cannot be made.
    """
    descriptor = _open(path)
    try:
        # left by an exception, a thread may still be at work: leaving the pools waits for it before the file is closed
        with ThreadPoolExecutor(1, "checkpoint-write") as writing, ThreadPoolExecutor(1, "checkpoint-hash") as hashing:
            yield DirectFile(descriptor, writing, hashing)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, content: memoryview) -> None:
    """Write all of it, however much the system takes at a time."""
    while content.nbytes:
        content = content[os.write(descriptor, content) :]


def _open(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        return os.open(path, flags | _DIRECT, 0o666)
    except OSError as e:
        if e.errno != errno.EINVAL or not _DIRECT:
            raise
    path.unlink(missing_ok=True)  # made all the same by some
    return os.open(path, flags, 0o666)


def _is_direct(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & _DIRECT)


def _make_plain(descriptor: int) -> None:
    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~_DIRECT)
