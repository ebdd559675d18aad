"""Commit a file: it has its final name only once all of its bytes are on disk, whatever is killed and whenever."""

from __future__ import annotations

import os
from pathlib import Path


def temporary(path: Path) -> Path:
    """Return the hidden name beside `path` under which its bytes are gathered; a leftover of a killed process is simply overwritten."""
    return path.with_name(f".{path.name}.tmp")


def commit_file(written: Path, path: Path) -> None:
    """Flush a finished temporary file to disk and rename it into place, the folder's entry included."""
    _sync(written, os.O_RDONLY)
    written.replace(path)
    _sync(path.parent, os.O_RDONLY | os.O_DIRECTORY)


def commit_bytes(path: Path, data: bytes) -> None:
    """Write a whole file so that a reader sees the old one or the new one, never a part."""
    written = temporary(path)
    written.write_bytes(data)
    commit_file(written, path)


def _sync(path: Path, flags: int) -> None:
    fd = os.open(path, flags)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
