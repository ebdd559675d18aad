"""Masked image modelling: hidden patches from the rest of the image.

Sources: He et al. 2022 (MAE), normalised pixels; Baevski et al. 2022 (data2vec), the model's own features of the whole image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch.nn.functional as F
from torch import Tensor

from mmscale.data.batch import Batch
from mmscale.model.state import State
from mmscale.objectives.base import Term

if TYPE_CHECKING:
    from mmscale.model.model import MMScaleModel

Target = Literal["pixels", "features"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskedImage:
    """Error of hidden patches, a mean over them: squared error of normalised pixels, or 1 - cosine of features."""

    weight: float
    target: Target = "pixels"
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
            total = total + patch_errors(self.target, prediction_RC, target_RC).sum()
        return Term(total)


def patch_errors(target: Target, prediction_RC: Tensor, target_RC: Tensor) -> Tensor:
    """Error of each hidden patch (R,): the mean over its C numbers of the squared error, or 1 - cosine.

    Args:
        target: what is predicted.
        prediction_RC: what the model says of hidden patches.
        target_RC: what is there.
    """
    if target == "features":
        return 1 - F.cosine_similarity(prediction_RC, target_RC, dim=-1)
    return (prediction_RC - target_RC).square().mean(-1)
