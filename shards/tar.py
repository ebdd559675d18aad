"""Append members to a tar, byte for byte as webdataset's TarWriter does, knowing the offset of each.

Importing that class imports torch, which this floor is free of; and its per-member copying costs more than drawing a glyph.
"""

from __future__ import annotations

import hashlib
import tarfile
from typing import BinaryIO


class TarStream:
    """A plain ustar archive in which nothing but names and contents varies: no times, one owner, one mode."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._offset = 0

    def add(self, name: str, data: bytes) -> int:
        """Append a member and return the offset of its first byte."""
        member = tarfile.TarInfo(name)
        member.size = len(data)
        member.mode = 0o444
        member.uname = member.gname = "bigdata"
        header = member.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape")
        self._write(header + data + bytes(-len(data) % tarfile.BLOCKSIZE))
        return self._offset - len(data) - (-len(data) % tarfile.BLOCKSIZE)

    def close(self) -> str:
        """Append the end-of-archive mark, fill the last record, and return the sha256 of the whole; the file stays open."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._write(bytes(-self._offset % tarfile.RECORDSIZE))
        return self._digest.hexdigest()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._offset += len(data)
