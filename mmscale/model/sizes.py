"""How much the upper stack will hold, known before the device has computed anything.

Sizes of tensors are the host's business: where it has to ask the device for one, it waits until all work before is done, and the device
then waits for it. All sizes but one follow from the batch as the loader built it. Which text a hard negative gets is drawn on the device,
from similarities that exist only there; the host makes room for the longest.

Shape letters: S sequences, M samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmscale.data.batch import IGNORE, Batch, TextStream
from mmscale.model.configuration import MMScaleConfig
from mmscale.model.pairs import negative_candidates
from mmscale.model.percepts import lay_out
from mmscale.model.sequences import NEGATIVES, Sizes, Wanted, entries, lengths_of, measure


def sizes_of(batch: Batch, wanted: Wanted, config: MMScaleConfig) -> Sizes | None:
    """The sizes of what `arrange` will lay out for a batch on a device.

    None where the batch lies in the host's memory anyway, has no copy there, or has items of other modalities than square images: then
    `arrange` finds them by itself.
    """
    host = batch.on_host
    if host is batch or config.modalities:
        return None
    seen, none = lay_out(host, {}, {}, config, wanted.masked_image), host.image_rows_N[:0]
    anchors = negative_candidates(host, wanted.matching_group).any(1).nonzero().squeeze(1) if wanted.matching else none
    listed = entries(host, wanted, (anchors, anchors), seen)
    lengths = lengths_of(listed, offsets_of(host.caption, host.text), seen)
    start = sum(len(e.unit_S) for e in listed[:NEGATIVES])
    drawn_S = torch.zeros_like(lengths[-1], dtype=torch.bool)
    drawn_S[start : start + len(anchors)] = host.positions_M[anchors] % 2 == 0
    if len(anchors):
        lengths[-1] = torch.where(drawn_S, host.text.cu_seqlens_S1.diff().max().long(), lengths[-1])
    labels: list[int | None] = [_labels(s, on) for s, on in ((host.caption, wanted.captioning), (host.text, wanted.fused))]
    return measure(listed, lengths, labels, spare=bool(drawn_S.any()))


def offsets_of(*streams: TextStream) -> Tensor:
    """int64 offsets of the sequences of several streams, one after the other."""
    lengths_S = torch.cat([s.cu_seqlens_S1.diff().long() for s in streams])
    return torch.cat([lengths_S.new_zeros(1), lengths_S.cumsum(0)])


def _labels(stream: TextStream, on: bool) -> int:
    """Labels in the fused sequences."""
    fused_T = stream.fuse_S.repeat_interleave(stream.cu_seqlens_S1.diff().long())
    return int(((stream.labels_T != IGNORE) & fused_T).sum()) if on else 0
