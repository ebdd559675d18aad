"""Digests of files and of bytes in memory."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow as pa


def file_sha256(path: Path) -> str:
    """Hash a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def buffer_sha256(buffer: pa.Buffer) -> str:
    """Hash bytes in memory, or a mapped file."""
    return hashlib.sha256(memoryview(buffer)).hexdigest()
