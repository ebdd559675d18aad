"""Masked image modelling: hidden patches from the rest of the image.

Sources: He et al. 2022 (MAE), normalised pixels; Baevski et al. 2022 (data2vec), the model's own features of the whole image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch.nn.functional as F

from mmscale.data.batch import Batch
from mmscale.model.state import State
from mmscale.objectives.base import Term

if TYPE_CHECKING:
    from mmscale.model.model import MMScaleModel


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskedImage:
    """Error of hidden patches, a mean over them: squared error of normalised pixels, or 1 - cosine of features."""

    weight: float
    target: Literal["pixels", "features"] = "pixels"
    name: str = "masked_image"

    def wants(self) -> dict[str, Any]:
        """Masked copies of images."""
        return {"masked_image": True, "features": self.target == "features"}

    def check(self, micro_batch: int, ranks: int) -> None:
        """Works on every topology."""

    def count(self, batch: Batch) -> float:
        """Hidden patches."""
        return float(batch.patch_mask_NP.sum() + sum(stream.mask_T.sum() for stream in batch.streams.values()))

    def loss(self, state: State, batch: Batch, model: MMScaleModel) -> Term:
        """Sum over hidden patches."""
        total = state.zero
        for prediction_RC, target_RC in state.patches:
            if self.target == "features":
                total = total + (1 - F.cosine_similarity(prediction_RC, target_RC, dim=-1)).sum()
            else:
                total = total + (prediction_RC - target_RC).square().sum() / prediction_RC.shape[-1]
        return Term(total)
