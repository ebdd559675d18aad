"""Contrastive negatives from the whole global batch under gradient accumulation. Source: Gao et al. 2021 (GradCache), section 3.

1. The embeddings of all micro-batches, without graph: one more forward of the lower layers.
2. The loss of the whole step, and its derivative by every embedding of this rank.
3. The micro-steps as ever, in which `Replayed` stands for the contrastive objective: the product of its embeddings, now with graph,
   and those derivatives. Its gradient is that of the loss over the whole step, by the chain rule.

Every forward is one of the whole module, which ZeRO-3 can follow: what step 1 does not need is an empty slice there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmscale.data.batch import Batch
from mmscale.model.model import no_text
from mmscale.model.state import State
from mmscale.objectives.base import Objective, Term
from mmscale.objectives.contrastive import Contrastive, accuracy, side_of
from mmscale.objectives.sigmoid import PairLoss, Side, gather_sides, join, pair_loss

if TYPE_CHECKING:
    from mmscale.model.model import MMScaleModel

Forward = Callable[[int, Batch, Sequence[Objective]], None]
"""Runs the model on the micro-batch of an index, with the random numbers of its micro-step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Collector:
    """Stands for all objectives in the first pass, and keeps the embeddings."""

    lower: dict[str, Any]
    """What the lower layers have to compute although nobody reads it (see `collect`)."""
    sides: list[Side] = field(default_factory=list)
    scalars: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    weight: float = 1.0
    name: str = "collector"

    def wants(self) -> dict[str, Any]:
        """The embeddings, which every forward computes."""
        return self.lower

    def check(self, micro_batch: int, ranks: int) -> None:
        """Works on every topology."""

    def count(self, batch: Batch) -> float:
        """Nothing is divided."""
        return 1.0

    def loss(self, state: State, batch: Batch, model: MMScaleModel) -> Term:
        """Keep what is needed; the value is 0."""
        self.sides.append(side_of(state, batch).detach())
        self.scalars.append((state.scale.detach(), state.bias.detach()))
        return Term(state.zero)


@dataclass(frozen=True, kw_only=True, slots=True)
class Replayed:
    """Stands for the contrastive objective in one micro-step: its part of the loss over the whole step, and its gradient."""

    part: PairLoss
    weight: float
    name: str = "contrastive"

    def wants(self) -> dict[str, Any]:
        """Embeddings only, which every forward computes."""
        return {"contrastive": True}

    def check(self, micro_batch: int, ranks: int) -> None:
        """Works on every topology."""

    def count(self, batch: Batch) -> float:
        """Pairs, as `Contrastive` counts them."""
        return Contrastive(weight=self.weight).count(batch)

    def loss(self, state: State, batch: Batch, model: MMScaleModel) -> Term:
        """Sum over this micro-batch's images and the captions of the whole step."""
        side, part = side_of(state, batch), self.part
        product = (side.image_ME * part.image_ME).sum() + (side.caption_ME * part.caption_ME).sum()
        product = product + (state.scale * part.scale_M.sum() + state.bias * part.bias_M.sum()).sum()
        return Term(part.loss_M.sum() + (product - product.detach()), accuracy(side.detach(), None))


def wanted(objectives: Sequence[Objective], micro_batches: int) -> Contrastive | None:
    """The objective whose negatives come from more than a micro-step holds, if there is one and there is more."""
    found = [o for o in objectives if isinstance(o, Contrastive) and o.negatives == "global"]
    return found[0] if found and micro_batches > 1 else None


def collect(forward: Forward, micro: Sequence[Batch], objectives: Sequence[Objective], dropout: bool) -> Collector:
    """Run the first pass.

    Args:
        forward: runs the model.
        micro: the micro-batches of this rank.
        objectives: those of training.
        dropout: whether the model or its adapters have any. With dropout both passes must draw the same numbers: the lower layers then
            compute all that they compute in the second one; without, only images and captions.
    """
    on = [o.wants() for o in objectives]
    masked = {key: value for wants in on for key, value in wants.items() if key in ("masked_image", "features")}
    collector = Collector(lower=masked if dropout else {})
    with torch.no_grad():
        for index, batch in enumerate(micro):
            forward(index, batch if dropout else replace(batch, text=no_text(batch)), (collector,))
    return collector


def replay(collector: Collector, weight: float) -> list[Replayed]:
    """Work out the loss of the whole step, and each micro-step's part of it (all ranks call; two collectives)."""
    mine = join(collector.sides)
    scale, bias = collector.scalars[0]
    found = pair_loss(mine, gather_sides(mine), scale, bias, None)
    names = PairLoss.__slots__
    sizes = [len(side.valid_M) for side in collector.sides]
    parts = zip(*(getattr(found, name).split(sizes) for name in names), strict=True)
    return [Replayed(part=PairLoss(*tensors), weight=weight) for tensors in parts]
