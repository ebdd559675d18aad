"""One command at a time makes a version of a data set in a folder."""

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
    """Create the output folder and hold it against a second command.

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
        yield
    finally:
        os.close(lock)
