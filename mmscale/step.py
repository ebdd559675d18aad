"""One optimizer step: the counts, the micro-steps, the sums."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mmscale.config import RunConfig
from mmscale.data.batch import Batch
from mmscale.data.loader import StepBatch
from mmscale.engine import Logs
from mmscale.objectives import Objective
from mmscale.optim import learning_rate
from mmscale.world import World


@dataclass(slots=True)
class StepSums:
    """What a step has summed up on this rank, on the device; K objectives."""

    counts_K: Tensor
    """float64 valid items of each objective over all ranks and micro-steps."""
    sums_K: Tensor
    """float64 loss sums of this rank."""
    logs: dict[str, Tensor] = field(default_factory=dict)
    """float64 (2,) sum and count of each logged quantity of this rank."""
    stop: bool = False
    """Whether any rank was asked to checkpoint and stop."""
    quarantined: int = 0
    """Samples of this step, over all ranks, that did not decode."""

    def add(self, sums_K: Tensor, logs: Logs) -> None:
        """Add a micro-step's sums."""
        self.sums_K += sums_K.double()
        for name, (total, count) in logs.items():
            pair = torch.stack([total.double(), count.double()])
            self.logs[name] = self.logs[name] + pair if name in self.logs else pair

    def reduce(self) -> tuple[list[float], dict[str, float]]:
        """Sum over ranks (all ranks call; a collective and a device sync).

        Returns:
            The mean loss of each objective, and the mean of each logged quantity.
        """
        names = sorted(self.logs)
        flat = torch.cat([self.sums_K, *(self.logs[n] for n in names)])
        dist.all_reduce(flat)
        losses = (flat[: len(self.sums_K)] / self.counts_K.clamp(min=1)).tolist()
        pairs = flat[len(self.sums_K) :].view(-1, 2).tolist()
        return losses, {n: total / count for n, (total, count) in zip(names, pairs, strict=True) if count}


def agree(world: World, objectives: Sequence[Objective], host: Sequence[Batch], bad: int, stop: bool) -> tuple[Tensor, int, bool]:
    """Sum the valid counts, the bad samples and the stop flags of all ranks, in one collective (all ranks call).

    The loss is normalised by the global count of the whole step, so that neither the number of ranks nor accumulation changes it.

    Returns:
        The counts (K,) float64 on the device; bad samples; whether to stop.
    """
    local = [sum(o.count(b) for b in host) for o in objectives] + [float(bad), float(stop)]
    flat = torch.tensor(local, dtype=torch.float64, device=world.device)
    dist.all_reduce(flat)
    bad_all, stop_all = flat[-2:].tolist()
    return flat[:-2], int(bad_all), stop_all > 0


def optimizer_step(engine: Any, config: RunConfig, world: World, objectives: Sequence[Objective], batch: StepBatch, stop: bool) -> StepSums:
    """Take one optimizer step over the micro-batches of this rank (all ranks call).

    Args:
        stop: whether this rank was asked to stop.
    """
    counts_K, quarantined, stop = agree(world, objectives, batch.host, len(batch.quarantined), stop)
    weights_K = torch.tensor([o.weight for o in objectives], dtype=torch.float64, device=world.device)
    factors_K = (weights_K / counts_K.clamp(min=1)).float()
    sums = StepSums(counts_K, torch.zeros_like(counts_K), stop=stop, quarantined=quarantined)
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate(batch.step, config.train.steps, config.optimizer) * group.get("lr_factor", 1.0)
    for index, micro in enumerate(batch.micro):
        seed_micro_step(config.train.seed, batch.step, index, world.rank)
        loss, sums_K, logs = engine(micro, factors_K)
        # DeepSpeed averages gradients over ranks; a loss over a global count needs their sum. The product is also what makes
        # scale_wrt_gas=False hold under ZeRO 0: given the very tensor of its forward, DeepSpeed 0.19.8 divides by the accumulation.
        engine.backward(loss * world.size, scale_wrt_gas=False)
        engine.step()
        sums.add(sums_K, logs)
    return sums


def seed_micro_step(seed: int, step: int, micro: int, rank: int) -> None:
    """Key torch's generators by place instead of history: no generator state has to be saved for an exact resume."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, micro, rank)).generate_state(1, np.uint64)[0] >> np.uint64(1)))
