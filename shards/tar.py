"""Append members to a tar, byte for byte as webdataset's TarWriter does, knowing the offset of each.

Importing that class imports torch, which this floor is free of; and its per-member copying costs more than drawing a glyph.
"""

from __future__ import annotations

import hashlib
import tarfile
from typing import BinaryIO

_NAME_BYTES = 100
_MOST_BYTES = 1 << 33  # what eleven octal digits hold
_SIZE, _CHECKSUM = slice(124, 136), slice(148, 156)


class TarStream:
    """A plain ustar archive in which nothing but names and contents varies: no times, one owner, one mode."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._offset = 0

    def add(self, name: str, data: bytes) -> int:
        """Append a member and return the offset of its first byte."""
        offset = self._offset + tarfile.BLOCKSIZE
        self._write(b"".join((_header(name, len(data)), data, bytes(-len(data) % tarfile.BLOCKSIZE))))
        return offset

    def close(self) -> str:
        """Append the end-of-archive mark, fill the last record, and return the sha256 of the whole; the file stays open."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._write(bytes(-self._offset % tarfile.RECORDSIZE))
        return self._digest.hexdigest()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._offset += len(data)


def _full_header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = size
    member.mode = 0o444
    member.uname = member.gname = "bigdata"
    header: bytes = member.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape")
    return header


def _header(name: str, size: int) -> bytes:
    """Fill name, size and checksum into a header of tarfile, which takes ten times as long to make a new one."""
    encoded = name.encode("utf-8", "surrogateescape")
    if len(encoded) > _NAME_BYTES or size >= _MOST_BYTES:
        return _full_header(name, size)
    header = bytearray(_TEMPLATE)
    header[: len(encoded)] = encoded
    header[_SIZE] = b"%011o\0" % size
    header[_CHECKSUM] = b"%06o\0 " % (_TEMPLATE_SUM + sum(encoded) + sum(header[_SIZE]))
    return bytes(header)


def _template() -> bytes:
    """A header without name, size and checksum, whose bytes count as spaces in the sum."""
    header = bytearray(_full_header("", 0))
    header[_SIZE] = bytes(12)
    header[_CHECKSUM] = b" " * 8
    return bytes(header)


_TEMPLATE = _template()
_TEMPLATE_SUM = sum(_TEMPLATE)
