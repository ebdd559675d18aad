"""Row masks: which samples of a tar belong to a version of a data set, one bit a sample, without touching the tar."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from shards.errors import ShardError

Rows = npt.NDArray[np.int64]
Mask = bytes
"""One bit a sample of the tar, the first in the lowest bit of the first byte; set where the sample is kept."""


def pack(kept: npt.NDArray[np.bool_]) -> Mask | None:
    """Pack (rows of the tar,) booleans into a mask; None stands for all rows."""
    return None if kept.all() else np.packbits(kept, bitorder="little").tobytes()


def unpack(mask: Mask | None, tar_rows: int, where: str) -> npt.NDArray[np.bool_]:
    """Return (rows of the tar,) booleans: whether each is kept.

    Args:
        mask: as `pack` made it.
        tar_rows: samples in the tar.
        where: the shard, for the error.

    Raises:
        ShardError: the mask was made for another number of rows.
    """
    if mask is None:
        return np.ones(tar_rows, dtype=np.bool_)
    bits = np.unpackbits(np.frombuffer(mask, dtype=np.uint8), bitorder="little")
    if len(mask) != -(-tar_rows // 8) or bits[tar_rows:].any():
        raise ShardError(
            f"The row mask of {where} was made for another tar than the one with {tar_rows} samples that lies there. "
            "Restore the tar and its sidecar, or make this version of the data set again."
        )
    return bits[:tar_rows].astype(np.bool_)


def kept_rows(mask: Mask | None, tar_rows: int, where: str) -> Rows:
    """Return the rows of the tar that are kept, in its order; row n of the data set's shard is the n-th of them."""
    kept: Rows = np.flatnonzero(unpack(mask, tar_rows, where)).astype(np.int64)
    return kept


def narrow(mask: Mask | None, tar_rows: int, where: str, stay: npt.NDArray[np.bool_]) -> Mask | None:
    """Return the mask that keeps, of the rows that another one keeps, those that are to stay.

    Args:
        mask: the present one.
        tar_rows: samples in the tar.
        where: the shard, for the error.
        stay: (rows kept at present,) booleans.

    Raises:
        ShardError: the present mask was made for another number of rows.
    """
    kept = unpack(mask, tar_rows, where)
    kept[kept] = stay
    return pack(kept)
