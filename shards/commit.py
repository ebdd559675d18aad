"""Commit a file: it has its final name only once all of its bytes are on disk, whatever is killed and whenever.

Temporary names hold their owner, so that processes of several hosts may commit one file at the same time: the last one stands, whole.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shards.owner import has_ended, own_name

_TEMPORARY = re.compile(r"\..+\.([\w-]+)\.tmp")
# What a file system without hard links answers.
_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})


def temporary(path: Path) -> Path:
    """Return the hidden name beside `path` under which this process gathers its bytes."""
    return path.with_name(f".{path.name}.{own_name()}.tmp")


@contextmanager
def gathering(path: Path) -> Iterator[Path]:
    """Give the temporary name of a file to be; what is there under that name at the end, after a failure above all, is deleted."""
    written = temporary(path)
    try:
        yield written
    finally:
        written.unlink(missing_ok=True)


def commit_file(written: Path, path: Path) -> None:
    """Flush a finished temporary file to disk and rename it into place, the folder's entry included."""
    _sync(written, os.O_RDONLY)
    written.replace(path)
    _sync(path.parent, os.O_RDONLY | os.O_DIRECTORY)


def commit_bytes(path: Path, data: bytes) -> None:
    """Write a whole file so that a reader sees the old one or the new one, never a part."""
    with gathering(path) as written:
        written.write_bytes(data)
        commit_file(written, path)


def commit_first(path: Path, data: bytes) -> bool:
    """Write a whole file unless there is one of that name: of several processes, on any hosts, one succeeds.

    Returns:
        Whether it was this one.
    """
    with gathering(path) as written:
        written.write_bytes(data)
        _sync(written, os.O_RDONLY)
        try:
            os.link(written, path)
        except FileExistsError:
            return False
        except OSError as e:
            if e.errno not in _NO_LINKS:
                raise
            if path.exists():
                return False
            written.replace(path)
    _sync(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    return True


def remove_leftovers(folder: Path, *, all_of_them: bool = False) -> None:
    """Delete the temporary files of processes that have ended on this machine; or every one, of a folder in which nobody writes."""
    if not folder.is_dir():
        return
    for entry in os.scandir(folder):
        match = _TEMPORARY.fullmatch(entry.name)
        if match and entry.is_file(follow_symlinks=False) and (all_of_them or has_ended(match[1])):
            Path(entry.path).unlink(missing_ok=True)


def _sync(path: Path, flags: int) -> None:
    fd = os.open(path, flags)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
