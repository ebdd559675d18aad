"""Classification of a sample by a task head: fine-tuning for labels and for answers to questions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmscale.data.batch import IGNORE, Batch
from mmscale.model.state import State
from mmscale.objectives.base import Term

if TYPE_CHECKING:
    from mmscale.model.model import MMScaleModel


@lru_cache(maxsize=4)
def _on(device: torch.device, dtype: torch.dtype, weights: tuple[float, ...]) -> Tensor:
    """Weights (C,) on a device, copied there once: a copy in every step would wait for it."""
    return torch.tensor(weights, device=device, dtype=dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class Classify:
    """Cross-entropy of `targets[head]` by the task head of that name, a mean over labelled samples."""

    weight: float
    head: str = "label"
    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] | None = None
    """Factor of each class in the loss; they should have a mean of 1 over samples, by whose number the sum is divided."""
    name: str = "classify"

    def wants(self) -> dict[str, Any]:
        """Fused texts, and images alone where a sample has no text."""
        return {"classify": True}

    def check(self, micro_batch: int, ranks: int) -> None:
        """Works on every topology."""

    def count(self, batch: Batch) -> float:
        """Labelled samples."""
        return float((batch.targets[self.head] != IGNORE).sum())

    def loss(self, state: State, batch: Batch, model: MMScaleModel) -> Term:
        """Sum over labelled samples; of a mixture both labels count, each by its share. The accuracy logged is that of the larger part."""
        logits_MC, labels_M = state.class_logits_MC[self.head], batch.targets[self.head]
        weight_C = None if self.class_weights is None else _on(logits_MC.device, logits_MC.dtype, self.class_weights)
        cross_entropy = partial(F.cross_entropy, logits_MC, weight=weight_C, ignore_index=IGNORE, label_smoothing=self.label_smoothing)
        if batch.mixing is None:
            loss = cross_entropy(labels_M, reduction="sum")
        else:
            own_M, other_M = batch.mixing.shares_M, labels_M[batch.mixing.rows_M]
            loss = (own_M * cross_entropy(labels_M, reduction="none") + (1 - own_M) * cross_entropy(other_M, reduction="none")).sum()
        labelled = labels_M != IGNORE
        hits = (logits_MC.detach().argmax(1) == labels_M) & labelled
        return Term(loss, {"accuracy": (hits.sum().float(), labelled.sum().float())})
