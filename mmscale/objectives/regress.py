"""Regression of a sample by a task head: one number, normalised by the training shards.

Shape letters: M samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from mmscale.data.batch import Batch
from mmscale.model.state import State
from mmscale.objectives.base import Term

if TYPE_CHECKING:
    from mmscale.model.model import MMScaleModel


@dataclass(frozen=True, kw_only=True, slots=True)
class Regress:
    """Smooth L1 or half the square of what the task head misses, a mean over samples with a number.

    Source: Girshick 2015 (Fast R-CNN), equation 3.
    """

    weight: float
    squared: bool = False
    head: str = "number"
    name: str = "regress"

    def wants(self) -> dict[str, Any]:
        """Fused texts, and images alone where a sample has no text."""
        return {"classify": True}

    def check(self, micro_batch: int, ranks: int) -> None:
        """Works on every topology."""

    def count(self, batch: Batch) -> float:
        """Samples with a number."""
        return float((~batch.targets[self.head].isnan()).sum())

    def loss(self, state: State, batch: Batch, model: MMScaleModel) -> Term:
        """Sum over samples with a number; logs the absolute error in standard deviations."""
        predicted_M, target_M = state.class_logits_MC[self.head].squeeze(1), batch.targets[self.head]
        known_M = ~target_M.isnan()
        target_M = torch.where(known_M, target_M, predicted_M.detach())  # a difference of zero, which has no gradient
        each_M = (predicted_M - target_M) ** 2 / 2 if self.squared else F.smooth_l1_loss(predicted_M, target_M, reduction="none")
        error_M = (predicted_M.detach() - target_M).abs()
        return Term(each_M.sum(), {"mae": (error_M.sum(), known_M.sum().float())})
