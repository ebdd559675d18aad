"""A hash of a tensor that does not depend on how the tensor is divided: parts are hashed where they lie, and their hashes added up."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

BLOCK = 1 << 16
_COPIED = 1 << 22
"""Elements brought to the CPU at a time."""
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MASK = (1 << 64) - 1


def fingerprint(values: Tensor, start: int = 0) -> int:
    """Hash a part of a flattened tensor.

    The sum over elements of (bits of the element) x (odd key of its place), modulo 2**64. An odd factor is invertible, so that a change of
    any one element is always seen; several changes go unseen with probability 2**-64 or so. It guards against faults, not against forgers.
    With numpy, because its integer products take a tenth of the time of torch's here.

    Args:
        values: the part, of any dtype, on any device.
        start: offset of the part in the flattened tensor.

    Returns:
        The hash of the part; the sum over all parts, modulo 2**64, is that of the tensor.
    """
    flat = values.detach().contiguous().flatten().view(_WORDS[values.element_size()])
    total = 0
    for low in range(0, flat.numel(), _COPIED):
        total += _sum(flat[low : low + _COPIED].cpu().numpy(), start + low)
    return total & _MASK


def _sum(words: npt.NDArray[np.signedinteger], start: int) -> int:
    keys, total, at, end = _keys(), 0, start, start + len(words)
    while at < end:
        block, inside = divmod(at, BLOCK)
        upto = min(end, at + BLOCK - inside)
        size = upto - at
        part = words[at - start : upto - start].astype(np.int64).dot(keys[inside : inside + size])
        total += (int(part) & _MASK) * (_mix(block) | 1)
        at = upto
    return total


@lru_cache(maxsize=1)
def _keys() -> npt.NDArray[np.int64]:
    return np.array([_mix(i ^ 0x5851F42D4C957F2D) | 1 for i in range(BLOCK)], dtype=np.uint64).view(np.int64)


def _mix(value: int) -> int:
    """Splitmix64's output function (Steele, Lea and Flood 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
