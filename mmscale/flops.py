"""Floating-point operations of a forward, from the tokens a batch really has, and what accelerators can do at most.

A multiply-add is two operations. Attention counts the query-key pairs that see each other, so padding and masked-out halves count
nothing; norms, activations and softmax are left out. Training is three forwards; recomputed activations are not counted.
Source: Kaplan et al. 2020, table 1; Chowdhery et al. 2022 (PaLM), appendix B, for model FLOPs utilisation.

Shape letters: S sequences, M samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mmscale.data.batch import IGNORE, Batch
from mmscale.modalities.modality import Modality, build_modalities
from mmscale.model.configuration import MMScaleConfig
from mmscale.model.pairs import negative_candidates
from mmscale.model.patch_embedding import stream_of
from mmscale.model.percepts import Percepts, lay_out
from mmscale.model.sequences import Entry, Wanted, entries
from mmscale.objectives import Objective

PEAK_TERAFLOPS = {
    "B200": (2250.0, 80.0),
    "GB200": (2500.0, 80.0),
    "H200": (989.0, 67.0),
    "H100 PCIe": (756.0, 51.0),
    "H100": (989.0, 67.0),
    "H800": (989.0, 67.0),
    "H20": (148.0, 44.0),
    "A100": (312.0, 19.5),
    "A800": (312.0, 19.5),
    "A40": (149.7, 37.4),
    "A10G": (70.0, 35.0),
    "L40S": (362.0, 91.6),
    "L4": (121.0, 30.3),
    "V100": (125.0, 15.7),
    "T4": (65.0, 8.1),
    "MI300X": (1307.0, 163.4),
}
"""Dense (bf16 or fp16 matrix unit, fp32) peaks from the vendors' data sheets; the first name found in the device's name counts."""


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak operations a second of a device at a precision; None for a CPU or an unknown accelerator."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    known = sorted((key for key in PEAK_TERAFLOPS if key in name), key=len)
    if not known:
        return None
    half, single = PEAK_TERAFLOPS[known[-1]]
    return 1e12 * (half if dtype in (torch.bfloat16, torch.float16) else single)


def forward_flops(
    config: MMScaleConfig, batch: Batch, objectives: Sequence[Objective], modalities: Mapping[str, Modality] | None = None
) -> float:
    """Operations of one forward of one micro-batch.

    The text drawn as a hard negative is not known here: it counts as long as the sample's own, and what is seen with it likewise.

    Args:
        config: the model's shape.
        batch: the micro-batch.
        objectives: what is trained.
        modalities: the model's; None builds them from its configuration.
    """
    wanted, modalities = Wanted.of(objectives), build_modalities(config) if modalities is None else modalities
    streams = {name: stream_of(batch, name, modality) for name, modality in modalities.items()}
    percepts = lay_out(batch, streams, modalities, config, wanted.masked_image)
    caption_S, text_S = (s.cu_seqlens_S1.diff().long() for s in (batch.caption, batch.text))
    d = config.hidden_size
    token = 8.0 * d * d + 4.0 * d * config.mlp_size
    perceived = torch.cat([items.lengths_S for items in percepts.items])
    tokens = perceived.sum() + len(batch.caption.ids_T) + len(batch.text.ids_T)
    seen = perceived.square().sum() + (caption_S * (caption_S + 1) // 2).sum() + text_S.square().sum()
    total = config.unimodal_layers * (tokens * token + 4.0 * d * seen)
    total = total + 2.0 * d * (config.patch_values * batch.patch_mask_NP.shape[1] * len(batch.image_rows_N))
    for name, modality in modalities.items():
        table = modality.grid[1] ** 2 if modality.interpolated and config.positions == "learned" else 0
        total = total + 2.0 * d * (modality.values + table) * len(streams[name].mask_T)
    total = total + 2.0 * d * config.projection_size * (len(percepts.rows_U) + len(caption_S))
    total = total + _contrastive(config, batch, wanted)
    return float(total + _fusion(config, batch, wanted, percepts, modalities))


def _contrastive(config: MMScaleConfig, batch: Batch, wanted: Wanted) -> float:
    """Similarities within the micro-batch; those with other ranks are left out."""
    return 2.0 * config.projection_size * batch.size**2 * (wanted.contrastive + wanted.matching)


def _fusion(config: MMScaleConfig, batch: Batch, wanted: Wanted, percepts: Percepts, modalities: Mapping[str, Modality]) -> Tensor:
    """Fusion layers and heads."""
    anchor = negative_candidates(batch, wanted.matching_group).any(1).nonzero().squeeze(1) if wanted.matching else percepts.rows_U[:0]
    listed = entries(batch, wanted, (anchor, anchor), percepts)
    captions, fused, negatives, _, alone = listed
    lengths_S = torch.cat([batch.caption.cu_seqlens_S1.diff(), batch.text.cu_seqlens_S1.diff()]).long()
    d, zero = config.hidden_size, batch.positions_M.new_zeros(())
    tokens, seen = zero, zero
    for entry in listed:
        entry_tokens, entry_seen = _sizes(entry, lengths_S, percepts)
        tokens, seen = tokens + entry_tokens, seen + entry_seen
    words = zero
    for stream, entry, first in ((batch.caption, captions, 0), (batch.text, fused, len(batch.caption.rows_S))):
        if wanted.captioning if entry is captions else wanted.masked_language:
            words = words + _labelled(stream.labels_T, stream.cu_seqlens_S1, entry.text_S - first)
    pooled = len(fused.text_S) + len(negatives.text_S) if wanted.matching or wanted.classify else 0
    patches = sum(len(items.hidden_copy_R) for items in percepts.items)
    values = {name: modality.values for name, modality in modalities.items()}
    predicted = sum(len(i.hidden_copy_R) * (d if wanted.features else values.get(i.name, config.patch_values)) for i in percepts.items)
    rows = words + pooled + patches + len(alone.unit_S)
    rest = 2.0 * d * d + 4.0 * d * config.mlp_size
    layers = config.fusion_layers
    total = layers * (tokens * 6.0 * d * d + 4.0 * d * seen)
    if layers:
        total = total + ((layers - 1) * tokens + rows) * rest
    heads = words * config.vocab_size + predicted + pooled * wanted.matching
    return total + 2.0 * d * (heads + batch.size * wanted.classify * sum((config.heads or {}).values()))


def _sizes(entry: Entry, lengths_S: Tensor, percepts: Percepts) -> tuple[Tensor, Tensor]:
    """Tokens of the sequences of an entry, and query-key pairs that see each other."""
    lead_S = torch.stack([part.lengths(entry.unit_S) for part in percepts.parts]).sum(0)
    text_S = torch.where(entry.text_S >= 0, lengths_S[entry.text_S], 0) if len(lengths_S) else torch.zeros_like(lead_S)
    whole_S = lead_S + text_S
    seen_S = lead_S.square() + text_S * lead_S + text_S * (text_S + 1) // 2 if entry.causal else whole_S.square()
    return whole_S.sum(), seen_S.sum()


def _labelled(labels_T: Tensor, offsets: Tensor, chosen: Tensor) -> Tensor:
    """Labels in the chosen sequences."""
    sums = torch.cat([labels_T.new_zeros(1), (labels_T != IGNORE).cumsum(0)])[offsets.long()]
    return sums.diff()[chosen].sum()
