"""Contrastive learning with the sigmoid loss, over the micro-batches of all ranks. Source: Zhai et al. 2023 (SigLIP), equation 1.

Images of this rank are set against captions of all ranks, with every gradient they have here (rows). What the captions of this
rank owe to images of other ranks is added with value zero (columns). So backward needs no collective, and the sum of the ranks'
values and gradients is that of one process. Samples with the same caption are positives of each other.

Shape letters: M samples a rank, W ranks, E projection size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmscale.data.batch import Batch
from mmscale.model.pairs import has, row_hash, same_group
from mmscale.model.state import State, by_row
from mmscale.objectives.base import Term
from shards.errors import ConfigError

if TYPE_CHECKING:
    from mmscale.model.model import MMScaleModel

PAIRS_AT_ONCE = 1 << 24
"""Similarities of a block; with more ranks than fit, blocks are recomputed in backward."""


@dataclass(frozen=True, slots=True)
class Side:
    """What the loss needs of some samples."""

    image_ME: Tensor
    caption_ME: Tensor
    valid_M: Tensor
    """bool: has an image and a caption."""
    hash_M: Tensor
    positions_M: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Contrastive:
    """Sigmoid loss over all image-caption combinations, a mean over pairs (the sum of a pair's row)."""

    weight: float
    group: int | None = None
    name: str = "contrastive"

    def wants(self) -> dict[str, Any]:
        """Embeddings only, which every forward computes."""
        return {"contrastive": True}

    def check(self, micro_batch: int, ranks: int) -> None:
        """A group must lie in what the ranks hold together at one micro-step.

        Raises:
            ConfigError: it does not.
        """
        if self.group is not None and (micro_batch * ranks) % self.group:
            raise ConfigError(
                f"`objectives.contrastive.group` must divide micro-batch x ranks = {micro_batch} x {ranks} = {micro_batch * ranks}; "
                f"got {self.group}. Use a divisor of it, or null for the micro-batches of all ranks."
            )

    def count(self, batch: Batch) -> float:
        """Pairs."""
        return float((has(batch.perception_rows_N, batch.size) & has(batch.caption.rows_S, batch.size)).sum())

    def loss(self, state: State, batch: Batch, model: MMScaleModel) -> Term:
        """Sum over local images and the captions of all ranks. All ranks call, with equal M."""
        mine = _side(state, batch)
        similarity_MM = mine.image_ME @ mine.caption_ME.T
        total = self._block(similarity_MM, state.scale, state.bias, mine, mine)
        if self._crosses_ranks(batch.size):
            total = total + self._remote(state, mine)
        with torch.no_grad():
            allowed = mine.valid_M[None] & same_group(mine.positions_M, mine.positions_M, self.group)
            best_M = similarity_MM.masked_fill(~allowed, float("-inf")).argmax(1) if batch.size else mine.hash_M
            hits_M = (mine.hash_M[best_M] == mine.hash_M) & mine.valid_M if batch.size else mine.valid_M
        return Term(total, {"contrastive_accuracy": (hits_M.sum().float(), mine.valid_M.sum().float())})

    def _crosses_ranks(self, size: int) -> bool:
        many = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        return many and (self.group is None or size % self.group != 0)

    def _remote(self, state: State, mine: Side) -> Tensor:
        """Rows of local images against remote captions, and columns of remote images with value zero."""
        others = _gather(mine)
        size = max(1, len(mine.valid_M))
        together = max(1, PAIRS_AT_ONCE // (size * size))
        total = state.scale.new_zeros(())
        blocks = [_join(others[i : i + together]) for i in range(0, len(others), together)]
        for block in blocks:
            if len(blocks) > 1:
                total = total + checkpoint(self._rows_and_columns, state, mine, block, use_reentrant=False)
            else:
                total = total + self._rows_and_columns(state, mine, block)
        return total

    def _rows_and_columns(self, state: State, mine: Side, other: Side) -> Tensor:
        rows = self._block(mine.image_ME @ other.caption_ME.T, state.scale, state.bias, mine, other)
        columns = self._block(mine.caption_ME @ other.image_ME.T, state.scale.detach(), state.bias.detach(), mine, other)
        return rows + (columns - columns.detach())

    def _block(self, similarity: Tensor, scale: Tensor, bias: Tensor, mine: Side, other: Side) -> Tensor:
        counts = mine.valid_M[:, None] & other.valid_M[None] & same_group(mine.positions_M, other.positions_M, self.group)
        sign = torch.where(mine.hash_M[:, None] == other.hash_M[None], 1.0, -1.0)
        return -torch.where(counts, F.logsigmoid(sign * (similarity * scale + bias)), 0.0).sum()


def _side(state: State, batch: Batch) -> Side:
    return Side(
        by_row(state.image_embedding_NE, batch.perception_rows_N, batch.size),
        by_row(state.caption_embedding_SE, batch.caption.rows_S, batch.size),
        has(batch.perception_rows_N, batch.size) & has(batch.caption.rows_S, batch.size),
        row_hash(batch),
        batch.positions_M,
    )


@torch.no_grad()
def _gather(mine: Side) -> list[Side]:
    """Every other rank's side, without gradient. Two collectives: all ranks call, with equal M."""
    vectors = torch.cat([mine.image_ME, mine.caption_ME], dim=1).contiguous()
    whole = torch.stack([mine.valid_M.long(), mine.hash_M, mine.positions_M], dim=1)
    all_vectors = [torch.empty_like(vectors) for _ in range(dist.get_world_size())]
    all_whole = [torch.empty_like(whole) for _ in all_vectors]
    dist.all_gather(all_vectors, vectors)
    dist.all_gather(all_whole, whole)
    width = mine.image_ME.shape[1]
    sides = [Side(v[:, :width], v[:, width:], w[:, 0].bool(), w[:, 1], w[:, 2]) for v, w in zip(all_vectors, all_whole, strict=True)]
    del sides[dist.get_rank()]
    return sides


def _join(sides: list[Side]) -> Side:
    return Side(*(torch.cat([getattr(s, name) for s in sides]) for name in Side.__slots__))
