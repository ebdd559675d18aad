"""The sigmoid loss of images against captions, block by block, with its gradient: no similarities are kept for backward.

Source: Zhai et al. 2023 (SigLIP), equation 1. With z = scale x.y + bias and s = 1 for a pair that belongs together, else -1, the loss
is -log sigmoid(s z) and its derivative by z is sigmoid(z) - [s = 1], so that a block's gradients are two more products of matrices.

Shape letters: M samples of this rank, K samples of another, B rows at once, E projection size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmscale.own_time import waiting

PAIRS_AT_ONCE = 1 << 22
"""Similarities that exist at one time (16 MiB in fp32, and some times that for what is worked out from them)."""


@dataclass(frozen=True, slots=True)
class Side:
    """What the loss needs of some samples."""

    image_ME: Tensor
    caption_ME: Tensor
    valid_M: Tensor
    """bool: has an image and a caption."""
    hash_M: Tensor
    positions_M: Tensor

    def rows(self, start: int, stop: int) -> Side:
        """Some of the samples."""
        return Side(*(getattr(self, name)[start:stop] for name in Side.__slots__))

    def detach(self) -> Side:
        """The same without graph."""
        return Side(*(getattr(self, name).detach() for name in Side.__slots__))


@dataclass(frozen=True, slots=True)
class PairLoss:
    """The loss of this rank's images against all captions, and what this rank's tensors owe to the loss of all ranks."""

    loss_M: Tensor
    """fp32, a row an image; 0 where a sample is no pair."""
    image_ME: Tensor
    """Gradient by this rank's images."""
    caption_ME: Tensor
    """Gradient by this rank's captions: of all ranks' images."""
    scale_M: Tensor
    """Gradient by the scale, of each row."""
    bias_M: Tensor
    """Gradient by the bias, of each row."""

    @classmethod
    def zeros(cls, mine: Side) -> PairLoss:
        """Nothing added up yet."""
        rows = [torch.zeros(len(mine.valid_M), device=mine.image_ME.device) for _ in range(3)]
        return cls(rows[0], torch.zeros_like(mine.image_ME), torch.zeros_like(mine.caption_ME), rows[1], rows[2])


