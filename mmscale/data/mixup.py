"""Two samples laid over one another, and their labels with them. Source: Zhang et al. 2018 (mixup: Beyond Empirical Risk Minimization).

The partner of position p is p XOR 1, its neighbour in an aligned pair of positions, and how much of it is seen is drawn for p: a sample's
mixture depends on neither ranks nor accumulation. A pair must lie in one micro-batch, so that nothing is decoded twice; `plan_batch` sees
to it.

Shape letters: M samples, P patches, C numbers in a patch, H side of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mmscale.data.batch import Mixing
from mmscale.data.example import Example
from mmscale.data.keyed import Purpose, uniform


def shares_for(seed: int, positions_M: NDArray[np.int64], alpha: float) -> NDArray[np.float32]:
    """Draw how much of each mixture is the sample itself: max(x, 1 - x) of x from Beta(alpha, alpha); (M,), from 0.5 to 1.

    The smaller part would be the partner's own mixture; this way a sample remains what it mostly shows.
    """
    from scipy.special import betaincinv

    draws_M = uniform(seed, positions_M, Purpose.MIX, 1)[:, 0]
    beta_M = betaincinv(alpha, alpha, draws_M)
    shares_M: NDArray[np.float32] = np.maximum(beta_M, 1 - beta_M).astype(np.float32)
    return shares_M


def mix(
    examples: Sequence[Example], known_M: NDArray[np.bool_], pixels_MHHC: NDArray[np.uint8] | None, *, seed: int, alpha: float
) -> Mixing:
    """Mix the items of each pair in place.

    Two samples are mixed if both have a target and the same kinds of items, each of the same height and width in patches. Of items of
    different length in time the common part is mixed.

    Args:
        examples: M of them, decoded and augmented.
        known_M: whether each has a target.
        pixels_MHHC: (M, H, H, 3), row i the image of example i; None where images are no squares.
        seed: the run's seed.
        alpha: of the Beta distribution.

    Returns:
        The partners' rows, and each sample's own share: 1 where it was left as it is.
    """
    positions_M = np.array([e.position for e in examples], dtype=np.int64)
    row_of = {int(position): row for row, position in enumerate(positions_M)}
    shares_M, rows_M = shares_for(seed, positions_M, alpha), np.arange(len(examples))
    for row, position in enumerate(positions_M.tolist()):
        other = row_of.get(position ^ 1)
        if other is None or not (known_M[row] and known_M[other] and _alike(examples[row], examples[other])):
            shares_M[row] = 1
            continue
        rows_M[row] = other
        if row < other:
            for one, two in _laid_over(examples, row, other, pixels_MHHC):
                _mix_pair(one, two, shares_M[row], shares_M[other])
    return Mixing(rows_M=torch.from_numpy(rows_M), shares_M=torch.from_numpy(shares_M))


def _alike(one: Example, two: Example) -> bool:
    """Whether they can be laid over one another."""
    shapes = [{name: item.grid[1:] for name, item in e.items.items()} for e in (one, two)]
    return (one.image is None) == (two.image is None) and shapes[0] == shapes[1]


def _laid_over(
    examples: Sequence[Example], row: int, other: int, pixels_MHHC: NDArray[np.uint8] | None
) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    """The arrays of two samples that lie over one another; patches are in the order (time, height, width)."""
    found = []
    if pixels_MHHC is not None and examples[row].image is not None:
        found.append((pixels_MHHC[row], pixels_MHHC[other]))
    for name, item in examples[row].items.items():
        one_PC, two_PC = item.values_PC, examples[other].items[name].values_PC
        common = min(len(one_PC), len(two_PC))
        found.append((one_PC[:common], two_PC[:common]))
    return found


def _mix_pair(one: NDArray[Any], two: NDArray[Any], share_one: np.float32, share_two: np.float32) -> None:
    mixed_one = share_one * one + (1 - share_one) * two
    mixed_two = share_two * two + (1 - share_two) * one
    for array, mixed in ((one, mixed_one), (two, mixed_two)):
        array[...] = np.rint(mixed) if array.dtype == np.uint8 else mixed
