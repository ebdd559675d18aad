"""What the samples of a batch show or sound like, laid out as tokens: items, units, parts.

An item is what a sample has of one modality; one with hidden patches comes once more as a masked copy. A part holds the tokens of
all items of one expert, modality after modality. A unit is all items of a sample, or one masked copy: what enters a sequence of the upper
stack.

Where square images are all there is, nothing is ragged: the one part is dense and unit i is image i.

Shape letters: S items and copies, X tokens, U samples that have an item, C masked copies, R hidden patches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmscale.data.batch import Batch, PatchStream
from mmscale.modalities.modality import Modality, experts_of
from mmscale.model.configuration import MMScaleConfig
from mmscale.model.pairs import where

if TYPE_CHECKING:
    from mmscale.model.convolution import Neighbours


@dataclass(frozen=True, slots=True)
class Tokens:
    """How the tokens of a stream's items come from its patches; the arguments of `PatchEmbedding.forward`."""

    patches: Tensor
    items: Tensor
    hidden: Tensor
    order: Tensor


@dataclass(frozen=True, slots=True)
class Items:
    """The items of one modality, then its masked copies."""

    name: str
    expert: int
    rows: Tensor
    """Row of each item's sample."""
    copies: Tensor
    """Item that each copy is of."""
    leading: int
    """Tokens of each before its patches: [CLS], and others that only take part."""
    lengths_S: Tensor
    """All its tokens."""
    extents_S: Tensor
    """Positions that each takes along the axis on which it is longest, [CLS] included."""
    coordinates_X3: Tensor
    """(time, height, width) of each token: leading ones at 0, patches from 1 on."""
    hidden_copy_R: Tensor
    """Copy of each hidden patch."""
    hidden_offset_R: Tensor
    """Its token in the item."""
    tokens: Tokens | None
    """None for square images."""


@dataclass(frozen=True, slots=True)
class Part:
    """The tokens of one expert."""

    length: int | None
    """Tokens of every item where the part is dense: square images alone."""
    lengths_S: Tensor
    coordinates_X3: Tensor
    """Within an item."""
    fused_X3: Tensor
    """Within a unit: items stand one behind the other."""
    order_X: Tensor
    """Tokens, unit after unit; a dense part lies in that order."""
    offsets: Tensor
    """Offsets of the units in `order_X`; of a dense part empty."""

    def lengths(self, unit_S: Tensor) -> Tensor:
        """Tokens of units, 0 for -1."""
        if self.length is not None:
            return (unit_S >= 0) * self.length
        return torch.where(unit_S >= 0, self.offsets.diff()[unit_S], 0) if len(self.offsets) > 1 else torch.zeros_like(unit_S)


@dataclass(frozen=True, slots=True)
class Percepts:
    """Everything about items but their hidden states."""

    items: list[Items]
    """By modality, in the order in which a sample's items follow one another."""
    parts: list[Part]
    """By expert."""
    rows_U: Tensor
    """Row of each unit that is a sample's."""
    copies: int
    """Units that are masked copies; they come last."""
    first_S: Tensor
    """First token of every item, over all parts one after the other, modality after modality."""
    cls_U: Tensor
    """That of each sample's first item: its [CLS] stands for the sample."""
    part_U: Tensor
    """Part of that item."""
    extents: Tensor
    """Positions that each unit takes: text goes on after them."""
    neighbours: list[Neighbours] = field(default_factory=list)
    """The patches around each token, part by part; empty where no expert has a convolution."""

    @property
    def standing(self) -> int:
        """Rows that stand for a unit alone: its first item's [CLS], or where images have none, all patches."""
        return 1 if self.items[0].leading else int(self.parts[0].length or 0)


