"""Initialisation of a module's own parameters. transformers calls it for the modules that no checkpoint fills."""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import initialization

from mmscale.model.block import ResidualLinear
from mmscale.model.configuration import MMScaleConfig
from mmscale.model.convolution import Convolution
from mmscale.model.embeddings import ImageEmbedding, Table
from mmscale.model.heads import AttentionPool, ContrastiveScale, LanguageHead, OutputLinear
from mmscale.model.patch_embedding import PatchEmbedding

IMAGE_TABLE_STD = 0.5
"""Of image positions, [CLS] and mask token: patches of pixels in [-1, 1] come out of their embedding with a root mean square of up to 1."""


@torch.no_grad()
def initialize_module(module: nn.Module, config: MMScaleConfig) -> None:
    """Fill a module's parameters: truncated normal matrices, zero biases, unit norms.

    A layer's weights have the standard deviation 1 / sqrt(inputs) (LeCun et al. 1998, section 4.6), so that a narrow model starts with
    activations as large as a wide one: with BERT's 0.02 for every width, one of width 128 needs several times as many samples. Layers that
    write into the residual stream are scaled by 1 / sqrt(2 x layers) (Radford et al. 2019, section 2.3), with unimodal_layers +
    fusion_layers as the layers also where a tower has another number of its own. Tables of text, which a norm
    follows, take `text.table_std`, the last layers of heads `initializer_range`; what is added to patches is about as large as they are.
    """
    std = config.initializer_range
    if isinstance(module, nn.Linear):
        depth = 2 * max(1, config.unimodal_layers + config.fusion_layers) if isinstance(module, ResidualLinear) else 1
        _truncated(module.weight, std if isinstance(module, OutputLinear) else 1 / math.sqrt(depth * module.in_features))
        if module.bias is not None:
            initialization.zeros_(module.bias)
    elif isinstance(module, Table):
        _truncated(module.weight, module.std)
    elif isinstance(module, nn.LayerNorm):
        initialization.ones_(module.weight)
        initialization.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        _truncated(module.weight, 1 / math.sqrt(module.weight[0].numel()))
        if module.bias is not None:
            initialization.zeros_(module.bias)
    elif isinstance(module, nn.GroupNorm):
        initialization.ones_(module.weight)
        initialization.zeros_(module.bias)
    elif isinstance(module, nn.RMSNorm):
        initialization.ones_(module.weight)
    elif isinstance(module, (ImageEmbedding, PatchEmbedding)):
        _truncated(module.patch_weight, 1 / math.sqrt(module.patch_weight.shape[1]))
        for weight in (module.cls_token, module.mask_token, module.positions):
            if weight is not None:
                _truncated(weight, IMAGE_TABLE_STD)
        initialization.zeros_(module.patch_bias)
    elif isinstance(module, Convolution):  # the sides of a patch or word must differ from the start, or it takes long until they do
        taps = module.weight.shape[-1] ** min(2, module.weight.ndim - 2)
        _truncated(module.weight, 1 / math.sqrt(3 * taps))
    elif isinstance(module, AttentionPool):
        _truncated(module.probe, 1 / math.sqrt(module.probe.shape[1]))
    elif isinstance(module, LanguageHead):
        _truncated(module.weight, std)
        initialization.zeros_(module.bias)
    elif isinstance(module, ContrastiveScale):
        initialization.constant_(module.log_scale, math.log(10.0) / module.GAIN)
        initialization.constant_(module.bias, -math.log(config.contrastive_candidates) / module.GAIN)


def _truncated(weight: torch.Tensor, std: float) -> None:
    initialization.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
