"""What the processes of a node will need next, told to each other through files of the cache folder.

A file a process, held locked for as long as the process lives: the system lets go of the lock of a killed one, and the next reader
deletes its file. All methods are called under the cache's own lock.
"""

from __future__ import annotations

import fcntl
import os
import uuid
from collections.abc import Sequence
from pathlib import Path


class SharedFuture:
    """The coming uses of all processes of a node.

    Args:
        folder: for the files; created by the cache.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._own: int | None = None
        self._pid = 0

    def __del__(self) -> None:
        if self._own is not None:
            os.close(self._own)

    def write(self, names: Sequence[str]) -> None:
        """Replace what this process expects, in order of use."""
        if self._own is None or self._pid != os.getpid():  # a forked child has a future of its own
            self._pid = os.getpid()
            self._own = os.open(self._folder / uuid.uuid4().hex, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            fcntl.flock(self._own, fcntl.LOCK_EX)
        text = "".join(f"{name}\n" for name in names).encode()
        os.ftruncate(self._own, 0)
        os.pwrite(self._own, text, 0)

    def read(self) -> dict[str, int]:
        """Return the soonest place of each name in the order of any process."""
        soonest: dict[str, int] = {}
        for path in list(self._folder.iterdir()) if self._folder.is_dir() else []:
            for place, name in enumerate(_lines_or_delete(path)):
                soonest[name] = min(place, soonest.get(name, place))
        return soonest


def _lines_or_delete(path: Path) -> list[str]:
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read().decode().split()
        path.unlink()  # its process is gone
    return []
