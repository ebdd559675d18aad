"""Which sequences enter the fusion layers, where their tokens come from, and which of them a head reads.

Hidden states of the lower layers are re-indexed: an image or a text that enters several sequences is encoded once.

Shape letters: S sequences of the upper stack, T text tokens of the upper stack, U text tokens of the lower stack,
N images (those with hidden patches once more at the end), L tokens of an image, M samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmscale.data.batch import IGNORE, Batch
from mmscale.model.attention import Plan, ragged_plan
from mmscale.model.pairs import of_rows

if TYPE_CHECKING:
    from mmscale.objectives.base import Objective


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which objectives a forward serves."""

    contrastive: bool = False
    matching: bool = False
    matching_group: int | None = None
    masked_language: bool = False
    captioning: bool = False
    masked_image: bool = False
    features: bool = False
    """masked_image predicts features rather than pixels."""
    classify: bool = False

    @classmethod
    def of(cls, objectives: Sequence[Objective]) -> Wanted:
        """What these objectives turn on together."""
        return cls(**{key: value for objective in objectives for key, value in objective.wants().items()})

    @property
    def fused(self) -> bool:
        """Whether bidirectional text goes through the fusion layers."""
        return self.matching or self.masked_language or self.classify


@dataclass(frozen=True, slots=True)
class Entry:
    """Sequences of one kind: for each its image and its text of the lower stack, -1 for none."""

    image_S: Tensor
    text_S: Tensor
    causal: bool = False


@dataclass(frozen=True, slots=True)
class Sequences:
    """The input of the upper stack: a buffer [image tokens; text tokens] and how its rows form sequences."""

    images: Tensor
    """Image of the lower stack whose L tokens come next in the buffer."""
    tokens_T: Tensor
    """Text token of the lower stack that comes next in the buffer."""
    first_image_row_S: Tensor
    """Buffer row of each sequence's first image token, among the image rows; of no meaning without an image."""
    first_text_row_S: Tensor
    """Buffer row of each sequence's first token, among the text rows; of no meaning without a text."""
    bounds: list[int]
    """Sequences up to the end of each entry."""
    text_bounds: list[int]
    """Text rows up to the end of each entry."""
    plan: Plan

    def entry(self, index: int) -> slice:
        """The sequences of an entry."""
        return slice(self.bounds[index], self.bounds[index + 1])

    def text_rows(self, index: int) -> slice:
        """The text rows of an entry."""
        return slice(self.text_bounds[index], self.text_bounds[index + 1])


CAPTIONS, FUSED, NEGATIVES, MASKED, ALONE = range(5)
"""The entries of `entries`, in order."""


def entries(batch: Batch, wanted: Wanted, negatives: tuple[Tensor, Tensor], hidden: Tensor) -> list[Entry]:
    """List what enters the fusion layers.

    Args:
        batch: the micro-batch.
        wanted: the objectives.
        negatives: rows of the images and rows of the texts of the hard negatives.
        hidden: images that have hidden patches; their masked copies follow the N images.

    Returns:
        CAPTIONS [v;c] prefix-LM, FUSED [v;t], NEGATIVES [v;t], MASKED images alone, ALONE: images of samples without text.
    """
    image_M = of_rows(batch.image_rows_N, batch.size)
    text_M = of_rows(batch.text.rows_S, batch.size)
    captions = len(batch.caption.rows_S)
    none = batch.image_rows_N[:0]
    caption_S = batch.caption.fuse_S.nonzero().squeeze(1) if wanted.captioning else none
    text_S = batch.text.fuse_S.nonzero().squeeze(1) if wanted.fused else none
    alone = (text_M[batch.image_rows_N] < 0).nonzero().squeeze(1) if wanted.classify else none
    copies = torch.arange(len(hidden), device=hidden.device) + len(batch.image_rows_N)
    return [
        Entry(image_M[batch.caption.rows_S[caption_S]], caption_S, causal=True),
        Entry(image_M[batch.text.rows_S[text_S]], text_S + captions),
        Entry(image_M[negatives[0]], text_M[negatives[1]] + captions),
        Entry(copies, torch.full_like(copies, -1)),
        Entry(alone, torch.full_like(alone, -1)),
    ]


