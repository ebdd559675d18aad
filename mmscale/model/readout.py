"""From the last hidden states to the outputs of every head.

Shape letters: M samples, N images, L image tokens, S captions, U text tokens, D hidden size, E projection size, R rows, C outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmscale.data.batch import Batch
from mmscale.model.embeddings import patchify
from mmscale.model.pairs import of_rows
from mmscale.model.sequences import ALONE, Readout, Sequences, Wanted
from mmscale.model.state import State, by_row, connected_zero

if TYPE_CHECKING:
    from mmscale.model.model import MMScaleModel

Laid = tuple[Sequences, Readout, Tensor]
"""The upper stack's sequences, the rows read, the images with hidden patches."""


@dataclass(frozen=True, slots=True)
class Lower:
    """What the lower stacks give."""

    image_NLD: Tensor
    """Images, then those with hidden patches once more."""
    text_UD: Tensor
    """Captions' tokens, then texts' tokens."""
    text_offsets: Tensor
    """int64 offsets of captions, then texts."""
    image_NE: Tensor
    caption_SD: Tensor
    """Normed state of each caption's last token."""
    caption_SE: Tensor
    scale: Tensor
    bias: Tensor


def read_heads(model: MMScaleModel, batch: Batch, wanted: Wanted, lower: Lower, laid: Laid, last: tuple[Tensor, Tensor]) -> State:
    """Call every head once.

    Args:
        model: whose heads are called.
        batch: the micro-batch.
        wanted: the objectives.
        lower: the lower stacks' states.
        laid: the upper stack's sequences.
        last: image rows and text rows of the last layer that `Readout` names.
    """
    seqs, rows, hidden = laid
    image_RD, text_RD = last
    words_RD, first_RD, negative_RD = text_RD.tensor_split([sum(rows.sizes[:2]), sum(rows.sizes[:3])])
    loss_R, hits_R = model.language_head(words_RD, rows.labels)
    fused_rows = batch.text.rows_S[batch.text.fuse_S][: len(first_RD)]
    with_image = (of_rows(batch.image_rows_N, batch.size)[fused_rows] >= 0).nonzero().squeeze(1)
    match_RD = torch.cat([first_RD.index_select(0, with_image), negative_RD])
    match_RD = match_RD if wanted.matching else match_RD[:0]
    match_R = model.matching_head(match_RD).squeeze(1)
    alone = seqs.bounds[ALONE + 1] - seqs.bounds[ALONE]
    read = 1 if model.config.image_tower.leading_tokens else model.config.patches
    patch_RD, alone_RD = image_RD.tensor_split([len(image_RD) - alone * read])
    alone_RD = alone_RD if read == 1 else alone_RD.view(alone, read, alone_RD.shape[1]).mean(1)
    prediction, target, patch_outputs = _patches(model, batch, wanted, lower, hidden, patch_RD)
    classes = _classes(model, batch, wanted, lower, (fused_rows, first_RD, alone_RD))
    zero = connected_zero(lower.image_NLD, lower.text_UD, lower.image_NE, lower.caption_SE, lower.scale, lower.bias, image_RD, text_RD)
    return State(
        image_embedding_NE=lower.image_NE,
        caption_embedding_SE=lower.caption_SE,
        scale=lower.scale,
        bias=lower.bias,
        match_logits_R=match_R,
        match_labels_R=torch.arange(len(match_R), device=match_R.device).lt(len(match_R) - rows.sizes[3]).float(),
        caption_loss_R=loss_R[: rows.sizes[0]],
        caption_hits_R=hits_R[: rows.sizes[0]],
        masked_loss_R=loss_R[rows.sizes[0] :],
        masked_hits_R=hits_R[rows.sizes[0] :],
        patch_prediction_RC=prediction,
        patch_target_RC=target,
        class_logits_MC=classes,
        zero=zero + connected_zero(loss_R, match_R, *patch_outputs, *classes.values()),
    )


def _patches(
    model: MMScaleModel, batch: Batch, wanted: Wanted, lower: Lower, hidden: Tensor, patch_RD: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Predictions and targets of hidden patches, and both heads' outputs. Source of pixel targets: He et al. 2022 (MAE), section 3."""
    pixels_RC = model.pixel_head(patch_RD[:0] if wanted.features else patch_RD)
    features_RC = model.feature_head(patch_RD if wanted.features else patch_RD[:0])
    mask_NP = batch.patch_mask_NP[hidden]
    with torch.no_grad():
        if wanted.features:
            target_RC = lower.image_NLD[hidden][:, model.config.image_tower.leading_tokens :][mask_NP].float()
        else:
            target_RC = patchify(batch.pixels_NCHW[hidden], model.config.patch_size)[mask_NP].float()
        target_RC = torch.nn.functional.layer_norm(target_RC, target_RC.shape[-1:])
    return (features_RC if wanted.features else pixels_RC), target_RC, (pixels_RC, features_RC)


def _classes(model: MMScaleModel, batch: Batch, wanted: Wanted, lower: Lower, pooled: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    """Logits of the task heads: of the fused text's first token, else an image ([CLS] or the patches' mean), else the caption's end."""
    fused_rows, first_RD, alone_RD = pooled
    size = batch.size
    if not wanted.classify:
        return {name: head(first_RD[:0]) for name, head in model.task_heads.items()}
    fused = of_rows(fused_rows, size) >= 0
    image = of_rows(batch.image_rows_N, size) >= 0
    text = of_rows(batch.text.rows_S, size) >= 0
    alone_rows = batch.image_rows_N[~text[batch.image_rows_N]]
    captions = (~(fused | image)[batch.caption.rows_S]).nonzero().squeeze(1)
    pooled_MD = by_row(first_RD, fused_rows, size) + by_row(alone_RD, alone_rows, size)
    pooled_MD = pooled_MD + by_row(lower.caption_SD.index_select(0, captions), batch.caption.rows_S[captions], size)
    return {name: head(pooled_MD) for name, head in model.task_heads.items()}
