"""Masked language modelling: hidden tokens of the text from the rest of it and its image. Source: Devlin et al. 2019, section 3.1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmscale.data.batch import IGNORE, Batch
from mmscale.model.state import State
from mmscale.objectives.base import Term, ratio

if TYPE_CHECKING:
    from mmscale.model.model import MMScaleModel


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskedLanguage:
    """Cross-entropy of masked tokens, a mean over them."""

    weight: float
    name: str = "masked_language"

    def wants(self) -> dict[str, Any]:
        """Fused texts and their masked tokens."""
        return {"masked_language": True}

    def check(self, micro_batch: int, ranks: int) -> None:
        """Works on every topology."""

    def count(self, batch: Batch) -> float:
        """Masked tokens of texts that are fused."""
        fused_T = batch.text.fuse_S.repeat_interleave(batch.text.cu_seqlens_S1.diff().long())
        return float(((batch.text.labels_T != IGNORE) & fused_T).sum())

    def loss(self, state: State, batch: Batch, model: MMScaleModel) -> Term:
        """Sum over masked tokens."""
        hits = state.masked_hits_R
        return Term(
            state.masked_loss_R.sum(),
            {"masked_language_accuracy": ratio(hits)},
        )
