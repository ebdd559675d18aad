"""The fp32 weights behind a ZeRO engine: each rank's fragments, and the whole of one parameter at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Fragment:
    """This rank's part of one trained parameter."""

    name: str
    """Name in the model."""
    parameter: nn.Parameter
    """The parameter; its own data may be low precision, or absent under ZeRO 3."""
    start: int
    """Offset of the part in the flattened parameter."""
    master: Tensor
    """fp32 values of the part (a view: it follows the optimizer), flat; empty where this rank holds nothing."""
    sharded: bool
    """Whether other ranks hold the rest."""


def trained_fragments(engine: Any, model: nn.Module) -> list[Fragment]:
    """List this rank's fp32 fragments of all trained parameters, for any ZeRO stage."""
    masters = _unsharded_masters(engine)
    return [_fragment(name, p, masters) for name, p in model.named_parameters() if p.requires_grad]


def whole_parameters(engine: Any, model: nn.Module, values: Callable[[Fragment], Tensor] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and full fp32 value of each parameter, one at a time, then each buffer (all ranks call).

    Args:
        values: what to assemble instead of a fragment's master values, such as its moving average.
    """
    fragments = {f.name: f for f in trained_fragments(engine, model)}
    for name, parameter in model.named_parameters():
        fragment = fragments.get(name)
        if fragment is None:
            yield name, _gather_frozen(parameter)
        else:
            yield name, assemble(fragment, values(fragment) if values else fragment.master)
    for name, buffer in model.named_buffers():
        yield name, buffer.detach().cpu()


def assemble(fragment: Fragment, local: Tensor) -> Tensor:
    """Put the parts of one parameter together (all ranks call when it is sharded)."""
    shape = getattr(fragment.parameter, "ds_shape", fragment.parameter.shape)
    if not fragment.sharded:
        return local.detach().reshape(shape).cpu()
    # of the parameter's device, which the collective is for: with an offloaded optimizer the part itself lies in the host's memory
    whole = torch.zeros(shape.numel(), dtype=torch.float32, device=fragment.parameter.device)
    whole[fragment.start : fragment.start + local.numel()] = local
    dist.all_reduce(whole)
    return whole.reshape(shape).cpu()


def _fragment(name: str, parameter: nn.Parameter, masters: dict[int, Tensor]) -> Fragment:
    if hasattr(parameter, "ds_id"):  # ZeRO 3
        local = parameter._z3_optimizer.get_local_fp32_param(parameter)  # type: ignore[attr-defined]
        start = local.numel() * dist.get_rank()
        kept = max(0, min(local.numel(), parameter.ds_numel - start))  # type: ignore[attr-defined]  # the last part is padded
        return Fragment(name, parameter, start, local.detach()[:kept], True)
    if hasattr(parameter, "_hp_mapping"):  # ZeRO 1 and 2
        mapping = parameter._hp_mapping
        if mapping is None:
            return Fragment(name, parameter, 0, torch.empty(0, device=parameter.device), True)
        return Fragment(name, parameter, mapping.lp_fragment_address.start, mapping.get_hp_fragment().detach().flatten(), True)
    return Fragment(name, parameter, 0, masters.get(id(parameter), parameter).detach().flatten(), False)


def _unsharded_masters(engine: Any) -> dict[int, Tensor]:
    """Map low-precision parameters to their fp32 masters where ZeRO is off and DeepSpeed's half-precision wrapper holds them."""
    low, full = getattr(engine.optimizer, "fp16_groups", None), getattr(engine.optimizer, "fp32_groups", None)
    if engine.zero_optimization_stage() > 0 or not low or not full:
        return {}
    return {id(p): m for ps, ms in zip(low, full, strict=True) for p, m in zip(ps, ms, strict=True)}


def _gather_frozen(parameter: nn.Parameter) -> Tensor:
    if not hasattr(parameter, "ds_id"):
        return parameter.detach().float().cpu()
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().float().cpu().clone()
