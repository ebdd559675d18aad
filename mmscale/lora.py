"""Low-rank adapters by peft: put into the model's linear layers for training, merged into them in what a checkpoint shows to others.

Source: Hu et al. 2022 (LoRA), section 4.1.
"""

from __future__ import annotations

import re
from importlib.util import find_spec

from torch import Tensor, nn

from mmscale.config import LoraConfig
from mmscale.optim import matching
from shards.errors import ConfigError

TASK_HEADS = "task_heads."
_BASE, _DOWN, _UP = ".base_layer.", ".lora_A.", ".lora_B."
"""What peft puts into the names of a layer with an adapter."""


def add_adapters(model: nn.Module, config: LoraConfig) -> str:
    """Put adapters into a model, in place, and freeze everything else but the task heads and what `lora.train` names.

    A new adapter adds zero. peft replaces the modules themselves and not the model around them, whose forward takes packed batches.

    Returns:
        What was done, for people.

    Raises:
        ConfigError: peft is not installed, or `lora.targets` matches nothing, or what is no linear layer.
    """
    if find_spec("peft") is None:
        raise ConfigError("`lora.rank` needs the package peft. Install it: pip install 'mmscale[lora]'.")
    import peft

    _check_targets(model, config.targets)
    trained = matching(model, config.train, "lora.train") + [name for name, _ in model.named_parameters() if name.startswith(TASK_HEADS)]
    kept = {id(model.get_parameter(name)) for name in trained}
    adapters = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=config.targets)
    peft.inject_adapter_in_model(adapters, model)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad or id(parameter) in kept)
    added = [p for name, p in model.named_parameters() if ".lora_" in name]
    return f"lora        rank {config.rank} in {len(added) // 2} layers, {sum(p.numel() for p in added):,} parameters"


def _check_targets(model: nn.Module, targets: str) -> None:
    """Only a linear layer's adapter can be merged; peft would also adapt tables and convolutions."""
    try:
        expression = re.compile(targets)
    except re.error as e:
        raise ConfigError(f"`lora.targets`: {targets!r} is not a regular expression: {e}.") from e
    found = {name: module for name, module in model.named_modules() if expression.fullmatch(name)}
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    other = [name for name, module in found.items() if not isinstance(module, nn.Linear)]
    if other or not found:
        what = f"matches {other[0]}, which is no linear layer" if other else "names no linear layers of the model"
        raise ConfigError(f"`lora.targets`: {targets!r} {what}. It is matched with whole names, such as {linear[0]}.")


def merged_name(name: str) -> str | None:
    """Return what a tensor of a model with adapters is called in the plain model; None for the adapters' own."""
    return None if _DOWN in name or _UP in name else name.replace(_BASE, ".")


def adapter_of(name: str) -> tuple[str, str] | None:
    """Return the names of the adapter's two matrices, A and B, of a linear layer's own weight; None for any other tensor."""
    stem = name.removesuffix(f"{_BASE}weight")
    return None if stem == name else (f"{stem}{_DOWN}default.weight", f"{stem}{_UP}default.weight")


def merged(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """Compute W + scale B A in fp32; scale is alpha / rank."""
    return weight.float() + (up.float() @ down.float()) * scale
