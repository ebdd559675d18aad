"""Matching of pairs that are chosen by their rows: an image that stands in several pairs goes through the lower layers once.

Shape letters: R pairs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmscale.data.batch import Batch
from mmscale.model.sequences import FUSED, Entry, Wanted, arrange, entries, readout

if TYPE_CHECKING:
    from mmscale.model.model import MMScaleModel


@torch.no_grad()
def match_pairs(model: MMScaleModel, batch: Batch, image_rows_R: Tensor, text_rows_R: Tensor) -> Tensor:
    """Score pairs: the logit that a row's text belongs to what another row, or the same, shows.

    Args:
        model: in evaluation mode.
        batch: its bidirectional texts are read, its captions are not.
        image_rows_R: int64 row of what each pair shows.
        text_rows_R: int64 row of each pair's text.

    Returns:
        fp32 (R,).
    """
    from mmscale.model.model import no_text

    batch = replace(batch, caption=no_text(batch))
    wanted, percepts = Wanted(matching=True), model.lay_out(batch)
    lower = model.lower(batch, percepts)
    listed = entries(batch, wanted, (image_rows_R, text_rows_R), percepts)
    listed[FUSED] = Entry(image_rows_R[:0], text_rows_R[:0])
    seqs = arrange(listed, lower.text_offsets, percepts, model.config, lower.text_UD.dtype)
    rows = readout(seqs, batch.text.labels_T, percepts, wanted)
    _, text_RD = model.upper(lower, percepts, seqs, rows)
    logits: Tensor = model.matching_head(text_RD[sum(rows.sizes[:3]) :])
    return logits.squeeze(1)
