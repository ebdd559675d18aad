"""Batches of noise with ragged texts, for benchmarks that measure a step and not the data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from mmscale.config import RunConfig, load_run_config
from mmscale.data.batch import IGNORE, Batch, TextStream
from mmscale.model import MMScaleConfig, mmscale_config

VOCABULARY = 30522
SPECIAL = {"pad": 0, "begin": 1, "end": 2, "mask": 3}
PEERS = [
    *("model.hidden_size=192", "model.num_heads=6", "model.unimodal_layers=4", "model.fusion_layers=2"),
    *("model.image_size=64", "model.patch_size=8", "model.max_text_tokens=24"),
    *("objectives.contrastive.weight=1", "objectives.matching.weight=1", "objectives.masked_language.weight=1"),
    *("objectives.masked_image.weight=1", "objectives.captioning.weight=0"),
]
"""Model and objectives that are compared with FLAVA's."""
STAGE = """
run: unused
data: {shards: unused, max_text_tokens: 24}
train: {steps: 1000}
"""


def stage_config(place: Path, words: Sequence[str]) -> RunConfig:
    """A stage of these words, without data."""
    path = place / "synthetic.yaml"
    path.write_text(STAGE)
    return load_run_config(path, list(words))


def model_config(config: RunConfig, vocabulary: int = VOCABULARY) -> MMScaleConfig:
    """The shape that a stage's `model` section gives."""
    return mmscale_config(config.model, vocabulary, SPECIAL, candidates=config.train.global_batch)


def synthetic_batch(shape: MMScaleConfig, samples: int, seed: int, *, longest: int, masked: float = 0.15, hidden: float = 0.5) -> Batch:
    """Pairs of an image and a text of 4 to `longest` tokens, in both streams.

    Args:
        shape: of the model.
        samples: pairs.
        seed: of everything.
        longest: tokens of a text at most, those of its begin and end included.
        masked: part of the tokens that masks hide in the bidirectional stream.
        hidden: part of the patches that are hidden.
    """
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, longest + 1, (samples,), generator=g)
    ids = torch.randint(4, shape.vocab_size, (int(lengths.sum()),), generator=g)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    ids[offsets[:-1]], ids[offsets[1:] - 1] = SPECIAL["begin"], SPECIAL["end"]
    following = torch.cat([ids[1:], ids[:1]])
    following[offsets[1:] - 1] = IGNORE
    inside = torch.ones_like(ids, dtype=torch.bool)
    inside[offsets[:-1]] = inside[offsets[1:] - 1] = False
    chosen = inside & (torch.rand(len(ids), generator=g) < masked)
    rows, fuse = torch.arange(samples), torch.ones(samples, dtype=torch.bool)
    cut = offsets.int()
    side = shape.image_size
    return Batch(
        positions_M=torch.arange(samples),
        weights_M=torch.ones(samples),
        keys=[str(i) for i in range(samples)],
        pixels_NCHW=torch.randint(0, 256, (samples, 3, side, side), dtype=torch.uint8, generator=g),
        image_rows_N=torch.arange(samples),
        patch_mask_NP=torch.rand(samples, shape.patches, generator=g) < hidden,
        caption=TextStream(ids, cut, rows, following, fuse),
        text=TextStream(
            torch.where(chosen, SPECIAL["mask"], ids), cut.clone(), rows.clone(), torch.where(chosen, ids, IGNORE), fuse.clone()
        ),
        gumbel_MG=-torch.empty(samples, samples).exponential_(generator=g).log(),
    )
