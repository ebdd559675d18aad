"""Exponential moving average of the weights, sharded like the optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmscale.weights import trained_fragments


class MovingAverage:
    """fp32 average of this rank's weight fragments: a <- decay a + (1 - decay) w after every optimizer step.

    Source: Polyak and Juditsky 1992; with the warm-up decay = min(decay, (1 + n) / (10 + n)) of TensorFlow's
    ExponentialMovingAverage, so that the random start is forgotten soon.
    """

    def __init__(self, engine: Any, model: nn.Module, decay: float) -> None:
        self.engine = engine
        self.model = model
        self.decay = decay
        self.averages: dict[str, Tensor] = {f.name: f.master.clone() for f in trained_fragments(engine, model)}
        """Flat average of each fragment."""
        device = next(iter(self.averages.values())).device
        self.updates = torch.zeros((), dtype=torch.float64, device=device)
        """Steps averaged; a part of the run's state, as the averages are."""

    def update(self, skipped: Tensor) -> None:
        """Move towards the present weights; local, no communication.

        Args:
            skipped: scalar on the device, 1 if the step was dropped: then nothing changes. The host is not told.
        """
        taken = 1 - skipped.to(self.updates)
        weight = 1 - ((1 + self.updates) / (10 + self.updates)).clamp(max=self.decay)
        for fragment in trained_fragments(self.engine, self.model):
            self.averages[fragment.name].lerp_(fragment.master, (weight * taken).float())
        self.updates += taken
