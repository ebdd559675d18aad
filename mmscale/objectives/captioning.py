"""Captioning: each token from the image and the tokens before it (prefix-LM). Source: Wang et al. 2022 (SimVLM), section 3.1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmscale.data.batch import IGNORE, Batch
from mmscale.model.state import State
from mmscale.objectives.base import Term, ratio

if TYPE_CHECKING:
    from mmscale.model.model import MMScaleModel


@dataclass(frozen=True, kw_only=True, slots=True)
class Captioning:
    """Cross-entropy of caption tokens, a mean over them. A caption without an image is a plain language model's text."""

    weight: float
    name: str = "captioning"

    def wants(self) -> dict[str, Any]:
        """Captions in the fusion layers."""
        return {"captioning": True}

    def check(self, micro_batch: int, ranks: int) -> None:
        """Works on every topology."""

    def count(self, batch: Batch) -> float:
        """Target tokens of captions that are fused."""
        fused_T = batch.caption.fuse_S.repeat_interleave(batch.caption.cu_seqlens_S1.diff().long())
        return float(((batch.caption.labels_T != IGNORE) & fused_T).sum())

    def loss(self, state: State, batch: Batch, model: MMScaleModel) -> Term:
        """Sum over target tokens."""
        hits = state.caption_hits_R
        return Term(state.caption_loss_R.sum(), {"captioning_accuracy": ratio(hits)})
