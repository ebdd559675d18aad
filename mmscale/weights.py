"""The fp32 weights behind a ZeRO engine: each rank's fragments, and where the optimizer keeps them."""

from __future__ import annotations

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
    stepped: Tensor | None
    """The tensor that the optimizer steps, of which the part is a slice; None where this rank holds nothing."""
    offset: int
    """Offset of the part in `stepped`, flattened."""

    @property
    def shape(self) -> torch.Size:
        """Shape of the whole parameter."""
        return torch.Size(getattr(self.parameter, "ds_shape", self.parameter.shape))


def trained_fragments(engine: Any, model: nn.Module) -> list[Fragment]:
    """List this rank's fp32 fragments of all trained parameters, for any ZeRO stage."""
    masters = _unsharded_masters(engine)
    return [_fragment(name, p, masters, engine.optimizer) for name, p in model.named_parameters() if p.requires_grad]


def inner_optimizer(engine: Any) -> torch.optim.Optimizer:
    """Find the torch optimizer that DeepSpeed's wrapper, where there is one, steps."""
    optimizer: torch.optim.Optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return optimizer


def _fragment(name: str, parameter: nn.Parameter, masters: dict[int, Tensor], optimizer: Any) -> Fragment:
    if hasattr(parameter, "ds_id"):  # ZeRO 3
        group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        flat = optimizer.fp32_partitioned_groups_flat[group]
        start = size * dist.get_rank()
        kept = max(0, min(size, parameter.ds_numel - start))  # type: ignore[attr-defined]  # the last part is padded
        return Fragment(name, parameter, start, flat.detach().narrow(0, offset, kept), True, flat, offset)
    if hasattr(parameter, "_hp_mapping"):  # ZeRO 1 and 2
        mapping = parameter._hp_mapping
        if mapping is None:
            return Fragment(name, parameter, 0, torch.empty(0, device=parameter.device), True, None, 0)
        flat = _partitions(optimizer)[mapping.param_group_index]
        master = mapping.get_hp_fragment().detach().flatten()
        return Fragment(name, parameter, mapping.lp_fragment_address.start, master, True, flat, mapping.hp_fragment_address.start)
    whole = masters.get(id(parameter), parameter)
    return Fragment(name, parameter, 0, whole.detach().view(-1), False, whole, 0)


def _partitions(optimizer: Any) -> list[Tensor]:
    """This rank's flat fp32 partition of each parameter group, under the name that ZeRO 1 and 2 or the bf16 optimizer has for it."""
    flats: list[Tensor] = getattr(optimizer, "single_partition_of_fp32_groups", None) or optimizer.fp32_groups_flat_partition
    return flats


def _unsharded_masters(engine: Any) -> dict[int, Tensor]:
    """Map low-precision parameters to their fp32 masters where ZeRO is off and DeepSpeed's half-precision wrapper holds them."""
    low, full = getattr(engine.optimizer, "fp16_groups", None), getattr(engine.optimizer, "fp32_groups", None)
    if engine.zero_optimization_stage() > 0 or not low or not full:
        return {}
    return {id(p): m for ps, ms in zip(low, full, strict=True) for p, m in zip(ps, ms, strict=True)}