@torch.no_grad()
def pair_loss(mine: Side, others: Sequence[Side], scale: Tensor, bias: Tensor, group: int | None, gradient: bool = True) -> PairLoss:
    """Compute the loss of local images against the captions of all ranks, and the gradients of what is local.

    The sum over ranks of `loss_M` is the loss of one process that holds all samples; its gradient by what a rank holds is what that rank
    gets here, except that scale and bias get their share of the rows.

    Args:
        mine: this rank's samples.
        others: those of every other rank.
        scale: fp32 (1,).
        bias: fp32 (1,).
        group: pairs count only within aligned groups of so many positions; None for all.
        gradient: whether gradients are wanted at all.
    """
    total = PairLoss.zeros(mine)
    for other in (mine, *others):
        if not len(other.valid_M):
            continue
        rows = max(1, PAIRS_AT_ONCE // len(other.valid_M))
        for start in range(0, len(mine.valid_M), rows):
            part = slice(start, start + rows)
            _add_block(total, part, mine.rows(start, start + rows), other, other is mine, scale, bias, group, gradient)
    return total


def _add_block(
    total: PairLoss, part: slice, mine: Side, other: Side, same: bool, scale: Tensor, bias: Tensor, group: int | None, gradient: bool
) -> None:
    counts_BK, positive_BK = _relation(mine, other, group)
    similarity_BK = mine.image_ME @ other.caption_ME.T
    slope_BK = _add_rows(total.loss_M[part], similarity_BK, counts_BK, positive_BK, scale, bias)
    if not gradient:
        return
    total.scale_M[part] += (slope_BK * similarity_BK).sum(1)
    total.bias_M[part] += slope_BK.sum(1)
    total.image_ME[part] += (slope_BK @ other.caption_ME) * scale
    if same:
        total.caption_ME.addcmul_(slope_BK.T @ mine.image_ME, scale)
    else:  # the columns: images of the other rank against captions of this one; their value is counted there
        ignored_B = torch.zeros_like(total.loss_M[part])
        slope_BK = _add_rows(ignored_B, mine.caption_ME @ other.image_ME.T, counts_BK, positive_BK, scale, bias)
        total.caption_ME[part] += (slope_BK @ other.image_ME) * scale


def _relation(mine: Side, other: Side, group: int | None) -> tuple[Tensor, Tensor]:
    """Which combinations count, and which belong together; bool (B, K)."""
    counts_BK = mine.valid_M[:, None] & other.valid_M[None]
    if group is not None:
        counts_BK &= (mine.positions_M // group)[:, None] == (other.positions_M // group)[None]
    return counts_BK, mine.hash_M[:, None] == other.hash_M[None]


def _add_rows(loss_B: Tensor, similarity_BK: Tensor, counts_BK: Tensor, positive_BK: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Add each row's loss, and return the derivative by the logits (B, K)."""
    z_BK = similarity_BK * scale + bias
    loss_B -= F.logsigmoid(torch.where(positive_BK, z_BK, -z_BK)).masked_fill_(~counts_BK, 0.0).sum(1)
    return z_BK.sigmoid_().sub_(positive_BK.to(z_BK.dtype)).masked_fill_(~counts_BK, 0.0)


class SigmoidLoss(torch.autograd.Function):
    """`pair_loss` in a graph: the gradient is worked out in the forward, so that backward needs no block and no collective again."""

    @staticmethod
    def forward(
        ctx: Any, image_ME: Tensor, caption_ME: Tensor, scale: Tensor, bias: Tensor, mine: Side, others: list[Side], group: int | None
    ) -> Tensor:
        """Sum over local images; `mine` holds the very embeddings, detached."""
        found = pair_loss(mine, others, scale, bias, group, gradient=any(ctx.needs_input_grad))
        ctx.save_for_backward(found.image_ME, found.caption_ME, found.scale_M.sum()[None], found.bias_M.sum()[None])
        return found.loss_M.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        """Scale what the forward has found."""
        return *(above[0] * gradient for gradient in ctx.saved_tensors), None, None, None


@torch.no_grad()
def hits(mine: Side, group: int | None) -> Tensor:
    """Which images are nearest to a caption equal to their own, among the valid ones of `mine`; bool (M,)."""
    hits_M = torch.zeros_like(mine.valid_M)
    rows = max(1, PAIRS_AT_ONCE // max(1, len(hits_M)))
    for start in range(0, len(hits_M), rows):
        part = mine.rows(start, start + rows)
        allowed_BM, _ = _relation(part, mine, group)
        best_B = (part.image_ME @ mine.caption_ME.T).masked_fill_(~allowed_BM, float("-inf")).argmax(1)
        hits_M[start : start + rows] = (mine.hash_M[best_B] == part.hash_M) & part.valid_M
    return hits_M


@torch.no_grad()
def gather_sides(mine: Side) -> list[Side]:
    """Every other rank's side, without gradient. Two collectives: all ranks call, with equal M."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return []
    vectors = torch.cat([mine.image_ME, mine.caption_ME], dim=1).contiguous()
    whole = torch.stack([mine.valid_M.long(), mine.hash_M, mine.positions_M], dim=1)
    all_vectors = [torch.empty_like(vectors) for _ in range(dist.get_world_size())]
    all_whole = [torch.empty_like(whole) for _ in all_vectors]
    with waiting(vectors.device):
        dist.all_gather(all_vectors, vectors)
        dist.all_gather(all_whole, whole)
    width = mine.image_ME.shape[1]
    sides = [Side(v[:, :width], v[:, width:], w[:, 0].bool(), w[:, 1], w[:, 2]) for v, w in zip(all_vectors, all_whole, strict=True)]
    del sides[dist.get_rank()]
    return sides


def join(sides: Sequence[Side]) -> Side:
    """Sides one after the other."""
    return Side(*(torch.cat([getattr(s, name) for s in sides]) for name in Side.__slots__))
