"""From the last hidden states to the outputs of every head.

Shape letters: M samples, N images, L image tokens, S captions, U text tokens, D hidden size, E projection size, R rows, C outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from mmscale.data.batch import Batch
from mmscale.model.embeddings import kept_patches
from mmscale.model.pairs import of_rows, where
from mmscale.model.percepts import Items, Percepts
from mmscale.model.sequences import ALONE, Readout, Sequences, Wanted
from mmscale.model.state import State, by_row, connected_zero

if TYPE_CHECKING:
    from mmscale.model.model import MMScaleModel

Laid = tuple[Sequences, Readout, Percepts]
"""The upper stack's sequences, the rows read, what the samples show."""


@dataclass(frozen=True, slots=True)
class Lower:
    """What the lower stacks give."""

    parts: list[Tensor]
    """(X, D) tokens of each part of the perception stack."""
    text_UD: Tensor
    """Captions' tokens, then texts' tokens."""
    text_offsets: Tensor
    """int64 offsets of captions, then texts."""
    image_NE: Tensor
    """Of the samples that have an item, from its [CLS] or pooled from all tokens of the image."""
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
        last: perception rows and text rows of the last layer that `Readout` names.
    """
    seqs, rows, percepts = laid
    image_RD, text_RD = last
    words_RD, first_RD, negative_RD, words_XD = text_RD.tensor_split([sum(rows.sizes[:n]) for n in (2, 3, 4)])
    loss_R, hits_R = model.language_head(words_RD, rows.labels)
    fused_rows = batch.text.rows_S[where(batch.text.fuse_S, lambda: batch.on_host.text.fuse_S)][: len(first_RD)]
    with_image = where(of_rows(percepts.rows_U, batch.size)[fused_rows] >= 0, lambda: _shown(batch.on_host)[: len(first_RD)])
    match_RD = torch.cat([first_RD.index_select(0, with_image), negative_RD])
    match_RD = match_RD if wanted.matching else match_RD[:0]
    match_R = model.matching_head(match_RD).squeeze(1)
    alone = seqs.bounds[ALONE + 1] - seqs.bounds[ALONE]
    hidden = sum(len(items.hidden_copy_R) for items in percepts.items)
    patch_RD, alone_RD, units_XD = image_RD.tensor_split([hidden, hidden + alone * percepts.standing])
    alone_RD = alone_RD if percepts.items[0].leading else alone_RD.view(alone, percepts.standing, alone_RD.shape[1]).mean(1)
    patches, patch_outputs = _patches(model, batch, wanted, lower, percepts, patch_RD)
    caption_SD = lower.caption_SD
    if model.config.head_pooling == "concat":
        texts, units = rows.pooled or (None, None)
        first_RD, alone_RD = concat_states(model, first_RD, words_XD, texts), concat_states(model, alone_RD, units_XD, units)
        caption_SD = concat_states(model, caption_SD, caption_SD, None)
    classes = _classes(model, batch, wanted, caption_SD, percepts.rows_U, (fused_rows, first_RD, alone_RD))
    zero = connected_zero(*lower.parts, lower.text_UD, lower.image_NE, lower.caption_SE, lower.scale, lower.bias, image_RD, text_RD)
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
        patches=patches,
        class_logits_MC=classes,
        zero=zero + connected_zero(loss_R, match_R, *patch_outputs, *classes.values()),
    )


def concat_states(model: MMScaleModel, first_RD: Tensor, tokens_XD: Tensor, lengths_R: Tensor | None) -> Tensor:
    """What a task head reads with `head_pooling: concat`: normed states (R, 3 D) of the first token, the mean of all, the largest of all.

    Source: Howard and Ruder 2018 (ULMFiT), section 3.3, concat pooling.

    Args:
        model: whose states they are.
        first_RD: state of each sequence's first token.
        tokens_XD: of all tokens, sequence by sequence.
        lengths_R: tokens of each, at least one; None: the first token is all there is.
    """
    width, eps, dtype = first_RD.shape[1:], model.config.layer_norm_eps, first_RD.dtype
    first_RD = F.layer_norm(first_RD.float(), width, eps=eps)
    if lengths_R is None or not len(first_RD):
        return torch.cat([first_RD] * 3, dim=1).to(dtype)
    tokens_XD = F.layer_norm(tokens_XD.float(), width, eps=eps)
    pooled = [torch.segment_reduce(tokens_XD, kind, lengths=lengths_R, unsafe=True) for kind in ("mean", "max")]
    return torch.cat([first_RD, *pooled], dim=1).to(dtype)


def _shown(host: Batch) -> Tensor:
    """Whether each fused text's sample shows something."""
    return of_rows(host.perception_rows_N, host.size)[host.text.rows_S[host.text.fuse_S]] >= 0