def arrange(listed: list[Entry], text_offsets: Tensor, image_tokens: int, dtype: torch.dtype) -> Sequences:
    """Lay out the buffer of the upper stack.

    Args:
        listed: the entries.
        text_offsets: int64 offsets of the texts in the lower stack's text tokens, one more than texts.
        image_tokens: L.
        dtype: of the activations.
    """
    image_S, text_S = torch.cat([e.image_S for e in listed]), torch.cat([e.text_S for e in listed])
    causal_S = torch.cat([torch.full_like(e.image_S, e.causal) for e in listed]).bool()
    has_image_S, has_text_S = image_S >= 0, text_S >= 0
    lengths_S = torch.where(has_text_S, text_offsets.diff()[text_S], 0) if len(text_offsets) > 1 else torch.zeros_like(text_S)
    leading_S = has_image_S * image_tokens
    image_row_S = leading_S.cumsum(0) - leading_S
    text_row_S = lengths_S.cumsum(0) - lengths_S
    sequence_T, offset_T = _walk(lengths_S)
    tokens_T = text_offsets[text_S[sequence_T]] + offset_T
    images = image_S[has_image_S]
    total_S = leading_S + lengths_S
    sequence, offset = _walk(total_S)
    lead = leading_S[sequence]
    after_images = len(images) * image_tokens + text_row_S[sequence] + offset - lead
    rows = torch.where(offset < lead, image_row_S[sequence] + offset, after_images)
    plan = ragged_plan(total_S, torch.where(causal_S, leading_S, total_S), rows, dtype)
    bounds = [0]
    for entry in listed:
        bounds.append(bounds[-1] + len(entry.image_S))
    ends = torch.cat([lengths_S.new_zeros(1), lengths_S.cumsum(0)])[torch.tensor(bounds, device=lengths_S.device)]
    return Sequences(images, tokens_T, image_row_S, text_row_S, bounds, ends.tolist(), plan)


def _walk(lengths_S: Tensor) -> tuple[Tensor, Tensor]:
    """For each token of ragged sequences its sequence and its offset in it."""
    sequence = torch.arange(len(lengths_S), device=lengths_S.device).repeat_interleave(lengths_S)
    starts_S = lengths_S.cumsum(0) - lengths_S
    return sequence, torch.arange(len(sequence), device=lengths_S.device) - starts_S[sequence]


@dataclass(frozen=True, slots=True)
class Readout:
    """The rows of the upper stack that heads read, laid out one kind after the other."""

    image_rows: Tensor
    """Hidden patches, then the [CLS] of images alone (all their patches where there is no [CLS])."""
    text_rows: Tensor
    """Caption tokens with a label, masked tokens, first tokens of FUSED, first tokens of NEGATIVES."""
    sizes: list[int]
    """Text rows of each of the four kinds."""
    labels: Tensor
    """Labels of the first two kinds."""


def readout(seqs: Sequences, labels_U: Tensor, mask_NP: Tensor, hidden: Tensor, wanted: Wanted, leading: int = 1) -> Readout:
    """Find the rows that heads read.

    Args:
        seqs: the laid out sequences.
        labels_U: labels of the lower stack's text tokens.
        mask_NP: hidden patches of each image.
        hidden: images that have hidden patches.
        wanted: the objectives.
        leading: tokens of an image before its patches; with none, all patches of images alone are read.
    """
    labels_T = labels_U[seqs.tokens_T]
    found = []
    for index, on in ((CAPTIONS, wanted.captioning), (FUSED, wanted.masked_language)):
        rows = seqs.text_rows(index)
        labelled = (labels_T[rows] != IGNORE).nonzero().squeeze(1) + rows.start
        found.append(labelled if on else labelled[:0])
    first = [seqs.first_text_row_S[seqs.entry(FUSED)], seqs.first_text_row_S[seqs.entry(NEGATIVES)]]
    if not (wanted.matching or wanted.classify):
        first[0] = first[0][:0]
    patch = mask_NP[hidden].nonzero()
    patch_rows = seqs.first_image_row_S[seqs.entry(MASKED)][patch[:, 0]] + leading + patch[:, 1]
    alone = seqs.first_image_row_S[seqs.entry(ALONE)]
    if not leading:
        alone = (alone[:, None] + torch.arange(mask_NP.shape[1], device=alone.device)).flatten()
    image_rows = torch.cat([patch_rows, alone])
    text = [*found, *first]
    return Readout(image_rows, torch.cat(text), [len(t) for t in text], labels_T[torch.cat(found)])
