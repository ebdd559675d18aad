"""Matching: does this text belong to this image? Against hard negatives. Source: Li et al. 2021 (ALBEF), section 3.2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F

from mmscale.data.batch import Batch
from mmscale.model.pairs import has, negative_candidates
from mmscale.model.state import State
from mmscale.objectives.base import Term, ratio
from shards.errors import ConfigError

if TYPE_CHECKING:
    from mmscale.model.model import MMScaleModel


@dataclass(frozen=True, kw_only=True, slots=True)
class Matching:
    """Binary cross-entropy of pairs and of one hard negative each, a mean over both.

    Negatives come from the rank's own micro-batch, because hidden states are not exchanged between ranks; with `group`, from
    aligned groups of so many positions, which makes the loss independent of ranks and accumulation.
    """

    weight: float
    group: int | None = None
    name: str = "matching"

    def wants(self) -> dict[str, Any]:
        """Fused texts and hard negatives."""
        return {"matching": True, "matching_group": self.group}

    def check(self, micro_batch: int, ranks: int) -> None:
        """A group must lie in one micro-batch.

        Raises:
            ConfigError: it does not.
        """
        if self.group is not None and micro_batch % self.group:
            raise ConfigError(
                f"`objectives.matching.group` must divide the micro-batch of {micro_batch} samples, because hard negatives are not "
                f"exchanged between ranks; got {self.group}. Use a divisor of {micro_batch}, or null for the whole micro-batch."
            )

    def count(self, batch: Batch) -> float:
        """Pairs, and the negatives that will be drawn for them."""
        pairs = has(batch.perception_rows_N, batch.size) & has(batch.text.rows_S[batch.text.fuse_S], batch.size)
        return float(pairs.sum() + negative_candidates(batch, self.group).any(1).sum())

    def loss(self, state: State, batch: Batch, model: MMScaleModel) -> Term:
        """Sum over pairs and negatives."""
        loss = F.binary_cross_entropy_with_logits(state.match_logits_R, state.match_labels_R, reduction="sum")
        hits = (state.match_logits_R.detach() > 0) == (state.match_labels_R > 0)
        return Term(loss, {"matching_accuracy": ratio(hits)})
