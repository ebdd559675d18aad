"""Parameter groups and the learning-rate schedule."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from mmscale.config import OptimizerConfig
from shards.errors import ConfigError


def freeze(model: nn.Module, patterns: list[str]) -> list[str]:
    """Stop training the parameters whose name matches a pattern.

    Raises:
        ConfigError: a pattern that is no regular expression, or that matches nothing.
    """
    frozen: list[str] = []
    for pattern in patterns:
        try:
            expression = re.compile(pattern)
        except re.error as e:
            raise ConfigError(f"`optimizer.freeze`: {pattern!r} is not a regular expression: {e}.") from e
        matches = [name for name, _ in model.named_parameters() if expression.search(name)]
        if not matches:
            raise ConfigError(f"`optimizer.freeze`: {pattern!r} matches no parameter. Names look like {_examples(model)}.")
        for name in matches:
            model.get_parameter(name).requires_grad_(False)
        frozen += matches
    return frozen


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Split the trained parameters into those that decay (matrices) and those that do not (vectors, embeddings)."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    for parameter in _trained(model):
        (plain if parameter.ndim < 2 or id(parameter) in embeddings else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [g for g in groups if g["params"]]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Build AdamW (Loshchilov and Hutter 2019) over `parameter_groups`, fused on every device that has the kernel."""
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


def _trained(model: nn.Module) -> Iterator[nn.Parameter]:
    return (p for p in model.parameters() if p.requires_grad)


def _examples(model: nn.Module) -> str:
    names = [name for name, _ in model.named_parameters()]
    return ", ".join(names[:: max(1, len(names) // 3)][:3])
