"""Which samples of a micro-batch are pairs, which may be each other's negatives, and the draw of hard negatives.

All but the draw is a pure function of the batch, so that a loss's divisor can be counted before the forward. Samples with the
same text are never negatives of each other: their texts are the same point.

Shape letters: M samples, S sequences, T tokens, G group size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmscale.data.batch import IGNORE, Batch, TextStream

HASH_BITS = 48
_FACTOR, _STRIDE, _MIX = 0x9E3779B97F4A7C1, 0x2545F4914F6CDD1, 0x3F58476D1CE4E5B9


def offsets_in_sequences(stream: TextStream) -> Tensor:
    """Each token's offset in its sequence, int64 (T,)."""
    starts_S, lengths_S = stream.cu_seqlens_S1[:-1].long(), stream.cu_seqlens_S1.diff().long()
    tokens = len(stream.ids_T)
    return torch.arange(tokens, device=lengths_S.device) - starts_S.repeat_interleave(lengths_S, output_size=tokens)


def of_rows(rows: Tensor, size: int) -> Tensor:
    """Invert a row index: for each of `size` samples the image or sequence it has, -1 where it has none; int64 (M,)."""
    found_M = rows.new_full((size,), -1)
    found_M[rows] = torch.arange(len(rows), device=rows.device)
    return found_M


def where(flags: Tensor, mirror: Callable[[], Tensor]) -> Tensor:
    """Indexes of the flags that are set, int64.

    Args:
        flags: bool, of one dimension.
        mirror: the same in the host's memory, which says how many there are: asked only if the flags lie on a device, and then spares
            the host from waiting for it.
    """
    if flags.device.type == "cpu" or (known := mirror()).device.type != "cpu":
        return nonzero(flags, None)
    return nonzero(flags, int(known.sum()))


def nonzero(flags: Tensor, size: int | None) -> Tensor:
    """Indexes of the flags that are set, of one dimension, given how many there are; None: not known, the device is waited for."""
    return flags.nonzero().squeeze(1) if size is None else torch.nonzero_static(flags, size=size).squeeze(1)


def text_hash(stream: TextStream, masked: bool) -> Tensor:
    """A 48-bit hash of each sequence's tokens, int64 (S,).

    Args:
        stream: the sequences.
        masked: whether labels hold the tokens that masks hide (bidirectional stream); those are hashed, not the masks.
    """
    ids_T = torch.where(stream.labels_T == IGNORE, stream.ids_T, stream.labels_T) if masked else stream.ids_T
    mixed_T = (ids_T + 1) * _FACTOR + (offsets_in_sequences(stream) + 1) * _STRIDE
    mixed_T = (mixed_T ^ (mixed_T >> 29)) * _MIX
    sums = torch.cat([mixed_T.new_zeros(1), (mixed_T ^ (mixed_T >> 31)).cumsum(0)])
    offsets = stream.cu_seqlens_S1.long()
    return (sums[offsets[1:]] - sums[offsets[:-1]]) & ((1 << HASH_BITS) - 1)


def row_hash(batch: Batch) -> Tensor:
    """The hash of each sample's caption, or else of its bidirectional text, 0 where it has neither; int64 (M,)."""
    hash_M = batch.positions_M.new_zeros(batch.size)
    hash_M[batch.text.rows_S] = text_hash(batch.text, masked=True)
    hash_M[batch.caption.rows_S] = text_hash(batch.caption, masked=False)
    return hash_M


def has(rows: Tensor, size: int) -> Tensor:
    """Which of `size` samples an index names, bool (M,)."""
    return of_rows(rows, size) >= 0


def same_group(positions_M: Tensor, others: Tensor, group: int | None) -> Tensor:
    """Whether two samples lie in the same aligned group of consecutive positions, bool (M, others)."""
    if group is None:
        return torch.ones(len(positions_M), len(others), dtype=torch.bool, device=positions_M.device)
    return (positions_M // group)[:, None] == (others // group)[None]


def negative_candidates(batch: Batch, group: int | None) -> Tensor:
    """Which samples j may give sample i a negative image or text, bool (M, M): their captions differ, and what matching reads."""
    pair_M = has(batch.perception_rows_N, batch.size) & has(batch.text.rows_S, batch.size)
    read_M = batch.positions_M.new_zeros(batch.size)
    read_M[batch.text.rows_S] = text_hash(batch.text, masked=True)
    hash_M = row_hash(batch)
    differ_MM = (hash_M[:, None] != hash_M[None]) & (read_M[:, None] != read_M[None])
    return differ_MM & pair_M[:, None] & pair_M[None] & same_group(batch.positions_M, batch.positions_M, group)


def draw_negatives(batch: Batch, similarity_MM: Tensor, group: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Draw a hard negative for each pair by the Gumbel-max trick: j ~ softmax over candidates of the scaled similarity.

    Pairs of even position get a negative text, those of odd position a negative image.

    Args:
        batch: the micro-batch; its Gumbel noise makes the draw a function of (seed, position).
        similarity_MM: scaled similarity of image i and caption j, fp32, detached.
        group: aligned positions within which negatives are sought; None for the whole micro-batch.

    Returns:
        For each negative, int64: the row its image comes from, the row its text comes from, the row it is a negative of.

    Source: Li et al. 2021 (ALBEF), section 3.2, with the diagonal masked before the softmax.
    """
    allowed_MM = negative_candidates(batch, group)
    columns = torch.arange(batch.size, device=allowed_MM.device) if group is None else batch.positions_M % group
    even_M = batch.positions_M % 2 == 0
    score_MM = torch.where(even_M[:, None], similarity_MM, similarity_MM.T).float() + batch.gumbel_MG.float()[:, columns]
    anchor = where(allowed_MM.any(1), lambda: negative_candidates(batch.on_host, group).any(1))
    drawn = score_MM.masked_fill(~allowed_MM, float("-inf"))[anchor].argmax(1) if len(anchor) else anchor
    even = even_M[anchor]
    return torch.where(even, anchor, drawn), torch.where(even, drawn, anchor), anchor
