"""What a configuration will need, from its numbers alone: parameters, checkpoint bytes, model state a rank. No torch, nothing is built.

These are for decisions before anything is started; a run works out its own needs from the model itself before step 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mmscale.config import RunConfig
from mmscale.modalities.modality import build_modalities, experts_of

VOCABULARY = 30_522
"""Entries of the tokenizer where it is not known: BERT's."""
SAVED_BYTES = 12
"""A parameter in a checkpoint: fp32 master, first and second moment (docs/checkpoints.md)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """Numbers of a run."""

    parameters: int
    checkpoint_bytes: int
    state_bytes: int
    """Of weights, gradients and optimizer on a rank; activations come on top."""


def estimate(config: RunConfig, ranks: int, *, bf16: bool, vocabulary: int = VOCABULARY) -> Estimate:
    """Estimate a run.

    Model state follows Rajbhandari et al. 2020 (ZeRO), section 3.1: K = 12 bytes of AdamW a parameter, shared out from stage 1 on,
    gradients from stage 2 on, weights from stage 3 on.

    Args:
        config: the stage.
        ranks: how many there will be.
        bf16: weights and gradients are in bf16, beside fp32 masters.
        vocabulary: entries of the tokenizer.
    """
    count = parameters(config, vocabulary)
    stage, width = config.zero.stage, 2 if bf16 else 4
    adam = 12 if bf16 else 8  # in fp32 the weights are their own masters
    average = 4 if config.train.ema_decay is not None else 0
    shares = [1 if stage < 3 else ranks, 1 if stage < 2 else ranks, 1 if stage < 1 else ranks]
    state = count * (width / shares[0] + width / shares[1] + (adam + average) / shares[2])
    return Estimate(parameters=count, checkpoint_bytes=count * (SAVED_BYTES + average), state_bytes=int(state))


def parameters(config: RunConfig, vocabulary: int = VOCABULARY) -> int:
    """Parameters of the multiway Transformer: an expert for text and those of perception in every layer, embeddings, heads.

    Within a few per cent: norms and biases are counted by their width, small heads are left out.
    """
    model = config.model
    d, hidden, layers = model.hidden_size, int(model.hidden_size * model.mlp_ratio), model.unimodal_layers + model.fusion_layers
    attention = 4 * d * d + 4 * d
    feed_forward = 2 * d * hidden + hidden + d
    patch = 3 * model.patch_size**2
    modalities = build_modalities(model)
    others = [modality for name, modality in modalities.items() if name != "image"]
    places = (model.image_size // model.patch_size) ** 2 + model.max_text_tokens + sum(math.prod(m.grid) for m in others)
    values = patch + sum(m.values for m in others)
    embeddings = vocabulary * d + (places if model.positions == "learned" else 0) * d + values * d
    objectives = config.objectives
    words = sum(objective.weight > 0 for objective in (objectives.captioning, objectives.masked_language))
    heads = 2 * d * model.projection_size + words * (vocabulary * d + d * d) + (objectives.masked_image.weight > 0) * d * values
    experts = 1 + len(experts_of(modalities))
    return layers * experts * (attention + feed_forward + 4 * d) + embeddings + heads
