"""The state of a run as pieces: which range of which tensor this rank holds, whatever the ZeRO stage and the number of ranks.

Kinds of tensors: `master` (fp32 weights that are trained), the optimizer's own names for its moments (`exp_avg`, `exp_avg_sq`,
`momentum_buffer`), `average` (the moving average), `frozen` (weights that are not trained) and `buffer`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmscale.ema import MovingAverage
from mmscale.errors import CheckpointError
from mmscale.weights import Fragment, inner_optimizer, trained_fragments

MASTER, AVERAGE, FROZEN, BUFFER = "master", "average", "frozen", "buffer"
NOT_MOMENTS = frozenset({MASTER, AVERAGE, FROZEN, BUFFER})


@dataclass(frozen=True, slots=True)
class Piece:
    """A range of one tensor, as it lives on this rank."""

    kind: str
    """What the tensor is, one of the kinds above."""
    name: str
    """The parameter or buffer that it belongs to, by its name in the model."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    start: int
    """Offset of the range in the flattened tensor."""
    values: Tensor
    """The range, flat: a view, to be read from and written to."""
    replicated: bool
    """Whether every rank holds this same range."""

    def share(self, rank: int, ranks: int) -> Piece:
        """Cut out what this rank has to write: of a replicated piece the ranks write equal shares."""
        if not self.replicated:
            return self
        size = self.values.numel()
        low, high = size * rank // ranks, size * (rank + 1) // ranks
        return Piece(self.kind, self.name, self.shape, self.start + low, self.values[low:high], False)


@dataclass(frozen=True, slots=True)
class LiveState:
    """Everything that a step changes on this rank."""

    pieces: list[Piece]
    scalars: dict[str, float]
    """What the optimizer counts for all parameters alike (`step`), and the steps averaged (`average_updates`)."""


def live_state(engine: Any, model: nn.Module, average: MovingAverage | None) -> LiveState:
    """List this rank's pieces of the run's state.

    Raises:
        CheckpointError: the optimizer counts otherwise for one parameter than for another.
    """
    fragments = [f for f in trained_fragments(engine, model) if f.master.numel()]
    pieces = [_trained(MASTER, f, f.master) for f in fragments]
    optimizer = inner_optimizer(engine)
    scalars: dict[str, float] = {}
    for fragment in fragments:
        assert fragment.stepped is not None
        for key, value in optimizer.state.get(fragment.stepped, {}).items():
            if torch.is_tensor(value) and value.ndim and value.numel() == fragment.stepped.numel():
                moment = value.detach().flatten().narrow(0, fragment.offset, fragment.master.numel())
                pieces.append(_trained(key, fragment, moment))
            elif scalars.setdefault(key, float(value)) != float(value):
                raise CheckpointError(
                    f"The optimizer's {key} is {float(value)} for {fragment.name} and {scalars[key]} for another parameter."
                )
    if average is not None:
        pieces += [_trained(AVERAGE, f, average.averages[f.name]) for f in fragments]
        scalars["average_updates"] = float(average.updates)
    return LiveState(pieces + _frozen(model) + _buffers(model), scalars)


def create_moments(engine: Any, model: nn.Module, kinds: dict[str, set[str]], scalars: dict[str, float]) -> None:
    """Give the optimizer the state that its first step would create, so that there is something to load into.

    Args:
        engine: the DeepSpeed engine.
        model: whose parameters it trains.
        kinds: names of the parameters that have each kind of moment.
        scalars: what the optimizer counts.
    """
    optimizer = inner_optimizer(engine)
    settings = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for fragment in trained_fragments(engine, model):
        flat = fragment.stepped
        if flat is None:
            continue
        group = settings.get(id(flat), optimizer.defaults)  # ZeRO 3 takes its flat tensors out of the groups between steps
        on_device = bool(group.get("fused") or group.get("capturable"))  # where torch's optimizers keep their step counts
        state = optimizer.state[flat]
        for kind in sorted(kinds):  # files are written in this order
            if fragment.name in kinds[kind]:
                state.setdefault(kind, torch.zeros_like(flat, requires_grad=False))
        for key, value in ({} if group.get("muon") else scalars).items():  # Muon counts nothing
            state[key] = torch.tensor(value, dtype=torch.float32, device=flat.device if on_device else "cpu")


def refresh_weights(engine: Any, model: nn.Module) -> None:
    """Make the weights that the model computes with follow the fp32 masters (all ranks call)."""
    optimizer = engine.optimizer
    with torch.no_grad():
        if hasattr(optimizer, "fp16_partitioned_groups_flat"):  # ZeRO 3
            for group in range(len(optimizer.fp16_partitioned_groups_flat)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
        elif hasattr(optimizer, "update_lp_params"):  # ZeRO 1 and 2, bf16 with fp32 gradients
            optimizer.update_lp_params()
        else:
            for fragment in trained_fragments(engine, model):
                fragment.parameter.copy_(fragment.master.view(fragment.shape))


def _trained(kind: str, fragment: Fragment, values: Tensor) -> Piece:
    return Piece(kind, fragment.name, tuple(fragment.shape), fragment.start, values, not fragment.sharded)


def _frozen(model: nn.Module) -> list[Piece]:
    return [_frozen_piece(name, p) for name, p in model.named_parameters() if not p.requires_grad]


def _frozen_piece(name: str, parameter: nn.Parameter) -> Piece:
    if not hasattr(parameter, "ds_id"):
        return Piece(FROZEN, name, tuple(parameter.shape), 0, parameter.detach().view(-1), True)
    local = parameter.ds_tensor  # type: ignore[attr-defined]
    start = local.numel() * dist.get_rank()
    kept = max(0, min(local.numel(), _sharded_size(parameter) - start))
    return Piece(FROZEN, name, tuple(parameter.ds_shape), start, local.detach().narrow(0, 0, kept), False)  # type: ignore[attr-defined]


def _sharded_size(parameter: nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", 0))


def _buffers(model: nn.Module) -> list[Piece]:
    return [Piece(BUFFER, name, tuple(b.shape), 0, b.detach().view(-1), True) for name, b in model.named_buffers()]
