"""The kept samples of one shard, in the order of the tar, read part by part: a pass over captions leaves the pictures unread."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shards.digest import file_sha256
from shards.errors import IntegrityError, ShardError
from shards.manifest import ShardInfo, sidecar_path
from shards.mask import Mask, kept_rows, narrow
from shards.sample import Sample
from shards.sidecar import is_header_of, read_header, read_index


def is_text(ext: str) -> bool:
    """Tell whether a part holds captions or fields."""
    return ext in ("txt", "json")


class ShardRows:
    """One shard of a data set, opened for a pass over its kept samples.

    Args:
        folder: of the manifest.
        info: the shard.

    Attributes:
        table: the sidecar's rows of the kept samples.
        keys: of these.

    Raises:
        ShardError: tar or sidecar is missing, not to be read, or not the manifest's.
    """

    def __init__(self, folder: Path, info: ShardInfo) -> None:
        tar = info.tar(folder)
        try:
            if file_sha256(sidecar_path(tar)) != info.index_sha256:
                raise ShardError(
                    f"The sidecar of {str(tar)!r} is not the manifest's. Run `mmscale shards verify {tar.parent} --full --repair`."
                )
            self._fd = os.open(tar, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            raise ShardError(f"The shard {str(tar)!r} cannot be read: {e.strerror}. Copy it there again, or mend its permissions.") from e
        whole = read_index(sidecar_path(tar))
        self.name = info.shard
        self._mask, self._tar_rows = info.mask, whole.num_rows
        self.table: pa.Table = whole if info.mask is None else whole.take(kept_rows(info.mask, whole.num_rows, info.shard))
        self.keys: list[str] = self.table["key"].to_pylist()
        self._parts: list[list[dict[str, Any]]] = self.table["parts"].to_pylist()

    def __enter__(self) -> ShardRows:
        """Return itself."""
        return self

    def __exit__(self, *raised: object) -> None:
        """Close the tar."""
        os.close(self._fd)

    def _read(self, begin: int, size: int) -> bytes:
        return os.pread(self._fd, size, begin)

    def __len__(self) -> int:
        """Kept samples."""
        return len(self.keys)

    def read(self, row: int, wanted: Callable[[str], bool] = lambda ext: True) -> Sample:
        """Read a sample, or only those of its parts whose extension is wanted.

        Raises:
            IntegrityError: its bytes differ from their checksum.
            ShardError: the system refuses to read it.
        """
        return Sample(self.keys[row], {part["ext"]: self._part(row, part) for part in self._parts[row] if wanted(part["ext"])})

    def is_named(self, row: int) -> bool:
        """Tell whether no part of a sample lies behind a sound header of another name or size, as with a sidecar of another tar."""
        headers = [(read_header(self._read, part), part) for part in self._parts[row]]
        return all(header is None or is_header_of(header, self.keys[row], part) for header, part in headers)

    def parts(self, row: int) -> list[dict[str, Any]]:
        """Return the index entries of a sample's parts: ext, offset, size, crc32c."""
        return self._parts[row]

    def narrowed(self, stay: npt.NDArray[np.bool_]) -> Mask | None:
        """Return the row mask that keeps those of the present samples that are to stay: (samples,) booleans."""
        return narrow(self._mask, self._tar_rows, self.name, stay)

    def _part(self, row: int, part: dict[str, Any]) -> bytes:
        try:
            data = self._read(part["offset"], part["size"])
        except OSError as e:
            raise ShardError(f"{self.name}:{self.keys[row]} cannot be read: {e.strerror}. Check the disk or the mount it is on.") from e
        if google_crc32c.value(data) != part["crc32c"]:
            raise IntegrityError(
                f"{self.name}:{self.keys[row]}: the part {part['ext']!r} at byte {part['offset']} does not match its checksum. "
                "Run `mmscale shards verify DIR --full --repair` on its data set."
            )
        return data
