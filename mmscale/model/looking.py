"""Where the token that a task's head reads looks in the image: its attention in the fusion layers.

It shows what was looked at, not why the answer is what it is (Jain and Wallace 2019, "Attention is not explanation").

Shape letters: T tokens of the upper buffer, S sequences, L tokens of one, P patches, R rows that the head reads, H heads, K width of
a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mmscale.data.batch import Batch
from mmscale.model.attention import Plan
from mmscale.model.model import MMScaleModel
from mmscale.model.percepts import Percepts
from mmscale.model.positions import RotaryPlan
from mmscale.model.sequences import ALONE, FUSED, Sequences, Wanted, arrange, entries, lengths_of, readout


@dataclass(frozen=True, slots=True)
class Watched:
    """A plan that keeps the queries and keys of every layer, as they meet."""

    plan: Plan
    seen: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def attend(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor) -> Tensor:
        """As the other plan's, shape (T, H, K)."""
        self.seen.append((q_THK, k_THK))
        return self.plan.attend(q_THK, k_THK, v_THK)


@dataclass(frozen=True, slots=True)
class _Seen:
    """What one sample's sequence consists of in the buffer."""

    row: int
    """Of the sample."""
    read_R: Tensor
    """Rows that the head reads: the text's first token, else the unit's [CLS], or all patches where there is none."""
    rows_L: Tensor
    """All rows, the image's first."""
    leading: int
    """Rows of the image before its patches."""
    grid: tuple[int, int]
    """Patches along height and width."""


@torch.no_grad()
def attention_to_images(model: MMScaleModel, batch: Batch) -> dict[int, Tensor]:
    """Attention that each patch of a sample's image gets from what `classify` reads.

    Args:
        model: with fusion layers, or nothing is found.
        batch: without dropped patches.

    Returns:
        By the sample's row, fp32 (height, width) in patches: mean over heads and fusion layers, and over rows where the head reads several.
        Its sum is the part of the attention that goes to the image, from 0 to 1. Samples without an image are left out.
    """
    wanted = Wanted(classify=True)
    percepts = model.lay_out(batch)
    lower = model.lower(batch, percepts)
    none = percepts.rows_U[:0]
    listed = entries(batch, wanted, (none, none), percepts)
    seqs = arrange(listed, lower.text_offsets, percepts, model.config, lower.text_UD.dtype)
    rows = readout(seqs, torch.cat([batch.caption.labels_T, batch.text.labels_T]), percepts, wanted)
    inner = seqs.plan
    watched = Watched(inner.plan if isinstance(inner, RotaryPlan) else inner)
    model.upper(lower, percepts, replace(seqs, plan=replace(inner, plan=watched) if isinstance(inner, RotaryPlan) else watched), rows)
    if not watched.seen:
        return {}
    lengths = torch.stack(lengths_of(listed, lower.text_offsets, percepts), 1)
    return {seen.row: _share(watched.seen, seen) for seen in _sequences(batch, percepts, seqs, lengths, model)}


def _share(layers: list[tuple[Tensor, Tensor]], seen: _Seen) -> Tensor:
    """Mean attention of the rows read to the image's patches."""
    found = []
    for q_THK, k_THK in layers:
        q_RHK, k_LHK = q_THK[seen.read_R].float(), k_THK[seen.rows_L].float()
        logits_HRL = torch.einsum("rhk,lhk->hrl", q_RHK, k_LHK) * q_THK.shape[-1] ** -0.5
        found.append(logits_HRL.softmax(-1).mean((0, 1)))
    height, width = seen.grid
    patches_P = torch.stack(found).mean(0)[seen.leading : seen.leading + height * width]
    return patches_P.view(height, width).cpu()


def _sequences(batch: Batch, percepts: Percepts, seqs: Sequences, lengths: Tensor, model: MMScaleModel) -> Iterator[_Seen]:
    """The sequences that a head reads, of samples with an image. `lengths` is (S, parts and text)."""
    items = percepts.items[0]  # images come first
    if items.name != "image":
        return
    grids = _grids(batch, model)
    grid_of = dict(zip(items.rows.tolist(), grids, strict=True))
    rows_U = percepts.rows_U.tolist()
    for entry in (FUSED, ALONE):
        bounds = seqs.entry(entry)
        for s in range(bounds.start, bounds.stop):
            unit = int(seqs.unit_S[s])
            row = rows_U[unit] if unit >= 0 else -1
            if row not in grid_of:
                continue
            starts = [int(first_S[s]) for first_S in seqs.first_rows]
            starts.append(seqs.perception_rows[-1] + int(seqs.first_text_row_S[s]))
            parts = [torch.arange(a, a + n, device=lengths.device) for a, n in zip(starts, lengths[s].tolist(), strict=True)]
            read_R = parts[-1][:1] if entry == FUSED else parts[0][: percepts.standing]
            yield _Seen(row, read_R, torch.cat(parts), items.leading, grid_of[row])


def _grids(batch: Batch, model: MMScaleModel) -> list[tuple[int, int]]:
    """Patches along height and width of each image."""
    if "image" in model.modalities:
        return [(int(h), int(w)) for _, h, w in model.stream(batch, "image").grids_S3.tolist()]
    side = model.config.image_size // model.config.patch_size
    return [(side, side)] * len(batch.image_rows_N)
