"""ViT (Dosovitskiy et al. 2021) and DeiT (Touvron et al. 2021), whose distillation token is a second leading token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmscale.model.pretrained.family import Found, ImageFamily
from mmscale.model.pretrained.shape import ImageShape, side, stack
from mmscale.model.pretrained.source import Source


def _shape(config: Any) -> ImageShape:
    return ImageShape(
        **stack(config),
        embedding_norm=False,
        projection=None,
        channels=config.num_channels,
        image_size=side(config.image_size),
        patch_size=side(config.patch_size),
        leading=2 if config.model_type == "deit" else 1,
        pooling="cls",
    )


def _patch(source: Source) -> tuple[Tensor, Tensor | None]:
    base = "embeddings.patch_embeddings.projection"
    return source.take(f"{base}.weight").flatten(1), source.take(f"{base}.bias")


def _cls(source: Source) -> Tensor:
    return source.take("embeddings.cls_token")[0]


def _cls_and_distillation(source: Source) -> Tensor:
    return torch.cat([_cls(source), source.take("embeddings.distillation_token")[0]])


def _positions(source: Source) -> Tensor:
    return source.take("embeddings.position_embeddings")[0]


def _layer(source: Source, layer: int, place: str) -> Found:
    bases = (f"layers.{layer}", f"encoder.layer.{layer}")
    parts = [("attention.q_proj", "attention.attention.query"), ("attention.k_proj", "attention.attention.key")]
    parts += [("attention.v_proj", "attention.attention.value")]
    found = source.joined(f"{place}.qkv", *(tuple(f"{b}.{n}" for b in bases for n in names) for names in parts))
    for ours, theirs in (
        ("attention_norm", ("layernorm_before",)),
        ("out", ("attention.o_proj", "attention.output.dense")),
        ("mlp_norm", ("layernorm_after",)),
        ("up", ("mlp.fc1", "intermediate.dense")),
        ("down", ("mlp.fc2", "output.dense")),
    ):
        found |= source.pair(f"{place}.{ours}", *(f"{b}.{n}" for b in bases for n in theirs))
    return found


def _top(source: Source) -> Found:
    return source.pair("image_projection.norm", "layernorm")


VIT = ImageFamily(types=("vit",), shape=_shape, patch=_patch, leading=_cls, positions=_positions, layer=_layer, top=_top)
DEIT = ImageFamily(types=("deit",), shape=_shape, patch=_patch, leading=_cls_and_distillation, positions=_positions, layer=_layer, top=_top)
