"""Which sequences enter the fusion layers, where their tokens come from, and which of them a head reads.

Hidden states of the lower layers are re-indexed: an image or a text that enters several sequences is encoded once.

Shape letters: S sequences of the upper stack, T text tokens of the upper stack, U text tokens of the lower stack, M samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from mmscale.data.batch import IGNORE, Batch
from mmscale.model import packed
from mmscale.model.attention import Plan, ragged_plan
from mmscale.model.configuration import MMScaleConfig
from mmscale.model.pairs import nonzero, of_rows, where
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
    lengths: list[Tensor]
    """Tokens of each part in each sequence, then of its text."""
    bounds: list[int]
    """Sequences up to the end of each entry."""
    sizes: Sizes
    plan: Plan

    def entry(self, index: int) -> slice:
        """The sequences of an entry."""
        return slice(self.bounds[index], self.bounds[index + 1])

    def text_rows(self, index: int) -> slice:
        """The text rows of an entry."""
        return slice(self.sizes.text_bounds[index], self.sizes.text_bounds[index + 1])


@dataclass(frozen=True, slots=True)
class Sizes:
    """How long what `arrange` lays out will be: plain numbers, from the batch in the host's memory where there is one."""

    sequences: int
    rows: list[int]
    """Rows of each part of perception, and of text."""
    spare: bool
    """Whether text rows may be left over: of the hard negatives, which the device draws, the host knows only how long they can be."""
    text_bounds: list[int]
    """Text rows up to the end of each entry; from negatives on at most so many."""
    causal: int
    """Sequences that are causal."""
    causal_rows: tuple[int, int]
    """Their rows of perception, and of text."""
    longest: int
    """No sequence is longer."""
    labels: list[int | None]
    """Labels in the text rows of each of the first two entries; None: not known."""


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
    host = batch.on_host
    caption_S = where(batch.caption.fuse_S, lambda: host.caption.fuse_S) if wanted.captioning else none
    text_S = where(batch.text.fuse_S, lambda: host.text.fuse_S) if wanted.fused else none
    flags_U = text_M[percepts.rows_U] < 0
    alone = where(flags_U, lambda: of_rows(host.text.rows_S, host.size)[host.perception_rows_N] < 0) if wanted.classify else none
    copies = torch.arange(percepts.copies, device=none.device) + len(percepts.rows_U)
    return [
        Entry(unit_M[batch.caption.rows_S[caption_S]], caption_S, causal=True),
        Entry(unit_M[batch.text.rows_S[text_S]], text_S + captions),
        Entry(unit_M[negatives[0]], text_M[negatives[1]] + captions),
        Entry(copies, torch.full_like(copies, -1)),
        Entry(alone, torch.full_like(alone, -1)),
    ]


def measure(listed: list[Entry], lengths: list[Tensor], labels: list[int | None], spare: bool) -> Sizes:
    """Sizes of what `arrange` will lay out.

    Args:
        listed: the entries, causal ones first.
        lengths: their tokens, as `lengths_of` gives them; on a device, it has to be waited for.
        labels: labels in the text rows of each of the first two entries.
        spare: whether text rows may be left over.
    """
    by_entry = [len(entry.unit_S) for entry in listed]
    causal = [number for entry, number in zip(listed, by_entry, strict=True) if entry.causal]
    total_S, leading_S = torch.stack(lengths).sum(0), torch.stack(lengths[:-1]).sum(0)
    longest = total_S.amax(0, keepdim=True) if len(total_S) else total_S.new_zeros(1)
    rows = torch.stack([length_S.sum() for length_S in lengths])
    text_ends = torch.stack([part.sum() for part in torch.split(lengths[-1], by_entry)]).cumsum(0)
    # one transfer for all, where they lie on a device
    numbers: list[int] = torch.cat([rows, text_ends, leading_S[: sum(causal)].sum()[None], longest]).tolist()
    parts, (shown, most) = len(lengths), numbers[-2:]
    bounds = [0, *numbers[parts:-2]]
    return Sizes(
        sequences=len(total_S),
        rows=numbers[:parts],
        spare=spare,
        text_bounds=bounds,
        causal=sum(causal),
        causal_rows=(shown, bounds[len(causal)]),
        longest=max(most, numbers[parts - 1]) if spare else most,  # all that is spare is one sequence
        labels=labels,
    )


