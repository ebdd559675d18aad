"""Which sequences enter the fusion layers, where their tokens come from, and which of them a head reads.

Hidden states of the lower layers are re-indexed: an image or a text that enters several sequences is encoded once.

Shape letters: S sequences of the upper stack, T text tokens of the upper stack, U text tokens of the lower stack, M samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmscale.data.batch import IGNORE, Batch
from mmscale.model.attention import Plan, ragged_plan
from mmscale.model.configuration import MMScaleConfig
from mmscale.model.pairs import of_rows
from mmscale.model.percepts import Percepts, walk
from mmscale.model.positions import text_coordinates, with_positions

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
    """Sequences of one kind: for each its unit of perception and its text of the lower stack, -1 for none."""

    unit_S: Tensor
    text_S: Tensor
    causal: bool = False


@dataclass(frozen=True, slots=True)
class Sequences:
    """The input of the upper stack: a buffer [tokens of each part; text tokens] and how its rows form sequences."""

    gathers: list[Tensor]
    """What of each part of the lower stack comes next in the buffer: units of a dense part, tokens of a ragged one."""
    tokens_T: Tensor
    """Text token of the lower stack that comes next in the buffer."""
    first_rows: list[Tensor]
    """Row of each sequence's first token of each part, counted over all parts; of no meaning without one."""
    perception_rows: list[int]
    """Rows up to the end of each part."""
    first_text_row_S: Tensor
    """Buffer row of each sequence's first token, among the text rows; of no meaning without a text."""
    unit_S: Tensor
    """Unit of each sequence, -1 for none."""
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


def entries(batch: Batch, wanted: Wanted, negatives: tuple[Tensor, Tensor], percepts: Percepts) -> list[Entry]:
    """List what enters the fusion layers.

    Args:
        batch: the micro-batch.
        wanted: the objectives.
        negatives: rows of the units and rows of the texts of the hard negatives.
        percepts: what the samples show.

    Returns:
        CAPTIONS [v;c] prefix-LM, FUSED [v;t], NEGATIVES [v;t], MASKED copies alone, ALONE: units of samples without text.
    """
    unit_M = of_rows(percepts.rows_U, batch.size)
    text_M = of_rows(batch.text.rows_S, batch.size)
    captions = len(batch.caption.rows_S)
    none = percepts.rows_U[:0]
    caption_S = batch.caption.fuse_S.nonzero().squeeze(1) if wanted.captioning else none
    text_S = batch.text.fuse_S.nonzero().squeeze(1) if wanted.fused else none
    alone = (text_M[percepts.rows_U] < 0).nonzero().squeeze(1) if wanted.classify else none
    copies = torch.arange(percepts.copies, device=none.device) + len(percepts.rows_U)
    return [
        Entry(unit_M[batch.caption.rows_S[caption_S]], caption_S, causal=True),
        Entry(unit_M[batch.text.rows_S[text_S]], text_S + captions),
        Entry(unit_M[negatives[0]], text_M[negatives[1]] + captions),
        Entry(copies, torch.full_like(copies, -1)),
        Entry(alone, torch.full_like(alone, -1)),
    ]


def arrange(listed: list[Entry], text_offsets: Tensor, percepts: Percepts, config: MMScaleConfig, dtype: torch.dtype) -> Sequences:
    """Lay out the buffer of the upper stack. A sequence is its unit's tokens, part after part, then its text.

    Args:
        listed: the entries.
        text_offsets: int64 offsets of the texts in the lower stack's text tokens, one more than texts.
        percepts: what the samples show.
        config: the model's shape.
        dtype: of the activations.
    """
    unit_S, text_S = torch.cat([e.unit_S for e in listed]), torch.cat([e.text_S for e in listed])
    causal_S = torch.cat([torch.full_like(e.unit_S, e.causal) for e in listed]).bool()
    text_lengths_S = torch.where(text_S >= 0, text_offsets.diff()[text_S], 0) if len(text_offsets) > 1 else torch.zeros_like(text_S)
    lengths = [*(part.lengths(unit_S) for part in percepts.parts), text_lengths_S]
    leading_S = torch.stack(lengths[:-1]).sum(0) if len(lengths) > 2 else lengths[0]
    total_S = leading_S + text_lengths_S
    next_S = total_S.cumsum(0) - total_S
    walks, places, first_rows, ends = [walk(length_S) for length_S in lengths], [], [], [0]
    for length_S, (sequence, offset) in zip(lengths, walks, strict=True):
        first_rows.append(length_S.cumsum(0) - length_S + ends[-1])
        ends.append(ends[-1] + len(sequence))
        places.append(next_S[sequence] + offset)
        next_S = next_S + length_S
    rows = torch.empty_like(torch.cat(places))
    rows[torch.cat(places)] = torch.arange(ends[-1], device=rows.device)
    sequence_T, offset_T = walks[-1]
    gathers = []
    for part, (sequence, offset) in zip(percepts.parts, walks[:-1], strict=True):
        gathers.append(unit_S[unit_S >= 0] if part.length is not None else part.order_X[part.offsets[unit_S[sequence]] + offset])
    plan = ragged_plan(total_S, torch.where(causal_S, leading_S, total_S), rows, dtype)
    if config.positions == "rotary":
        seen = gather_parts([part.fused_X3 for part in percepts.parts], percepts, gathers)
        places_T3 = torch.cat([*seen, text_coordinates(offset_T + text_starts(percepts, unit_S)[sequence_T])])
        plan = with_positions(plan, places_T3, config, config.expert("image", fused=True))
    bounds = [0]
    for entry in listed:
        bounds.append(bounds[-1] + len(entry.unit_S))
    text_ends = torch.cat([text_lengths_S.new_zeros(1), text_lengths_S.cumsum(0)])[torch.tensor(bounds, device=text_lengths_S.device)]
    tokens_T = text_offsets[text_S[sequence_T]] + offset_T
    first_text_row_S = first_rows.pop() - ends[-2]
    return Sequences(gathers, tokens_T, first_rows, ends[:-1], first_text_row_S, unit_S, bounds, text_ends.tolist(), plan)


