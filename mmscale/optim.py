"""Parameter groups, the optimizer over them and the learning-rate schedule."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mmscale.config import OptimizerConfig
from mmscale.muon import Muon
from shards.errors import ConfigError

_STACK = re.compile(r"(?:^|\.)(\w+)_layers\.(?:[a-zA-Z_]\w*\.)?(\d+)\.")
_EMBEDDING = re.compile(r"(?:^|\.)(\w+)_embeddings?\.")
_BELOW = {"patch": "image"}
"""The stack above an embedding where it has another name: all perception experts are as deep as that of images."""


def matching(model: nn.Module, patterns: Sequence[str], key: str) -> list[str]:
    """Names of the parameters that match a pattern (re.search).

    Raises:
        ConfigError: a pattern that is no regular expression, or that matches nothing.
    """
    found: list[str] = []
    for pattern in patterns:
        try:
            expression = re.compile(pattern)
        except re.error as e:
            raise ConfigError(f"`{key}`: {pattern!r} is not a regular expression: {e}.") from e
        matches = [name for name, _ in model.named_parameters() if expression.search(name)]
        if not matches:
            raise ConfigError(f"`{key}`: {pattern!r} matches no parameter. Names look like {_examples(model)}.")
        found += matches
    return found


def freeze(model: nn.Module, patterns: list[str]) -> list[str]:
    """Stop training the parameters whose name matches a pattern.

    Raises:
        ConfigError: a pattern that is no regular expression, or that matches nothing.
    """
    frozen = matching(model, patterns, "optimizer.freeze")
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    return frozen


def distances(names: Sequence[str]) -> dict[str, int]:
    """How many layers lie between each parameter and the heads.

    Heads and projections are at 0, the last fusion layer at 1, the last lower layer of every modality just below the fusion layers,
    its embedding one below its first layer: a tower that is deeper than the other reaches further down.
    """
    sizes: dict[str, int] = {}
    for name in names:
        if place := _STACK.search(name):
            sizes[place[1]] = max(sizes.get(place[1], 0), int(place[2]) + 1)
    fused = sizes.get("fusion", 0)
    found = {}
    for name in names:
        place, embedding = _STACK.search(name), _EMBEDDING.search(name)
        if place:
            found[name] = (0 if place[1] == "fusion" else fused) + sizes[place[1]] - int(place[2])
        else:
            found[name] = fused + sizes.get(_BELOW.get(embedding[1], embedding[1]), 0) + 1 if embedding else 0
    return found


def muon_matrices(model: nn.Module) -> list[str]:
    """Names of the trained weights that Muon is for: those of the linear maps inside layers (no embedding, head or convolution)."""
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    return [name for name, p in model.named_parameters() if p.requires_grad and id(p) in linear and _STACK.search(name)]


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Split the trained parameters into those that decay (matrices) and those that do not (vectors, embeddings), and by learning rate.

    With `optimizer.name=muon` the matrices of the layers have groups of their own, marked `muon`.

    A group's `lr_factor`, 1 where it is absent, is layer_decay to the power of the layers up to the heads (Clark et al. 2020,
    ELECTRA, appendix A; Bao et al. 2022, BEiT, appendix H), and head_lr_ratio for heads.
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    below = distances([name for name, _ in model.named_parameters()])
    matrices = set(muon_matrices(model)) if config.name == "muon" else set()
    groups: dict[tuple[float, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factor = config.layer_decay ** below[name] * (1.0 if below[name] else config.head_lr_ratio)
            plain = parameter.ndim < 2 or id(parameter) in embeddings
            groups.setdefault((factor, plain, name in matrices), []).append(parameter)
    found = []
    for (factor, plain, muon), parameters in sorted(groups.items(), key=lambda item: (-item[0][0], *item[0][1:])):
        group: dict[str, Any] = {"params": parameters, "weight_decay": 0.0 if plain else config.weight_decay}
        group |= {"muon": True} if muon else {}
        found.append(group if factor == 1.0 else group | {"lr_factor": factor})
    return found


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Build AdamW (Loshchilov and Hutter 2019), fused on every device that has the kernel, or Muon over `parameter_groups`."""
    if config.name == "muon":
        return Muon(parameter_groups(model, config), lr=config.lr, betas=config.betas, eps=config.eps, momentum=config.momentum)
    return torch.optim.AdamW(parameter_groups(model, config), lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Compute the rate of a step: linear warm-up, then a cosine down to `min_lr_ratio` (Loshchilov and Hutter 2017, eq. 5).

    A pure function of the step, so that a resumed run has no schedule to restore.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    floor = config.min_lr_ratio
    return config.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def _examples(model: nn.Module) -> str:
    names = [name for name, _ in model.named_parameters()]
    return ", ".join(names[:: max(1, len(names) // 3)][:3])
