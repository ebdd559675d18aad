"""What a patch learns of its neighbours: a depthwise convolution over the grid of an item's patches.

Attention finds a neighbour by its position alone, which takes many samples to learn; a convolution has it from the first step.
Source: Chu et al. 2021 (CPVT), section 3.2, conditional positional encodings; Li et al. 2022 (UniFormer), equation 1, before every layer.

Shape letters: X tokens, S items and copies, (T, H, W) the largest grid of the items, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmscale.model.percepts import Items, walk

SIDE = 3
"""Patches that the kernel spans along each axis."""


@dataclass(frozen=True, slots=True)
class Canvas:
    """Where the tokens of a modality's items stand, each item in a grid of its own. Patches that are not kept leave their cell empty."""

    items: int
    grid: tuple[int, int, int]
    """(T, H, W)."""
    cell_X: Tensor
    """Cell of each token, int64; one past the last for tokens that are no patch."""

    @property
    def cells(self) -> int:
        """Cells of all items."""
        t, h, w = self.grid
        return self.items * t * h * w


def canvas_of(items: Items, grid: tuple[int, int, int] | None) -> Canvas:
    """Find the place of every token.

    Args:
        items: of one modality.
        grid: their largest grid; None where only the coordinates tell, which waits for the device.
    """
    item_X, _ = walk(items.lengths_S, len(items.coordinates_X3))
    if grid is None:
        t, h, w = items.coordinates_X3.amax(0).clamp(min=1).tolist() if len(items.coordinates_X3) else (1, 1, 1)
        grid = (t, h, w)
    place_X3 = items.coordinates_X3 - 1
    cell_X = ((item_X * grid[0] + place_X3[:, 0]) * grid[1] + place_X3[:, 1]) * grid[2] + place_X3[:, 2]
    cells = len(items.lengths_S) * grid[0] * grid[1] * grid[2]
    return Canvas(len(items.lengths_S), grid, torch.where(place_X3[:, 0] >= 0, cell_X, cells))


class PatchConvolution(nn.Module):
    """Adds to every patch a weighted sum of it and its neighbours in time, height and width, channel by channel; starts at 0."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, 1, SIDE, SIDE, SIDE))

    def forward(self, x_XD: Tensor, canvases: Sequence[Canvas]) -> Tensor:
        """Convolve the items of one modality after the other; (X, D). Tokens that are no patch stay as they are."""
        if not canvases:  # an expert that no modality goes through
            return x_XD + 0.0 * self.weight.sum()
        parts = x_XD.split([len(canvas.cell_X) for canvas in canvases])
        return torch.cat([self._convolve(*pair) for pair in zip(parts, canvases, strict=True)])

    def _convolve(self, x_XD: Tensor, canvas: Canvas) -> Tensor:
        cells_CD = x_XD.new_zeros(canvas.cells + 1, x_XD.shape[1]).index_copy(0, canvas.cell_X, x_XD)[:-1]
        t, h, w = canvas.grid
        volume_SDTHW = cells_CD.view(canvas.items, t, h, w, x_XD.shape[1]).permute(0, 4, 1, 2, 3)
        around_CD = self._neighbours(volume_SDTHW).permute(0, 2, 3, 4, 1).flatten(0, 3)
        found_XD = torch.cat([around_CD, around_CD.new_zeros(1, around_CD.shape[1])]).index_select(0, canvas.cell_X)
        return x_XD + found_XD

    def _neighbours(self, volume_SDTHW: Tensor) -> Tensor:
        """The convolution, in two dimensions where a third has one cell: so of images (T = 1) and of sound (W = 1)."""
        weight, middle, d = self.weight.to(volume_SDTHW.dtype), SIDE // 2, len(self.weight)
        for axis in (2, 4):
            if volume_SDTHW.shape[axis] == 1:
                flat_SDHW = F.conv2d(volume_SDTHW.squeeze(axis), weight.select(axis, middle), padding=middle, groups=d)
                return flat_SDHW.unsqueeze(axis)
        return F.conv3d(volume_SDTHW, weight, padding=middle, groups=d)