def gather_parts(states: Sequence[Tensor], percepts: Percepts, gathers: Sequence[Tensor]) -> list[Tensor]:
    """What goes into the upper buffer of each part of the lower stack, (T, D) each."""
    found = []
    for x_XD, part, index in zip(states, percepts.parts, gathers, strict=True):
        whole = x_XD if part.length is None else x_XD.view(-1, part.length, x_XD.shape[-1])
        found.append(whole.index_select(0, index) if part.length is None else whole.index_select(0, index).flatten(0, 1))
    return found


def text_starts(percepts: Percepts, unit_S: Tensor) -> Tensor:
    """Rotary position of the first text token after each unit: past the unit's longest axis, as in Qwen2-VL; 0 after none."""
    return torch.where(unit_S >= 0, percepts.extents[unit_S], 0) if len(percepts.extents) else torch.zeros_like(unit_S)


@dataclass(frozen=True, slots=True)
class Readout:
    """The rows of the upper stack that heads read, laid out one kind after the other."""

    part_rows: list[Tensor]
    """Rows of each part: hidden patches of each modality, then those that stand for units alone, sorted by part."""
    restore: Tensor | None
    """Index that puts the rows of all parts back into the order of their kinds; None where there is one part."""
    text_rows: Tensor
    """Caption tokens with a label, masked tokens, first tokens of FUSED, first tokens of NEGATIVES."""
    sizes: list[int]
    """Text rows of each of the four kinds."""
    labels: Tensor
    """Labels of the first two kinds."""


def readout(seqs: Sequences, labels_U: Tensor, percepts: Percepts, wanted: Wanted) -> Readout:
    """Find the rows that heads read.

    Args:
        seqs: the laid out sequences.
        labels_U: labels of the lower stack's text tokens.
        percepts: what the samples show.
        wanted: the objectives.
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
    text = [*found, *first]
    part_rows, restore = _by_part(torch.cat([*_patch_rows(seqs, percepts), _alone_rows(seqs, percepts)]), seqs.perception_rows)
    return Readout(part_rows, restore, torch.cat(text), [len(t) for t in text], labels_T[torch.cat(found)])


def _patch_rows(seqs: Sequences, percepts: Percepts) -> list[Tensor]:
    """Perception rows of the hidden patches of each modality."""
    rows, start = [], seqs.entry(MASKED).start
    for items in percepts.items:
        copies_S = seqs.first_rows[items.expert][start : start + len(items.copies)]
        rows.append(copies_S[items.hidden_copy_R] + items.hidden_offset_R)
        start += len(items.copies)
    return rows


def _alone_rows(seqs: Sequences, percepts: Percepts) -> Tensor:
    """Perception rows that stand for each unit alone (`Percepts.standing` of them): its first item's [CLS], or all patches."""
    alone = seqs.entry(ALONE)
    if len(percepts.parts) == 1:
        first = seqs.first_rows[0][alone]
        return first if percepts.items[0].leading else (first[:, None] + torch.arange(percepts.standing, device=first.device)).flatten()
    part_S = percepts.part_U[seqs.unit_S[alone]]
    return torch.stack([first_S[alone] for first_S in seqs.first_rows]).gather(0, part_S[None]).squeeze(0)


def _by_part(rows: Tensor, ends: list[int]) -> tuple[list[Tensor], Tensor | None]:
    """Sort perception rows into the parts they lie in."""
    if len(ends) == 2:
        return [rows], None
    part = torch.bucketize(rows, torch.tensor(ends[1:-1], device=rows.device), right=True)
    order = part.argsort(stable=True)
    counts = torch.bincount(part, minlength=len(ends) - 1).tolist()
    sorted_rows = [r - start for r, start in zip(torch.split(rows[order], counts), ends[:-1], strict=True)]
    return sorted_rows, torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
