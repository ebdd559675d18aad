"""What one forward hands to the objectives: everything that modules compute, so that a loss is a pure function of it.

Shape letters: M samples, N samples with an image or another item, S captions, E projection size, R rows read by a head, C outputs of a
head, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class State:
    """Outputs of the heads in one forward. Objectives that are off have empty ones."""

    image_embedding_NE: Tensor
    """Unit vectors, fp32, of the samples that have an image or an item of another modality."""
    caption_embedding_SE: Tensor
    """Unit vectors, fp32."""
    scale: Tensor
    """fp32 (1,) factor of similarities."""
    bias: Tensor
    """fp32 (1,) bias of similarities."""
    match_logits_R: Tensor
    """Logit of "image and text belong together": text sequences with an image, then hard negatives."""
    match_labels_R: Tensor
    """fp32 1 for those that do, 0 for hard negatives."""
    caption_loss_R: Tensor
    """Cross-entropy of each caption token."""
    caption_hits_R: Tensor
    masked_loss_R: Tensor
    """Cross-entropy of each masked token."""
    masked_hits_R: Tensor
    patches: list[tuple[Tensor, Tensor]]
    """Of each modality the predictions of its hidden patches (R, C), pixels or features, and what they ought to be, detached."""
    class_logits_MC: dict[str, Tensor]
    """Logits of each task head, a row a sample."""
    zero: Tensor
    """0, connected to every parameter: added to each term so that no parameter is ever without gradient."""


def by_row(values_RD: Tensor, rows_R: Tensor, size: int) -> Tensor:
    """Spread values over samples, zeros where a sample has none; (M, D)."""
    return values_RD.new_zeros(size, values_RD.shape[-1]).index_copy(0, rows_R, values_RD)


def connected_zero(*tensors: Tensor) -> Tensor:
    """An fp32 0 whose gradient reaches all these tensors: the sum of none of their elements, so that no infinity spoils it."""
    total = sum(t.reshape(-1)[:0].float().sum() for t in tensors)
    assert isinstance(total, Tensor)
    return total
