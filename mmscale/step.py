"""One optimizer step: the counts, the micro-steps, the sums."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mmscale.data.batch import Batch
from mmscale.data.loader import StepBatch
from mmscale.engine import Logs
from mmscale.late import Late
from mmscale.objectives import Objective, feature_cache
from mmscale.optim import learning_rate
from mmscale.own_time import OwnTime, measured
from mmscale.world import World

if TYPE_CHECKING:
    from mmscale.assemble import Run


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
    skipped: Tensor = field(default_factory=lambda: torch.zeros(()))
    """fp32 scalar, the same on all ranks: 1 if the step was dropped because a loss or the gradient norm was not finite."""
    passed_over: bool = False
    """Whether it was not trained on at all, since the run was rolled back because of it."""
    micro: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Of each micro-step of this rank: loss sums (K,), and 0, or not a number if its gradient was not finite."""

    own: OwnTime = field(default_factory=OwnTime)
    """What forward and backward took this rank, without waiting for others."""

    def add(self, sums_K: Tensor, gradient: Tensor, logs: Logs) -> None:
        """Add a micro-step's sums."""
        self.sums_K += sums_K.double()
        self.micro.append((sums_K, gradient))
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


def agree(world: World, objectives: Sequence[Objective], host: Sequence[Batch], bad: int, stop: bool) -> tuple[Tensor, Late]:
    """Sum the valid counts, the bad samples and the stop flags of all ranks, in one collective (all ranks call).

    The loss is normalised by the global count of the whole step, so that neither the number of ranks nor accumulation changes it.

    Returns:
        The counts (K,) float64 on the device; the bad samples, and how many ranks want to stop, for the host when it asks.
    """
    local = [sum(o.count(b) for b in host) for o in objectives] + [float(bad), float(stop)]
    flat = to_device(local, world.device)
    dist.all_reduce(flat)
    return flat[:-2], Late(flat[-2:])


def to_device(numbers: Sequence[float], device: torch.device) -> Tensor:
    """Numbers as float64 on a device, without waiting for it."""
    return torch.tensor(numbers, dtype=torch.float64).to(device, non_blocking=True)


def optimizer_step(run: Run, batch: StepBatch, stop: bool) -> StepSums:
    """Take one optimizer step over the micro-batches of this rank (all ranks call).

    A step whose loss or gradient norm is not finite on any rank leaves weights, optimizer and gradients of all ranks as they were.

    Args:
        run: what is trained.
        batch: this rank's part of the step.
        stop: whether this rank was asked to stop.
    """
    train, world, objectives = run.config.train, run.world, run.objectives
    counts_K, agreed = agree(world, objectives, batch.host, len(batch.quarantined), stop)
    weights_K = to_device([o.weight for o in objectives], world.device)
    factors_K = (weights_K / counts_K.clamp(min=1)).float()
    sums = StepSums(counts_K, torch.zeros_like(counts_K))
    for group in run.engine.optimizer.param_groups:
        group["lr"] = learning_rate(batch.step, train.steps, run.config.optimizer) * group.get("lr_factor", 1.0)
    for index, (micro, objectives) in enumerate(zip(batch.micro, with_global_negatives(run, batch), strict=True)):
        seed_micro_step(train.seed, batch.step, index, world.rank)
        with measured(sums.own, world.device) as over:
            loss, sums_K, logs = run.engine(micro, factors_K, objectives)
            gradient = run.gate.backward(loss, world.size)
            over += run.gate.arrived
        run.gate.step()
        sums.add(sums_K, gradient, logs)
    sums.skipped = run.gate.skipped()
    quarantined, stopping = agreed.get().tolist()  # by now the device has this whole step to do, and the wait costs it nothing
    sums.quarantined, sums.stop = int(quarantined), stopping > 0
    return sums


def pass_over(run: Run, batch: StepBatch, stop: bool) -> StepSums:
    """Do all of a step but to train on it (all ranks call): the ranks agree on stopping as ever, weights and optimizer stay.

    Args:
        run: what is trained.
        batch: this rank's part of the step.
        stop: whether this rank was asked to stop.
    """
    counts_K, agreed = agree(run.world, run.objectives, batch.host, len(batch.quarantined), stop)
    sums = StepSums(counts_K, torch.full_like(counts_K, torch.nan), passed_over=True)
    sums.skipped = torch.ones((), device=run.world.device)
    quarantined, stopping = agreed.get().tolist()
    sums.quarantined, sums.stop = int(quarantined), stopping > 0
    return sums


def with_global_negatives(run: Run, batch: StepBatch) -> list[Sequence[Objective]]:
    """Each micro-step's objectives; where the contrastive one wants more than a micro-step holds, its part of the whole step's loss.

    All ranks call: they run as many forwards, and two collectives.
    """
    contrastive = feature_cache.wanted(run.objectives, len(batch.micro))
    if contrastive is None:
        return [run.objectives] * len(batch.micro)

    def forward(index: int, micro: Batch, objectives: Sequence[Objective]) -> None:
        seed_micro_step(run.config.train.seed, batch.step, index, run.world.rank)
        run.engine(micro, torch.ones(len(objectives), device=run.world.device), objectives)

    collected = feature_cache.collect(forward, batch.micro, run.objectives, run.config.drops_out())
    return [[r if o is contrastive else o for o in run.objectives] for r in feature_cache.replay(collected, contrastive.weight)]


def seed_micro_step(seed: int, step: int, micro: int, rank: int) -> None:
    """Key torch's generators by place instead of history: no generator state has to be saved for an exact resume."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, micro, rank)).generate_state(1, np.uint64)[0] >> np.uint64(1)))
