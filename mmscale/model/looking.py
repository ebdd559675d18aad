"""Where the token that answers looks in the image: its attention in the fusion layers.

It shows what was looked at, not why the answer is what it is (Jain and Wallace 2019, "Attention is not explanation").

Shape letters: T tokens of the upper buffer, S sequences, L tokens of one, P patches, R rows that the head reads, H heads, K width of
a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mmscale.data.batch import IGNORE, Batch
from mmscale.model.attention import Plan
from mmscale.model.model import MMScaleModel
from mmscale.model.percepts import Percepts
from mmscale.model.positions import RotaryPlan
from mmscale.model.sequences import ALONE, CAPTIONS, FUSED, Entry, Sequences, Wanted, arrange, entries, readout


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
    """Rows that the answer comes from: of a head the text's first token, else the unit's [CLS], or all patches where there is none; of a
    written answer the token before its first one."""
    rows_L: Tensor
    """All rows, the image's first."""
    leading: int
    """Rows of the image before its patches."""
    grid: tuple[int, int]
    """Patches along height and width."""


@torch.no_grad()
def attention_to_images(model: MMScaleModel, batch: Batch, *, written: bool = False) -> dict[int, Tensor]:
    """Attention that each patch of a sample's image gets from what `classify` reads, or from where a written answer begins.

    Args:
        model: with fusion layers, or nothing is found.
        batch: without dropped patches.
        written: the answer is written after a prompt, both in the causal text: the token that its first word is predicted from.

    Returns:
        By the sample's row, fp32 (height, width) in patches: mean over heads and fusion layers, and over all patches where images have no
        [CLS]. With `head_pooling: concat`, too, it is the first token's.
        Its sum is the part of the attention that goes to the image, from 0 to 1. Samples without an image are left out.
    """
    wanted = Wanted(captioning=True) if written else Wanted(classify=True)
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
    first_S = _before_answer(batch, listed[CAPTIONS])
    return {seen.row: _share(watched.seen, seen) for seen in _sequences(batch, percepts, seqs, first_S, model)}


def _before_answer(batch: Batch, captions: Entry) -> list[int]:
    """The token of each caption that the first one to be learned is predicted from; -1 where none is learned."""
    labels = torch.split(batch.caption.labels_T.cpu(), batch.caption.cu_seqlens_S1.diff().tolist())
    learned = [(labels[text] != IGNORE).nonzero() for text in captions.text_S.tolist()]
    return [int(places[0]) if len(places) else -1 for places in learned]


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


def _sequences(batch: Batch, percepts: Percepts, seqs: Sequences, first_S: list[int], model: MMScaleModel) -> Iterator[_Seen]:
    """The sequences that an answer comes from, of samples with an image; a caption's comes from its token `first_S`."""
    items = percepts.items[0]  # images come first
    if items.name != "image":
        return
    grids = _grids(batch, model)
    grid_of = dict(zip(items.rows.tolist(), grids, strict=True))
    rows_U, lengths = percepts.rows_U.tolist(), torch.stack(seqs.lengths, 1)
    for entry in (CAPTIONS, FUSED, ALONE):
        bounds = seqs.entry(entry)
        for s in range(bounds.start, bounds.stop):
            unit = int(seqs.unit_S[s])
            row = rows_U[unit] if unit >= 0 else -1
            if row not in grid_of or (entry == CAPTIONS and first_S[s] < 0):
                continue
            starts = [int(rows_S[s]) for rows_S in seqs.first_rows]
            starts.append(seqs.perception_rows[-1] + int(seqs.first_text_row_S[s]))
            parts = [torch.arange(a, a + n, device=lengths.device) for a, n in zip(starts, lengths[s].tolist(), strict=True)]
            if entry == CAPTIONS:  # it sees no further than itself
                parts[-1] = parts[-1][: first_S[s] + 1]
            read_R = {CAPTIONS: parts[-1][-1:], FUSED: parts[-1][:1], ALONE: parts[0][: percepts.standing]}[entry]
            yield _Seen(row, read_R, torch.cat(parts), items.leading, grid_of[row])


def _grids(batch: Batch, model: MMScaleModel) -> list[tuple[int, int]]:
    """Patches along height and width of each image."""
    if "image" in model.modalities:
        return [(int(h), int(w)) for _, h, w in model.stream(batch, "image").grids_S3.tolist()]
    side = model.config.image_size // model.config.patch_size
    return [(side, side)] * len(batch.image_rows_N)