def _unfused(host: Batch) -> Tensor:
    """Whether each caption's sample has neither a fused text nor anything to show."""
    taken_M = of_rows(torch.cat([host.text.rows_S[host.text.fuse_S], host.perception_rows_N]), host.size) >= 0
    return ~taken_M[host.caption.rows_S]


def _patches(
    model: MMScaleModel, batch: Batch, wanted: Wanted, lower: Lower, percepts: Percepts, patch_RD: Tensor
) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
    """Predictions and targets of each modality's hidden patches, and all heads' outputs.

    Source of targets of values: He et al. 2022 (MAE), section 3.
    """
    states = torch.split(patch_RD, [len(items.hidden_copy_R) for items in percepts.items])
    heads = [
        model.patch_head(items.name)(state_RD[:0] if wanted.features else state_RD)
        for items, state_RD in zip(percepts.items, states, strict=True)
    ]
    features_RC = model.feature_head(patch_RD if wanted.features else patch_RD[:0])
    predictions = torch.split(features_RC, [len(state_RD) for state_RD in states]) if wanted.features else heads
    with torch.no_grad():
        targets = _features(percepts, lower) if wanted.features else [_values(model, batch, items) for items in percepts.items]
        targets = [F.layer_norm(target_RC, target_RC.shape[-1:]) for target_RC in targets]
    return list(zip(predictions, targets, strict=True)), [*heads, features_RC]


def _features(percepts: Percepts, lower: Lower) -> list[Tensor]:
    """Lower states of each modality's hidden patches where they are not hidden."""
    tokens_XD = lower.parts[0] if len(lower.parts) == 1 else torch.cat(lower.parts)
    firsts = torch.split(percepts.first_S, [len(items.lengths_S) for items in percepts.items])
    return [
        tokens_XD[first_S[items.copies[items.hidden_copy_R]] + items.hidden_offset_R].float()
        for items, first_S in zip(percepts.items, firsts, strict=True)
    ]


def _values(model: MMScaleModel, batch: Batch, items: Items) -> Tensor:
    """Numbers of a modality's hidden patches."""
    if items.tokens is not None:
        stream = model.stream(batch, items.name)
        return stream.values_TC[items.tokens.patches[items.tokens.hidden]].float()
    kept_NK = None if batch.kept_NK is None else batch.kept_NK[items.copies]
    values_NKC = kept_patches(batch.pixels_NCHW[items.copies], model.config.patch_size, kept_NK)
    return values_NKC[items.hidden_copy_R, items.hidden_offset_R - items.leading].float()


def _classes(
    model: MMScaleModel, batch: Batch, wanted: Wanted, caption_SD: Tensor, rows_U: Tensor, pooled: tuple[Tensor, Tensor, Tensor]
) -> dict[str, Tensor]:
    """Logits of the task heads: of the fused text's first token, else of the unit ([CLS] or the patches' mean), else the caption's end."""
    fused_rows, first_RD, alone_RD = pooled
    size = batch.size
    if not wanted.classify:
        return {name: head(first_RD[:0]) for name, head in model.task_heads.items()}
    fused = of_rows(fused_rows, size) >= 0
    image = of_rows(rows_U, size) >= 0
    text = of_rows(batch.text.rows_S, size) >= 0
    host = batch.on_host
    alone_rows = rows_U[where(~text[rows_U], lambda: of_rows(host.text.rows_S, size)[host.perception_rows_N] < 0)]
    captions = where(~(fused | image)[batch.caption.rows_S], lambda: _unfused(host))
    pooled_MD = by_row(first_RD, fused_rows, size) + by_row(alone_RD, alone_rows, size)
    pooled_MD = pooled_MD + by_row(caption_SD.index_select(0, captions), batch.caption.rows_S[captions], size)
    return {name: head(pooled_MD) for name, head in model.task_heads.items()}
