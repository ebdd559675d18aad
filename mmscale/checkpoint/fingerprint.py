"""A hash of a tensor that does not depend on how the tensor is divided: parts are hashed where they lie, and their hashes added up."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

BLOCK = 1 << 16
_BLOCKS_AT_ONCE = 8
"""Half a million elements: what is worked on stays in the processor's cache."""
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MASK = (1 << 64) - 1


def fingerprint(values: Tensor, start: int = 0) -> int:
    """Hash a part of a flattened tensor.

    The sum over elements of (bits of the element) x (odd key of its place), modulo 2**64. An odd factor is invertible, so that a change of
    any one element is always seen; several changes go unseen with probability 2**-64 or so. It guards against faults, not against forgers.

    Args:
        values: the part, of any dtype.
        start: offset of the part in the flattened tensor.

    Returns:
        The hash of the part; the sum over all parts, modulo 2**64, is that of the tensor.
    """
    words = values.detach().contiguous().flatten().view(_WORDS[values.element_size()])
    keys = _keys(words.device)
    total, at, end = 0, start, start + words.numel()
    while at < end:
        first = at // BLOCK
        upto = min(end, (first + _BLOCKS_AT_ONCE) * BLOCK)
        total += _sum(words[at - start : upto - start], at - first * BLOCK, first, keys)
        at = upto
    return total & _MASK


def _sum(words: Tensor, skipped: int, first: int, keys: Tensor) -> int:
    """Hash elements that begin `skipped` places into block `first`; what is missing of a block counts as zeros, which add nothing."""
    blocks = -(-(skipped + words.numel()) // BLOCK)
    padded = torch.zeros(blocks * BLOCK, dtype=torch.int64, device=words.device)
    padded[skipped : skipped + words.numel()] = words
    sums = (padded.view(blocks, BLOCK) * keys).sum(1).tolist()
    return sum((s & _MASK) * (_mix(first + i) | 1) for i, s in enumerate(sums))


@lru_cache(maxsize=4)
def _keys(device: torch.device) -> Tensor:
    signed = [key - (1 << 64) if key >> 63 else key for key in (_mix(i ^ 0x5851F42D4C957F2D) | 1 for i in range(BLOCK))]
    return torch.tensor(signed, dtype=torch.int64, device=device)


def _mix(value: int) -> int:
    """Splitmix64's output function (Steele, Lea and Flood 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
