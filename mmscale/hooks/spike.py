"""The loss of each step over all ranks, compared with those before it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.distributed as dist

from mmscale.hooks import StepInfo
from mmscale.late import Late
from mmscale.recovery_config import GuardConfig
from mmscale.rollback import LossSpike, LossWindow
from mmscale.watchdog import Section
from mmscale.world import World


class SpikeHook:
    """Finds a loss spike without waiting for the device: a step late there, at once on a CPU, and when somebody asks (`settle`).

    It costs a sum of two numbers over ranks a step. The checkpoint hook rolls the run back, before it would commit.

    Args:
        config: what a spike is; `guard.spike` must not be 0.
        world: who this rank is.
        weights: of the objectives.
        losses: of the steps before, from the checkpoint.
    """

    section: ClassVar[Section] = "step"

    def __init__(self, config: GuardConfig, world: World, weights: Sequence[float], losses: Sequence[float]) -> None:
        self.window = LossWindow(config.spike_window, config.spike, losses)
        self.found: LossSpike | None = None
        self._weights_K = torch.tensor(weights, dtype=torch.float64, device=world.device)
        self._late = 0 if world.device.type == "cpu" else 1
        self._waiting: deque[tuple[int, Late]] = deque()

    def after_step(self, info: StepInfo) -> None:
        """Take a step in, and look at those before it (all ranks call)."""
        sums = info.sums
        if not sums.passed_over:
            loss = (self._weights_K * sums.sums_K / sums.counts_K.clamp(min=1)).sum()
            dist.all_reduce(loss)
            self._waiting.append((info.step, Late(torch.stack([loss, sums.skipped.double()]))))
        while len(self._waiting) > self._late:
            self._look(*self._waiting.popleft())

    def settle(self) -> None:
        """Look at every step so far; waits for the device."""
        while self._waiting:
            self._look(*self._waiting.popleft())

    def close(self) -> None:
        """Nothing is held open."""

    def _look(self, step: int, numbers: Late) -> None:
        loss, skipped = numbers.get().tolist()
        if not skipped and self.found is None:  # what was dropped has changed nothing, and its loss may be no number
            self.found = self.window.look(step, loss)
