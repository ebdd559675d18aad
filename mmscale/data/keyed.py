"""Randomness that belongs to a sample, not to a process: Philox4x32-10 over (seed, position, purpose, index), vectorised over positions.

Whoever draws it, on any rank, worker or resume, gets the same numbers. numpy's own Philox is one object a key (17 us each, seven uses a
sample); here a whole micro-batch costs some twenty array operations.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; constants and test vectors of Random123.
"""

from __future__ import annotations

import zlib
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

_MULTIPLY_0, _MULTIPLY_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)
_ROUNDS = 10


class Purpose(IntEnum):
    """What a number is for; each has its own independent stream."""

    AUGMENT = 1
    CHOICE = 2
    TOKEN_MASK = 3
    PATCH_MASK = 4
    GUMBEL = 5
    KEEP = 6
    WRITE = 7
    MIX = 8
    WORD_MASK = 9


def purpose_of(purpose: Purpose, modality: str) -> int:
    """The stream of a purpose for one modality: its own, whatever other modalities there are; an image's is the purpose itself."""
    return int(purpose) if modality == "image" else zlib.crc32(f"{int(purpose)}/{modality}".encode()) | 1 << 31


def philox(counter: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """Philox4x32-10.

    Args:
        counter: (4, ...) words, 32 bits used of each.
        key: two words of 32 bits.

    Returns:
        (4, ...) random words of 32 bits, held in uint64.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MULTIPLY_0, c2 * _MULTIPLY_1
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ np.uint64(k0), p1 & _LOW, (p0 >> _SHIFT) ^ c3 ^ np.uint64(k1), p0 & _LOW
        k0, k1 = (k0 + _WEYL_0) & 0xFFFFFFFF, (k1 + _WEYL_1) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3])


def uniform(seed: int, positions: NDArray[np.int64], purpose: int, count: int) -> NDArray[np.float64]:
    """Draw `count` numbers in the open interval (0, 1) for each position, in steps of 2^-32.

    Number i of a position does not depend on `count` or on the other positions.

    Args:
        seed: the run's seed; its low 64 bits are used.
        positions: (M,) global positions.
        purpose: the stream, a `Purpose` or what `purpose_of` gives.
        count: numbers a position.

    Returns:
        (M, count) float64.
    """
    where = np.asarray(positions, dtype=np.int64).astype(np.uint64)
    blocks = -(-count // 4)
    shape = (len(where), blocks)
    counter = np.empty((4, *shape), dtype=np.uint64)
    counter[0] = np.arange(blocks, dtype=np.uint64)
    counter[1] = int(purpose)
    counter[2] = (where & _LOW)[:, None]
    counter[3] = (where >> _SHIFT)[:, None]
    words = philox(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    flat = words.transpose(1, 2, 0).reshape(len(where), blocks * 4)[:, :count]
    return (np.ascontiguousarray(flat).astype(np.float64) + 0.5) / 4294967296.0
