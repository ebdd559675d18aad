"""SigLIP (Zhai et al. 2023) and SigLIP 2 (Tschannen et al. 2025): no [CLS], attention pooling, a bidirectional text tower.

SigLIP 2 of a fixed resolution has SigLIP's layout; its NaFlex variant, made for images of any aspect ratio, has a linear patch embedding
over (y, x, colour). The image is pooled by attention and not projected: the projection starts as the identity.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mmscale.model.pretrained.clip import encoder_layer, patch, positions
from mmscale.model.pretrained.family import Found, ImageFamily, TextFamily
from mmscale.model.pretrained.shape import ImageShape, TextShape, side, stack
from mmscale.model.pretrained.source import Source


def _text_shape(config: Any) -> TextShape:
    own = getattr(config, "text_config", config)
    return TextShape(
        **stack(own),
        embedding_norm=False,
        projection=own.projection_size,
        positions=own.max_position_embeddings,
        norm="pre",
        captions="bidirectional",
        projection_bias=True,
        padded=True,
    )


def _image_shape(config: Any) -> ImageShape:
    own = getattr(config, "vision_config", config)
    flexible = hasattr(own, "num_patches")
    return ImageShape(
        **stack(own),
        embedding_norm=False,
        projection=own.hidden_size,
        channels=own.num_channels,
        image_size=side(own.patch_size) * int(own.num_patches**0.5) if flexible else side(own.image_size),
        patch_size=side(own.patch_size),
        leading=0,
        pooling="attention",
        aspect=flexible,
    )


def _flexible_patch(source: Source) -> tuple[Tensor, Tensor | None]:
    weight, bias = patch(source)
    size = int((weight.shape[1] // 3) ** 0.5)
    return weight.view(-1, size, size, 3).permute(0, 3, 1, 2).flatten(1), bias


def _no_leading(source: Source) -> None:
    return None


def _text_top(source: Source) -> Found:
    return source.pair("caption_projection.norm", "final_layer_norm") | source.pair("caption_projection.linear", "head")


def _image_top(source: Source) -> Found:
    found = source.pair("image_projection.norm", "post_layernorm")
    if source.find("head.probe") is None:  # a checkpoint saved without its pooling head
        return found
    pool = "image_projection.pool"
    weight, bias = source.take("head.attention.in_proj_weight"), source.take("head.attention.in_proj_bias")
    d = weight.shape[1]
    found |= {f"{pool}.probe": source.take("head.probe")[0], "image_projection.linear.weight": torch.eye(d)}
    found |= {f"{pool}.q.weight": weight[:d], f"{pool}.q.bias": bias[:d], f"{pool}.kv.weight": weight[d:], f"{pool}.kv.bias": bias[d:]}
    for ours, theirs in (("out", "attention.out_proj"), ("norm", "layernorm"), ("up", "mlp.fc1"), ("down", "mlp.fc2")):
        found |= source.pair(f"{pool}.{ours}", f"head.{theirs}")
    return found


SIGLIP_TEXT = TextFamily(
    types=("siglip", "siglip_text_model", "siglip2", "siglip2_text_model"),
    shape=_text_shape,
    words="embeddings.token_embedding.weight",
    positions=positions,
    norm=None,
    layer=encoder_layer,
    top=_text_top,
)
SIGLIP_IMAGE = ImageFamily(
    types=("siglip", "siglip_vision_model"),
    shape=_image_shape,
    patch=patch,
    leading=_no_leading,
    positions=positions,
    layer=encoder_layer,
    top=_image_top,
)
SIGLIP2_IMAGE = replace(SIGLIP_IMAGE, types=("siglip2", "siglip2_vision_model"), patch=_flexible_patch, interpolation="bilinear")
