"""Two samples in one, and their labels with them: laid over one another (mixup), or a box of one in the other's place (CutMix).

The partner of position p is p XOR 1, its neighbour in an aligned pair of positions, and how it is mixed is drawn for p: a sample's
mixture depends on neither ranks nor accumulation. A pair must lie in one micro-batch, so that nothing is decoded twice; `plan_batch` sees
to it.

Sources: Zhang et al. 2018 (mixup: Beyond Empirical Risk Minimization); Yun et al. 2019 (CutMix), section 3.1 and equation 2; for clips
Yun et al. 2020 (VideoMix), which found boxes of the picture through all frames best.

Shape letters: M samples, P patches, C numbers in a patch, H side of an image, T and W patches along time and width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mmscale.augment_config import AugmentConfig
from mmscale.data.batch import Mixing
from mmscale.data.example import Example, Patches
from mmscale.data.keyed import Purpose, uniform
from mmscale.modalities.modality import Grid, Modality

Shares = tuple[float, float]
"""How much of each of two mixtures is the sample itself."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one sample takes something of its partner."""

    share: float
    """Part of the mixture that is the sample itself, from 0.5 to 1."""
    centre: tuple[float, float] | None = None
    """Of the box that is the partner's, as parts of the item's height and width; None where the two are laid over one another."""


def recipes_for(seed: int, positions_M: NDArray[np.int64], config: AugmentConfig) -> list[Recipe]:
    """Draw the recipe of each position.

    The share is max(x, 1 - x) of x from Beta(alpha, alpha): the smaller part would be the partner's own mixture, and this way a sample
    remains what it mostly shows.
    """
    from scipy.special import betaincinv

    draws_M4 = uniform(seed, positions_M, Purpose.MIX, 4)
    cut_M = draws_M4[:, 1] < (0.5 if config.mixup and config.cutmix else float(bool(config.cutmix)))
    alpha_M = np.where(cut_M, config.cutmix, config.mixup)
    beta_M = betaincinv(alpha_M, alpha_M, draws_M4[:, 0])
    shares = np.maximum(beta_M, 1 - beta_M).astype(np.float32).tolist()
    centres = draws_M4[:, 2:].tolist()
    return [Recipe(share, (y, x) if cut else None) for share, cut, (y, x) in zip(shares, cut_M.tolist(), centres, strict=True)]


