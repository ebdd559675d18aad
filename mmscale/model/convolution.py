"""What a patch learns of its neighbours: a depthwise convolution over the grid of an item's patches.

Attention finds a neighbour by its position alone, which takes many samples to learn; a convolution has it from the first step.
Source: Chu et al. 2021 (CPVT), section 3.2, conditional positional encodings; Li et al. 2022 (UniFormer), equation 1, before every layer.

A patch knows its neighbours as rows of the token buffer, so that items may have any shape, be of several modalities, have patches left
out, and stand in any order in the fusion layers.

Shape letters: X tokens, K taps of the kernel, D hidden size, (T, H, W) the largest grid of a modality's items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmscale.model.percepts import Items, Percepts, walk
from mmscale.model.sequences import gather_parts

SIDE = 3
"""Patches that the kernel spans along each axis."""
TAPS = SIDE**3
"""Tap 9 i + 3 j + k reads what is i - 1 further in time, j - 1 in height, k - 1 in width."""
NOW = range(9, 18)
"""Those of the same time."""
NOBODY = 1 << 40
"""In place of the way to a neighbour that is not there."""


@dataclass(frozen=True, slots=True)
class Neighbours:
    """Where each token of a buffer finds what its convolution reads. One past the last row stands for nobody."""

    rows_XK: Tensor
    """int64 row that each tap reads."""
    readers_XK: Tensor
    """int64 row of the token that reads this one by that tap."""
    taps: tuple[int, ...]
    """Tap of each column."""
    way_XK: Tensor | None = None
    """Patches: int64 rows from the token's own to its neighbour's, or NOBODY. Tokens that are no patch have no neighbours, not even
    themselves."""

    @classmethod
    def along(cls, way_XK: Tensor, taps: tuple[int, ...]) -> Neighbours:
        """Those that these ways lead to; for every tap there is the opposite, TAPS - 1 - tap, as well."""
        own_X = torch.arange(len(way_XK), device=way_XK.device)
        rows_XK = torch.where(way_XK == NOBODY, len(own_X), own_X[:, None] + way_XK)
        return cls(rows_XK, rows_XK.flip(1), taps, way_XK)  # being beside one another is mutual


def neighbours_of(percepts: Percepts, grid: tuple[int, int, int]) -> list[Neighbours]:
    """Find the neighbours in the lower stack, part by part.

    Args:
        percepts: what the samples show.
        grid: that of a square image.
    """
    if percepts.parts[0].length is not None:  # square images alone: no time, and nothing to wait for
        return [Neighbours.along(_ways(percepts.items[0], grid, NOW), tuple(NOW))]
    found = []
    for expert in range(len(percepts.parts)):
        items = [i for i in percepts.items if i.expert == expert]
        way_XK = torch.cat([_ways(i, _grid(i.coordinates_X3), range(TAPS)) for i in items] or [percepts.rows_U.new_zeros(0, TAPS)])
        taps = tuple((way_XK != NOBODY).any(0).nonzero().squeeze(1).tolist())
        found.append(Neighbours.along(way_XK[:, taps], taps))
    return found


def fused_neighbours(percepts: Percepts, gathers: Sequence[Tensor]) -> list[Neighbours]:
    """Those of `percepts` in the buffer of the fusion layers, where the tokens of an item still follow one another."""
    lower = percepts.neighbours
    if not lower:
        return []
    ways = gather_parts([n.way_XK for n in lower if n.way_XK is not None], percepts, gathers)
    return [Neighbours.along(way_XK, n.taps) for way_XK, n in zip(ways, lower, strict=True)]


def _grid(coordinates_X3: Tensor) -> tuple[int, int, int]:
    t, h, w = coordinates_X3.amax(0).clamp(min=1).tolist() if len(coordinates_X3) else (1, 1, 1)
    return t, h, w


def _ways(items: Items, grid: tuple[int, int, int], taps: range) -> Tensor:
    """(X, K) ways of a modality's tokens, by a look into the grids: which token stands in a cell."""
    place_X3 = items.coordinates_X3 - 1  # leading tokens at -1
    item_X, _ = walk(items.lengths_S, len(place_X3))
    own_X, tap_K = torch.arange(len(place_X3), device=place_X3.device), torch.arange(taps.start, taps.stop, device=place_X3.device)
    cells = len(items.lengths_S) * grid[0] * grid[1] * grid[2]

    def cell(place: Sequence[Tensor], item: Tensor) -> Tensor:
        """The cell, or one past the last outside of the grid."""
        inside = torch.stack([(p >= 0) & (p < size) for p, size in zip(place, grid, strict=True)]).all(0)
        t, h, w = place
        return torch.where(inside, ((item * grid[0] + t) * grid[1] + h) * grid[2] + w, cells)

    token_C = own_X.new_full((cells + 1,), -1).index_copy(0, cell(place_X3.unbind(1), item_X), own_X)
    token_C[cells:] = -1
    steps = (tap_K // 9 - 1, tap_K // 3 % 3 - 1, tap_K % 3 - 1)
    beside = [p[:, None] + step for p, step in zip(place_X3.unbind(1), steps, strict=True)]
    found_XK = token_C[cell(beside, item_X[:, None])]
    return torch.where((place_X3[:, :1] >= 0) & (found_XK >= 0), found_XK - own_X[:, None], NOBODY)


class Convolution(nn.Module):
    """Adds to every token a weighted sum of its neighbours and itself, channel by channel.

    Args:
        width: D.
        kernel: taps along each axis.
    """

    def __init__(self, width: int, *kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, 1, *kernel))

    def forward(self, x_XD: Tensor, neighbours: Neighbours) -> Tensor:
        """The tokens after it, (X, D); those without neighbours stay as they are."""
        where = (neighbours.rows_XK, neighbours.readers_XK, neighbours.taps)
        added: Tensor = _Convolution.apply(x_XD, self.weight.flatten(1), *where)  # type: ignore[no-untyped-call]
        return added