def arrange(
    listed: list[Entry],
    text_offsets: Tensor,
    percepts: Percepts,
    config: MMScaleConfig,
    dtype: torch.dtype,
    sizes: Sizes | None = None,
    backend: str | None = None,
) -> Sequences:
    """Lay out the buffer of the upper stack. A sequence is its unit's tokens, part after part, then its text.

    Args:
        listed: the entries.
        text_offsets: int64 offsets of the texts in the lower stack's text tokens, one more than texts.
        percepts: what the samples show.
        config: the model's shape.
        dtype: of the activations.
        sizes: of the result; None takes them from `listed`, for which a device has to be waited for.
        backend: of torch.compile, for the copies that attention makes; None: operation by operation.
    """
    unit_S, text_S = torch.cat([e.unit_S for e in listed]), torch.cat([e.text_S for e in listed])
    causal_S = torch.cat([torch.full_like(e.unit_S, e.causal) for e in listed]).bool()
    lengths = lengths_of(listed, text_offsets, percepts)
    sizes = measure(listed, lengths, [None, None], spare=False) if sizes is None else sizes
    if sizes.spare:  # what negatives may take and do not: the text of one more sequence, which nobody reads
        spare = sizes.rows[-1] - lengths[-1].sum(0, keepdim=True)
        lengths = [*(torch.cat([length_S, spare * 0]) for length_S in lengths[:-1]), torch.cat([lengths[-1], spare])]
        unit_S, text_S = F.pad(unit_S, (0, 1), value=-1), F.pad(text_S, (0, 1))
        causal_S = F.pad(causal_S, (0, 1))
    text_lengths_S = lengths[-1]
    leading_S = torch.stack(lengths[:-1]).sum(0) if len(lengths) > 2 else lengths[0]
    total_S = leading_S + text_lengths_S
    next_S = total_S.cumsum(0) - total_S
    walks, places, first_rows, ends = [walk(*pair) for pair in zip(lengths, sizes.rows, strict=True)], [], [], [0]
    for length_S, (sequence, offset) in zip(lengths, walks, strict=True):
        first_rows.append(length_S.cumsum(0) - length_S + ends[-1])
        ends.append(ends[-1] + len(sequence))
        places.append(next_S[sequence] + offset)
        next_S = next_S + length_S
    sequence_T, offset_T = walks[-1]
    gathers = []
    for part, (sequence, offset) in zip(percepts.parts, walks[:-1], strict=True):
        if part.length is not None:
            gathers.append(unit_S[nonzero(unit_S >= 0, sizes.rows[0] // part.length)])
        else:
            gathers.append(part.order_X[part.offsets[unit_S[sequence]] + offset])
    plan = _plan((leading_S, text_lengths_S, causal_S), places, percepts, sizes, dtype, backend)
    if config.positions == "rotary":
        seen = gather_parts([part.fused_X3 for part in percepts.parts], percepts, gathers)
        places_T3 = torch.cat([*seen, text_coordinates(offset_T + text_starts(percepts, unit_S)[sequence_T])])
        plan = with_positions(plan, places_T3, config, config.expert("image", fused=True))
    bounds = [0]
    for entry in listed:
        bounds.append(bounds[-1] + len(entry.unit_S))
    tokens_T = text_offsets[text_S[sequence_T]] + offset_T
    if sizes.spare:
        tokens_T = torch.where(sequence_T < bounds[-1], tokens_T, 0)
    first_text_row_S = first_rows.pop() - ends[-2]
    return Sequences(gathers, tokens_T, first_rows, ends[:-1], first_text_row_S, unit_S, lengths, bounds, sizes, plan)


def _plan(
    lengths: tuple[Tensor, Tensor, Tensor],
    places: list[Tensor],
    percepts: Percepts,
    sizes: Sizes,
    dtype: torch.dtype,
    backend: str | None,
) -> Plan:
    """How the sequences attend.

    Args:
        lengths: tokens of perception and of text of each sequence, and whether it is causal.
        places: where the rows of each part stand when sequence follows sequence.
        percepts: what the samples show.
        sizes: of the buffer.
        dtype: of the activations.
        backend: as for `arrange`.
    """
    leading_S, text_S, causal_S = lengths
    if len(places) == 2 and sizes.sequences and packed.packs(leading_S.device, dtype):
        pair, dense = (places[0], places[1]), percepts.parts[0].length
        causal, spoken, longest = sizes.causal, sizes.causal_rows, sizes.longest
        return packed.fused_plan(leading_S, text_S, pair, causal=causal, causal_rows=spoken, dense=dense, longest=longest, backend=backend)
    rows = torch.empty_like(torch.cat(places))
    rows[torch.cat(places)] = torch.arange(len(rows), device=rows.device)
    total_S = leading_S + text_S
    return ragged_plan(total_S, torch.where(causal_S, leading_S, total_S), rows, dtype)


def lengths_of(listed: list[Entry], text_offsets: Tensor, percepts: Percepts) -> list[Tensor]:
    """Tokens of each part of perception, and of text, that each sequence of all entries has; int64 (S,) each."""
    unit_S, text_S = torch.cat([e.unit_S for e in listed]), torch.cat([e.text_S for e in listed])
    texts = torch.where(text_S >= 0, text_offsets.diff()[text_S], 0) if len(text_offsets) > 1 else torch.zeros_like(text_S)
    return [*(part.lengths(unit_S) for part in percepts.parts), texts]


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
    """Rows of each part: hidden patches of each modality, those that stand for units alone, all of units alone; sorted by part."""
    restore: Tensor | None
    """Index that puts the rows of all parts back into the order of their kinds; None where there is one part."""
    text_rows: Tensor
    """Caption tokens with a label, masked tokens, first tokens of FUSED, first tokens of NEGATIVES, all tokens of FUSED."""
    sizes: list[int]
    """Text rows of each of the five kinds."""
    labels: Tensor
    """Labels of the first two kinds."""
    pooled: tuple[Tensor, Tensor] | None
    """Tokens of each text of FUSED, and of each unit of ALONE, where task heads read all of them; None where they read one."""


def readout(seqs: Sequences, labels_U: Tensor, percepts: Percepts, wanted: Wanted, *, concat: bool = False) -> Readout:
    """Find the rows that heads read.

    Args:
        seqs: the laid out sequences.
        labels_U: labels of the lower stack's text tokens.
        percepts: what the samples show.
        wanted: the objectives.
        concat: task heads read all tokens of a text, or of a unit alone.
    """
    labels_T = labels_U[seqs.tokens_T]
    found = []
    for index, on in ((CAPTIONS, wanted.captioning), (FUSED, wanted.masked_language)):
        rows = seqs.text_rows(index)
        found.append(nonzero(labels_T[rows] != IGNORE, seqs.sizes.labels[index]) + rows.start if on else labels_T[:0])
    first = [seqs.first_text_row_S[seqs.entry(FUSED)], seqs.first_text_row_S[seqs.entry(NEGATIVES)]]
    if not (wanted.matching or wanted.classify):
        first[0] = first[0][:0]
    pooled, units, words = None, labels_T[:0], seqs.text_rows(FUSED)
    if concat and wanted.classify:
        units, lengths = _all_rows(seqs, percepts)
        pooled = (seqs.lengths[-1][seqs.entry(FUSED)], lengths)
    text = [*found, *first, torch.arange(words.start, words.stop if pooled else words.start, device=labels_T.device)]
    part_rows, restore = _by_part(torch.cat([*_patch_rows(seqs, percepts), _alone_rows(seqs, percepts), units]), seqs.perception_rows)
    return Readout(part_rows, restore, torch.cat(text), [len(t) for t in text], labels_T[torch.cat(found)], pooled)


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


def _all_rows(seqs: Sequences, percepts: Percepts) -> tuple[Tensor, Tensor]:
    """All perception rows of units alone, unit by unit, and how many each has."""
    alone = seqs.entry(ALONE)
    length = percepts.parts[0].length
    if length is not None:  # nothing is ragged, and a device need not be waited for
        first = seqs.first_rows[0][alone]
        return (first[:, None] + torch.arange(length, device=first.device)).flatten(), torch.full_like(first, length)
    rows, units = [], []
    for first_S, length_S in zip(seqs.first_rows, seqs.lengths[:-1], strict=True):
        unit, offset = walk(length_S[alone])
        rows.append(first_S[alone][unit] + offset)
        units.append(unit)
    unit = torch.cat(units)
    return torch.cat(rows)[unit.argsort(stable=True)], torch.stack([length_S[alone] for length_S in seqs.lengths[:-1]]).sum(0)


def _by_part(rows: Tensor, ends: list[int]) -> tuple[list[Tensor], Tensor | None]:
    """Sort perception rows into the parts they lie in."""
    if len(ends) == 2:
        return [rows], None
    part = torch.bucketize(rows, torch.tensor(ends[1:-1], device=rows.device), right=True)
    order = part.argsort(stable=True)
    counts = torch.bincount(part, minlength=len(ends) - 1).tolist()
    sorted_rows = [r - start for r, start in zip(torch.split(rows[order], counts), ends[:-1], strict=True)]
    return sorted_rows, torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
