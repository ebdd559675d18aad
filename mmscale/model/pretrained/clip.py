"""CLIP (Radford et al. 2021): a causal text tower read at its end token, an image tower with a norm before its first layer.

Its temperature belongs to another loss than the sigmoid's and is left.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmscale.model.pretrained.family import Found, ImageFamily, TextFamily
from mmscale.model.pretrained.shape import ImageShape, TextShape, side, stack
from mmscale.model.pretrained.source import Source


def _text_shape(config: Any) -> TextShape:
    own = getattr(config, "text_config", config)
    return TextShape(
        **stack(own),
        embedding_norm=False,
        projection=config.projection_dim,
        positions=own.max_position_embeddings,
        norm="pre",
        captions="causal",
    )


def _image_shape(config: Any) -> ImageShape:
    own = getattr(config, "vision_config", config)
    return ImageShape(
        **stack(own),
        embedding_norm=True,
        projection=config.projection_dim,
        channels=own.num_channels,
        image_size=side(own.image_size),
        patch_size=side(own.patch_size),
        leading=1,
        pooling="cls",
    )


def positions(source: Source) -> Tensor:
    """The position table of CLIP's and SigLIP's towers."""
    return source.take("embeddings.position_embedding.weight")


def patch(source: Source) -> tuple[Tensor, Tensor | None]:
    """The patch convolution; CLIP's has no bias."""
    return source.take("embeddings.patch_embedding.weight").flatten(1), source.find("embeddings.patch_embedding.bias")


def _leading(source: Source) -> Tensor:
    return source.take("embeddings.class_embedding")[None]


def encoder_layer(source: Source, layer: int, place: str) -> Found:
    """A layer of CLIP's and SigLIP's towers."""
    base = f"encoder.layers.{layer}"
    found = source.joined(f"{place}.qkv", *((f"{base}.self_attn.{part}_proj",) for part in ("q", "k", "v")))
    for ours, theirs in (
        ("attention_norm", "layer_norm1"),
        ("out", "self_attn.out_proj"),
        ("mlp_norm", "layer_norm2"),
        ("up", "mlp.fc1"),
        ("down", "mlp.fc2"),
    ):
        found |= source.pair(f"{place}.{ours}", f"{base}.{theirs}")
    return found


def _projection(source: Source, ours: str, theirs: str) -> Found:
    weight = source.find(theirs)
    return {} if weight is None else {ours: weight}


def _text_top(source: Source) -> Found:
    norm = source.pair("caption_projection.norm", "final_layer_norm")
    return norm | _projection(source, "caption_projection.linear.weight", "text_projection.weight")


def _image_top(source: Source) -> Found:
    norm = source.pair("image_projection.norm", "post_layernorm")
    return norm | _projection(source, "image_projection.linear.weight", "visual_projection.weight")


CLIP_TEXT = TextFamily(
    types=("clip", "clip_text_model"),
    shape=_text_shape,
    words="embeddings.token_embedding.weight",
    positions=positions,
    norm=None,
    layer=encoder_layer,
    top=_text_top,
)
CLIP_IMAGE = ImageFamily(
    types=("clip", "clip_vision_model"),
    shape=_image_shape,
    patch=patch,
    leading=_leading,
    positions=positions,
    layer=encoder_layer,
    norm="pre_layrnorm",  # as transformers spells it
    top=_image_top,
)