class PatchConvolution(Convolution):
    """Over neighbours in time, height and width."""

    def __init__(self, width: int) -> None:
        super().__init__(width, SIDE, SIDE, SIDE)


class _Convolution(torch.autograd.Function):
    """x + sum over taps of weight * neighbour. Neighbours are looked up again in backward: keeping them would take K times the memory.

    The gradient comes back from those that have read a token, looked up as well: without an atomic addition it is the same every time.
    """

    @staticmethod
    def forward(ctx: Any, x_XD: Tensor, weight_DK: Tensor, rows_XK: Tensor, readers_XK: Tensor, taps: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(x_XD, weight_DK, rows_XK, readers_XK)
        ctx.taps = taps
        return _summed(x_XD, weight_DK, rows_XK, taps)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient_XD,) = gradients
        x_XD, weight_DK, rows_XK, readers_XK = ctx.saved_tensors
        back_XD = _summed(gradient_XD, weight_DK, readers_XK, ctx.taps)
        padded_XD, slopes_DK = _padded(x_XD), torch.zeros_like(weight_DK)
        for column, tap in enumerate(ctx.taps):
            slopes_DK[:, tap] = (padded_XD.index_select(0, rows_XK[:, column]) * gradient_XD).sum(0)
        return back_XD, slopes_DK, None, None, None


def _padded(x_XD: Tensor) -> Tensor:
    return torch.cat([x_XD, x_XD.new_zeros(1, x_XD.shape[1])])


def _summed(x_XD: Tensor, weight_DK: Tensor, rows_XK: Tensor, taps: tuple[int, ...]) -> Tensor:
    """Each token and what the columns' neighbours add to it, by the weights of the taps."""
    padded_XD, out_XD = _padded(x_XD), x_XD.clone()
    for column, tap in enumerate(taps):
        out_XD.addcmul_(padded_XD.index_select(0, rows_XK[:, column]), weight_DK[:, tap])
    return out_XD
