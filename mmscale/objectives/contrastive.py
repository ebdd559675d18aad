"""Contrastive learning with the sigmoid loss, over the micro-batches of all ranks. Source: Zhai et al. 2023 (SigLIP), equation 1.

Images of this rank are set against captions of all ranks (rows). What the captions of this rank owe to images of other ranks is
gradient without value (columns). So backward needs no collective, and the sum of the ranks' values and gradients is that of one
process. Samples with the same caption are positives of each other.

Shape letters: M samples a rank, E projection size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from mmscale.data.batch import Batch
from mmscale.model.pairs import has, row_hash
from mmscale.model.state import State, by_row
from mmscale.objectives.base import Term
from mmscale.objectives.sigmoid import Side, SigmoidLoss, gather_sides, hits
from shards.errors import ConfigError

if TYPE_CHECKING:
    from mmscale.model.model import MMScaleModel


@dataclass(frozen=True, kw_only=True, slots=True)
class Contrastive:
    """Sigmoid loss over all image-caption combinations, a mean over pairs (the sum of a pair's row)."""

    weight: float
    group: int | None = None
    negatives: Literal["micro", "global"] = "micro"
    """global: `mmscale.objectives.feature_cache` replaces this objective where there is accumulation."""
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
        side = side_of(state, batch)
        mine = side.detach()
        others = gather_sides(mine) if self._crosses_ranks(batch.size) else []
        total: Tensor = SigmoidLoss.apply(side.image_ME, side.caption_ME, state.scale, state.bias, mine, others, self.group)  # type: ignore[no-untyped-call]
        return Term(total, accuracy(mine, self.group))

    def _crosses_ranks(self, size: int) -> bool:
        many = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        return many and (self.group is None or size % self.group != 0)


def side_of(state: State, batch: Batch) -> Side:
    """What the loss needs of a micro-batch."""
    return Side(
        by_row(state.image_embedding_NE, batch.perception_rows_N, batch.size),
        by_row(state.caption_embedding_SE, batch.caption.rows_S, batch.size),
        has(batch.perception_rows_N, batch.size) & has(batch.caption.rows_S, batch.size),
        row_hash(batch),
        batch.positions_M,
    )


@torch.no_grad()
def accuracy(mine: Side, group: int | None) -> dict[str, tuple[Tensor, Tensor]]:
    """Log pair: how many images are nearest to their own caption, among those of this rank's micro-batch."""
    return {"contrastive_accuracy": (hits(mine, group).sum().float(), mine.valid_M.sum().float())}