def lay_out(
    batch: Batch, streams: Mapping[str, PatchStream], modalities: Mapping[str, Modality], config: MMScaleConfig, masked: bool
) -> Percepts:
    """Lay out the items of a batch.

    Args:
        batch: the micro-batch.
        streams: its streams, empty ones included.
        modalities: the model's.
        config: its shape.
        masked: whether items with hidden patches come once more.
    """
    if not modalities:
        return _squares_alone(square_items(batch, config, masked), batch)
    experts, listed = experts_of(modalities), []
    if "image" not in modalities:
        listed.append(square_items(batch, config, masked))
    for name, modality in modalities.items():
        listed.append(stream_items(name, streams[name], experts.index(modality.expert), masked))
    return _ragged(listed, len(experts), batch)


def square_items(batch: Batch, config: MMScaleConfig, masked: bool) -> Items:
    """Square images of one size, each with as many patches as the others."""
    rows_N, mask_NP, leading = batch.image_rows_N, batch.patch_mask_NP, config.image_tower.leading_tokens
    host_NP = batch.on_host.patch_mask_NP
    copies = where(mask_NP.any(1), lambda: host_NP.any(1)) if masked else rows_N[:0]
    hidden = where(mask_NP[copies].flatten(), lambda: host_NP.flatten()) if masked else copies
    hidden_copy, hidden_patch = hidden // mask_NP.shape[1], hidden % mask_NP.shape[1]
    lengths_S = rows_N.new_full((len(rows_N) + len(copies),), mask_NP.shape[1] + leading)
    extents_S = torch.full_like(lengths_S, config.image_size // config.patch_size + 1)
    if config.positions == "rotary" or config.image_tower.convolution:
        chosen = torch.cat([torch.arange(len(rows_N), device=rows_N.device), copies])
        place_X3 = square_coordinates(batch, config).index_select(0, chosen).flatten(0, 1)
    else:  # nobody reads them
        place_X3 = rows_N.new_zeros(1, 3).expand(len(lengths_S) * (mask_NP.shape[1] + leading), -1)
    return Items("image", 0, rows_N, copies, leading, lengths_S, extents_S, place_X3, hidden_copy, hidden_patch + leading, None)


def square_coordinates(batch: Batch, config: MMScaleConfig) -> Tensor:
    """(time, height, width) of the tokens of square images, (N, L, 3)."""
    side, n = config.image_size // config.patch_size, len(batch.image_rows_N)
    patch_NK = batch.kept_NK if batch.kept_NK is not None else torch.arange(side * side, device=batch.image_rows_N.device).expand(n, -1)
    place_NK3 = torch.stack([torch.zeros_like(patch_NK), patch_NK // side, patch_NK % side], dim=-1) + 1
    return torch.cat([place_NK3.new_zeros(n, config.image_tower.leading_tokens, 3), place_NK3], dim=1)


def stream_items(name: str, stream: PatchStream, expert: int, masked: bool) -> Items:
    """The items of a stream."""
    patches_S, whole = stream.cu_seqlens_S1.diff().long(), torch.arange(len(stream.rows_S), device=stream.rows_S.device)
    of_patch = whole.repeat_interleave(patches_S, output_size=len(stream.mask_T))
    count_S = torch.zeros_like(patches_S).index_add_(0, of_patch, stream.mask_T.long())
    copies = count_S.nonzero().squeeze(1) if masked else whole[:0]
    items = torch.cat([whole, copies])
    item_T, offset_T = walk(patches_S[items])
    patches = stream.cu_seqlens_S1[:-1].long()[items[item_T]] + offset_T
    hidden = stream.mask_T[patches] & (item_T >= len(whole))
    lengths_S = patches_S[items] + 1
    item_X, offset_X = walk(lengths_S)
    order = torch.where(offset_X == 0, item_X, len(items) + torch.arange(len(item_X), device=items.device) - item_X - 1)
    place_T3 = stream.coordinates_T3[patches] + 1
    coordinates_X3 = torch.cat([place_T3.new_zeros(len(items), 3), place_T3]).index_select(0, order)
    tokens = Tokens(patches, items, hidden, order)
    found = hidden.nonzero().squeeze(1)
    extents_S = stream.grids_S3.amax(1)[items] + 1
    return Items(
        name,
        expert,
        stream.rows_S,
        copies,
        1,
        lengths_S,
        extents_S,
        coordinates_X3,
        item_T[found] - len(whole),
        offset_T[found] + 1,
        tokens,
    )


def _squares_alone(items: Items, batch: Batch) -> Percepts:
    size, rows_N = batch.patch_mask_NP.shape[1] + items.leading, batch.image_rows_N
    first_S = torch.arange(len(items.lengths_S), device=rows_N.device) * size
    none = rows_N[:0]
    part = Part(size, items.lengths_S, items.coordinates_X3, items.coordinates_X3, none, none)
    cls_U = first_S[: len(rows_N)]
    return Percepts([items], [part], rows_N, len(items.copies), first_S, cls_U, torch.zeros_like(cls_U), items.extents_S)


def _ragged(listed: list[Items], experts: int, batch: Batch) -> Percepts:
    rows_U = batch.perception_rows_N
    unit_M = rows_U.new_zeros(batch.size)
    unit_M[rows_U] = torch.arange(len(rows_U), device=rows_U.device)
    units, total = [], len(rows_U)
    for items in listed:
        units += [unit_M[items.rows], torch.arange(total, total + len(items.copies), device=rows_U.device)]
        total += len(items.copies)
    unit_S, lengths_S, extents_S = torch.cat(units), torch.cat([i.lengths_S for i in listed]), torch.cat([i.extents_S for i in listed])
    expert_S = torch.cat([torch.full_like(items.lengths_S, items.expert) for items in listed])
    first_S, before_S = torch.empty_like(unit_S), torch.empty_like(unit_S)
    by_expert, by_unit = expert_S.argsort(stable=True), unit_S.argsort(stable=True)
    first_S[by_expert] = _exclusive(lengths_S[by_expert])
    extents = lengths_S.new_zeros(total).index_add_(0, unit_S, extents_S)
    before_S[by_unit] = _exclusive(extents_S[by_unit])
    before_S -= _exclusive(extents)[unit_S]
    parts, base = [], 0
    for expert in range(experts):
        mine = (expert_S == expert).nonzero().squeeze(1)
        coordinates_X3 = torch.cat([i.coordinates_X3 for i in listed if i.expert == expert] or [rows_U.new_zeros(0, 3)])
        item_X, _ = walk(lengths_S[mine])
        ordered = by_unit[expert_S[by_unit] == expert]
        item_O, offset_O = walk(lengths_S[ordered])
        offsets = lengths_S.new_zeros(total).index_add_(0, unit_S[mine], lengths_S[mine]).cumsum(0)
        parts.append(
            Part(
                None,
                lengths_S[mine],
                coordinates_X3,
                coordinates_X3 + before_S[mine][item_X, None],
                first_S[ordered][item_O] - base + offset_O,
                torch.cat([offsets.new_zeros(1), offsets]),
            )
        )
        base += len(item_X)
    leading_U = by_unit[torch.searchsorted(unit_S[by_unit], torch.arange(len(rows_U), device=rows_U.device))]
    return Percepts(listed, parts, rows_U, total - len(rows_U), first_S, first_S[leading_U], expert_S[leading_U], extents)


def walk(lengths_S: Tensor, total: int | None = None) -> tuple[Tensor, Tensor]:
    """For each token of ragged sequences its sequence and its offset in it; `total`, their sum, spares waiting for the device."""
    sequence = torch.arange(len(lengths_S), device=lengths_S.device).repeat_interleave(lengths_S, output_size=total)
    return sequence, torch.arange(len(sequence), device=lengths_S.device) - _exclusive(lengths_S)[sequence]


def _exclusive(lengths: Tensor) -> Tensor:
    return lengths.cumsum(0) - lengths
