"""One command at a time makes a version of a data set in a folder, and the processes of a killed one end before the next begins."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shards.errors import ConfigError

_LOCK_NAME = ".lock"


@contextmanager
def sole_writer(out: Path) -> Iterator[None]:
    """Create the output folder and hold it against a second command, and wait for processes that a killed one has left to end.

    Raises:
        ConfigError: another command is at work there, or the folder cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = os.open(out / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as e:
        raise ConfigError(f"`out`: the folder {str(out)!r} cannot be written to: {e.strerror}. Give another one.") from e
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise ConfigError(f"`out`: another writer is at work in {str(out)!r}. Wait for it, or stop it.") from e
        descriptor = os.open(out, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        finally:
            os.close(descriptor)
        yield
    finally:
        os.close(lock)


def hold_folder(out: Path) -> int:
    """Mark this process as one that writes into the folder, until it ends; returns the descriptor that holds the mark."""
    descriptor = os.open(out, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    return descriptor