def mix(
    examples: Sequence[Example],
    known_M: NDArray[np.bool_],
    pixels_MHHC: NDArray[np.uint8] | None,
    modalities: Mapping[str, Modality],
    *,
    seed: int,
    config: AugmentConfig,
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
        config: how samples are mixed.

    Returns:
        The partners' rows, and each sample's own share: 1 where it was left as it is, and where it was cut the part of its area that is
        left, the mean over its items.
    """
    positions_M = np.array([e.position for e in examples], dtype=np.int64)
    row_of = {int(position): row for row, position in enumerate(positions_M)}
    recipes = recipes_for(seed, positions_M, config)
    shares_M, rows_M = np.ones(len(examples), np.float32), np.arange(len(examples))
    for row, position in enumerate(positions_M.tolist()):
        other = row_of.get(position ^ 1)
        if other is None or not (known_M[row] and known_M[other] and _alike(examples[row], examples[other])):
            continue
        rows_M[row] = other
        if row < other:
            pair = recipes[row], recipes[other]
            found = [_mix_items(examples[row].items[n], examples[other].items[n], modalities[n], pair) for n in examples[row].items]
            if pixels_MHHC is not None and examples[row].image is not None:
                found.append(_mix_squares(pixels_MHHC[row], pixels_MHHC[other], pair))
            if found:
                shares_M[row], shares_M[other] = (fmean(shares) for shares in zip(*found, strict=True))
    return Mixing(rows_M=torch.from_numpy(rows_M), shares_M=torch.from_numpy(shares_M))


def _alike(one: Example, two: Example) -> bool:
    """Whether they can be mixed."""
    shapes = [{name: item.grid[1:] for name, item in e.items.items()} for e in (one, two)]
    return (one.image is None) == (two.image is None) and shapes[0] == shapes[1]


def _mix_squares(one_HHC: NDArray[np.uint8], two_HHC: NDArray[np.uint8], pair: tuple[Recipe, Recipe]) -> Shares:
    """Mix two images; returns each one's own share."""
    one_PC, two_PC = (image_HHC.reshape(-1, image_HHC.shape[2]) for image_HHC in (one_HHC, two_HHC))  # views
    return _mix_cells(one_PC, two_PC, Modality(), pair, (1, *one_HHC.shape[:2]))


def _mix_items(one: Patches, two: Patches, modality: Modality, pair: tuple[Recipe, Recipe]) -> Shares:
    """Mix what two items have in common, patches in the order (time, height, width); returns each one's own share."""
    grid = (min(one.grid[0], two.grid[0]), *one.grid[1:])
    common = int(np.prod(grid))
    shares = _mix_cells(one.values_PC[:common], two.values_PC[:common], modality, pair, grid)
    return (
        _share_of_all(shares[0], pair[0], common, len(one.values_PC)),
        _share_of_all(shares[1], pair[1], common, len(two.values_PC)),
    )


def _share_of_all(share: float, recipe: Recipe, common: int, count: int) -> float:
    """Where a box was cut, what is left of the whole item; a share by which items are laid over one another is what was drawn."""
    return share if recipe.centre is None else 1 - (1 - share) * common / count


def _mix_cells(
    one_PC: NDArray[Any], two_PC: NDArray[Any], modality: Modality, pair: tuple[Recipe, Recipe], grid: Grid
) -> Shares:
    mixed = [_mixed(a_PC, b_PC, modality, r, grid) for (a_PC, b_PC), r in zip(((one_PC, two_PC), (two_PC, one_PC)), pair, strict=True)]
    for array, (values, _) in zip((one_PC, two_PC), mixed, strict=True):
        array[...] = np.rint(values) if array.dtype == np.uint8 else values
    return mixed[0][1], mixed[1][1]


def _mixed(own_PC: NDArray[Any], other_PC: NDArray[Any], modality: Modality, recipe: Recipe, grid: Grid) -> tuple[NDArray[Any], float]:
    if recipe.centre is None:
        return modality.mix(own_PC, other_PC, recipe.share), recipe.share
    chosen_P = box(grid, recipe.share, recipe.centre).reshape(-1)
    return np.where(chosen_P[:, None], other_PC, own_PC), 1 - float(chosen_P.mean())


def box(grid: Grid, share: float, centre: tuple[float, float]) -> NDArray[np.bool_]:
    """Cut a box out of a grid.

    Each of its two sides is sqrt(1 - share) of the grid's (equation 2 of CutMix), rounded down, and it is clipped at the border, so that
    at least `share` of the grid is left. It goes through the whole time of what has a height and a width; of what has one of
    them, as sounds have, it is a stretch of time and bands.

    Args:
        grid: cells along time, height and width.
        share: part of the area that is left at least.
        centre: its middle, as parts of the two sides.

    Returns:
        (T, H, W), True in the box.
    """
    chosen_THW = np.ones(grid, dtype=bool)
    axes = (1, 2) if grid[2] > 1 else (0, 1)
    sides = [axis for axis in axes if grid[axis] > 1]
    for axis in sides:
        length, cells = int(grid[axis] * (1 - share) ** (1 / len(sides))), np.arange(grid[axis])
        start = int(grid[axis] * centre[axes.index(axis)]) - length // 2
        inside = (cells >= start) & (cells < start + length)
        chosen_THW &= inside.reshape([-1 if a == axis else 1 for a in range(3)])
    return chosen_THW if sides else np.zeros(grid, dtype=bool)
