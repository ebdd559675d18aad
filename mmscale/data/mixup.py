"""Two samples laid over one another, and their labels with them. Source: Zhang et al. 2018 (mixup: Beyond Empirical Risk Minimization).

The partner of position p is p XOR 1, its neighbour in an aligned pair of positions, and how much of it is seen is drawn for p: a sample's
mixture depends on neither ranks nor accumulation. A pair must lie in one micro-batch, so that nothing is decoded twice; `plan_batch` sees
to it.

Shape letters: M samples, P patches, C numbers in a patch, H side of an image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mmscale.data.batch import Mixing
from mmscale.data.example import Example
from mmscale.data.keyed import Purpose, uniform
from mmscale.modalities.modality import Modality


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
    examples: Sequence[Example],
    known_M: NDArray[np.bool_],
    pixels_MHHC: NDArray[np.uint8] | None,
    modalities: Mapping[str, Modality],
    *,
    seed: int,
    alpha: float,
) -> Mixing:
    """Mix the items of each pair in place.

    Two samples are mixed if both have a target and the same kinds of items, each of the same height and width in patches. Of items of
    different length in time the common part is mixed.

    Args:
        examples: M of them, decoded and augmented.
        known_M: whether each has a target.
        pixels_MHHC: (M, H, H, 3), row i the image of example i; None where images are no squares.
        modalities: of the items; they say how two are laid over one another.
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
            shares = float(shares_M[row]), float(shares_M[other])
            if pixels_MHHC is not None and examples[row].image is not None:
                _mix_pair(Modality(), pixels_MHHC[row], pixels_MHHC[other], shares)
            for name, item in examples[row].items.items():
                one_PC, two_PC = item.values_PC, examples[other].items[name].values_PC
                common = min(len(one_PC), len(two_PC))  # patches are in the order (time, height, width)
                _mix_pair(modalities[name], one_PC[:common], two_PC[:common], shares)
    return Mixing(rows_M=torch.from_numpy(rows_M), shares_M=torch.from_numpy(shares_M))


def _alike(one: Example, two: Example) -> bool:
    """Whether they can be laid over one another."""
    shapes = [{name: item.grid[1:] for name, item in e.items.items()} for e in (one, two)]
    return (one.image is None) == (two.image is None) and shapes[0] == shapes[1]


def _mix_pair(modality: Modality, one: NDArray[Any], two: NDArray[Any], shares: tuple[float, float]) -> None:
    mixed = modality.mix(one, two, shares[0]), modality.mix(two, one, shares[1])
    for array, values in zip((one, two), mixed, strict=True):
        array[...] = np.rint(values) if array.dtype == np.uint8 else values
