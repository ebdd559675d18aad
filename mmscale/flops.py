"""Floating-point operations of a forward, from the tokens a batch really has, and what accelerators can do at most.

A multiply-add is two operations. Attention counts the query-key pairs that see each other, so padding and masked-out halves count
nothing; norms, activations and softmax are left out. Training is three forwards, less what frozen weights do without; recomputed
activations are not counted.
Source: Kaplan et al. 2020, table 1; Chowdhery et al. 2022 (PaLM), appendix B, for model FLOPs utilisation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

from mmscale.backward import Backward, Share
from mmscale.counts import Counts
from mmscale.model.configuration import ExpertShape, MMScaleConfig
from mmscale.model.convolution import SIDE
from mmscale.model.text_convolution import SPAN

PEAK_TERAFLOPS = {
    "B200": (2250.0, 80.0),
    "GB200": (2500.0, 80.0),
    "H200": (989.0, 67.0),
    "GH200": (989.0, 67.0),
    "H100 PCIe": (756.0, 51.0),
    "H100 NVL": (835.0, 60.0),
    "H100": (989.0, 67.0),
    "H800": (989.0, 67.0),
    "H20": (148.0, 44.0),
    "A100": (312.0, 19.5),
    "A800": (312.0, 19.5),
    "A40": (149.7, 37.4),
    "A30": (165.0, 10.3),
    "A10": (125.0, 31.2),
    "A10G": (70.0, 35.0),
    "L40S": (362.0, 91.6),
    "L40": (181.0, 90.5),
    "L4": (121.0, 30.3),
    "V100": (125.0, 15.7),
    "T4": (65.0, 8.1),
    "RTX 4090": (165.2, 82.6),
    "RTX 3090": (71.0, 35.6),
    "MI300X": (1307.4, 163.4),
    "MI250X": (383.0, 47.9),
}
"""Dense (bf16 or fp16 matrix unit, fp32) peaks from the vendors' data sheets; the first name found in the device's name counts."""


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak operations a second of a device at a precision; None for a CPU or an unknown accelerator."""
    if device.type != "cuda":
        return None
    return named_peak(torch.cuda.get_device_name(device), dtype)


def named_peak(name: str, dtype: torch.dtype) -> float | None:
    """Peak operations a second of the device of this name; None where it is not in the table."""
    known = sorted((key for key in PEAK_TERAFLOPS if re.search(rf"(?<![A-Za-z0-9]){re.escape(key)}(?![0-9])", name)), key=len)
    if not known:
        return None
    half, single = PEAK_TERAFLOPS[known[-1]]
    return 1e12 * (half if dtype in (torch.bfloat16, torch.float16) else single)


def forward_flops(config: MMScaleConfig, counts: Counts) -> float:
    """Operations of one forward of one micro-batch."""
    return sum(operations for operations, _ in _parts(config, counts, Backward()))


def training_flops(config: MMScaleConfig, counts: Counts, backward: Backward) -> float:
    """Operations of a forward and a backward of one micro-batch: three forwards where all is trained.

    Args:
        config: of the model.
        counts: of the micro-batch.
        backward: what is trained of it.
    """
    return sum(operations * (1.0 + share) for operations, share in _parts(config, counts, backward))


def _parts(config: MMScaleConfig, counts: Counts, backward: Backward) -> Iterator[tuple[float, float]]:
    """Operations of the forward's parts, each with its backward's share."""
    d, text, texts, up, layers = config.hidden_size, config.expert("text"), counts.texts, counts.upper, config.fusion_layers
    lower = config.lower_layers("image")
    shares = [*backward.perception, *[Share()] * (len(counts.perception) - len(backward.perception))]
    for stack, share in zip(counts.perception, shares, strict=True):
        yield from _layers(lower, config.expert("image"), stack.perceived, stack.seen, share)
        if config.image_tower.convolution:  # in the two dimensions of images and of sound
            yield 2.0 * SIDE**2 * d * lower * stack.perceived, share.linear
    if config.image_tower.convolution:
        yield 2.0 * SIDE**2 * d * layers * up.perceived, backward.fused_perception.linear
    if config.text_tower.convolution:
        yield 2.0 * SPAN * text.width * config.lower_layers("text") * texts.text_tokens, backward.text.linear
    yield from _layers(config.lower_layers("text"), text, texts.text_tokens, texts.seen, backward.text)
    yield 2.0 * d * counts.values + 2.0 * counts.stems[1], backward.embeddings
    yield 2.0 * config.projection_size * (d * counts.perceiving + text.width * counts.captions), backward.rest
    yield 2.0 * d * text.width * (texts.text_tokens + counts.captions) if text.width != d else 0.0, backward.rest
    yield _pool(config, counts), backward.rest
    if layers:
        after = 2.0 * d * d + 4.0 * d * config.expert("image", fused=True).mlp
        for tokens, read, share in (
            (up.perceived, counts.read_items, backward.fused_perception),
            (up.text_tokens, counts.read_texts, backward.fused_text),
        ):
            yield layers * tokens * 6.0 * d * d + ((layers - 1) * tokens + read) * after, share.linear
        yield layers * 4.0 * d * up.seen, max(backward.fused_perception.attention, backward.fused_text.attention)
    yield _heads(config, counts), backward.rest


def _layers(count: int, shape: ExpertShape, tokens: int, seen: int, share: Share) -> Iterator[tuple[float, float]]:
    """Whole layers of one expert over these tokens and query-key pairs."""
    yield count * tokens * (8.0 * shape.width**2 + 4.0 * shape.width * shape.mlp), share.linear
    yield count * 4.0 * shape.width * seen, share.attention


def _pool(config: MMScaleConfig, counts: Counts) -> float:
    """Attention pooling of the images, which does not read masked copies."""
    if config.image_tower.pooling != "attention":
        return 0.0
    d, mlp, tokens = config.hidden_size, config.expert("image").mlp, counts.items
    return (4.0 * d * d + 4.0 * d) * tokens + counts.perceiving * (2.0 * d * d + 4.0 * d * mlp)


def _heads(config: MMScaleConfig, counts: Counts) -> float:
    """Similarities count those within the micro-batch; those with other ranks are left out."""
    d, wanted = config.hidden_size, counts.wanted
    similarities = 2.0 * config.projection_size * counts.samples**2 * (wanted.contrastive + wanted.matching)
    read = 3 if config.head_pooling == "concat" else 1
    classes = counts.samples * wanted.classify * sum((config.heads or {}).values()) * read
    outputs = counts.words * config.vocab_size + counts.predicted + counts.pooled * wanted.matching + classes
    return similarities + 2.0 * d * outputs
