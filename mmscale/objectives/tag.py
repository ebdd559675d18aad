"""Tagging of a sample by a task head: which of all labels it has.

Shape letters: M samples, C labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F

from mmscale.data.batch import IGNORE, Batch
from mmscale.model.state import State
from mmscale.objectives.base import Term

if TYPE_CHECKING:
    from mmscale.model.model import MMScaleModel


@dataclass(frozen=True, kw_only=True, slots=True)
class Tag:
    """Binary cross-entropy of `targets[head]` by the task head of that name, a mean over samples with the field and over labels."""

    weight: float
    head: str = "tags"
    name: str = "tag"

    def wants(self) -> dict[str, Any]:
        """Fused texts, and images alone where a sample has no text."""
        return {"classify": True}

    def check(self, micro_batch: int, ranks: int) -> None:
        """Works on every topology."""

    def count(self, batch: Batch) -> float:
        """Pairs of a sample and a label."""
        return float((batch.targets[self.head] != IGNORE).sum())

    def loss(self, state: State, batch: Batch, model: MMScaleModel) -> Term:
        """Sum over pairs of a sample and a label; the targets of a mixture are mixed by its shares. Logs micro F1 at
        probability 0.5, of a mixture's larger part."""
        logits_MC, target_MC = state.class_logits_MC[self.head], batch.targets[self.head]
        known_MC = (target_MC != IGNORE).float()
        target_MC = target_MC * known_MC
        mixed_MC = target_MC
        if batch.mixing is not None:
            own_M1 = batch.mixing.shares_M[:, None]
            mixed_MC = own_M1 * target_MC + (1 - own_M1) * target_MC[batch.mixing.rows_M]
        loss = F.binary_cross_entropy_with_logits(logits_MC, mixed_MC, weight=known_MC, reduction="sum")
        predicted_MC = (logits_MC.detach() >= 0).float() * known_MC
        return Term(loss, {"micro_f1": (2 * (predicted_MC * target_MC).sum(), predicted_MC.sum() + target_MC.sum())})
