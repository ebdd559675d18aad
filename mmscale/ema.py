"""Exponential moving average of the weights, sharded like the optimizer."""

from __future__ import annotations

from typing import Any

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
        self.updates = 0
        """Steps averaged; a part of the run's state, as the averages are."""
        self.averages: dict[str, Tensor] = {f.name: f.master.clone() for f in trained_fragments(engine, model)}
        """Flat average of each fragment."""

    def update(self) -> None:
        """Move towards the present weights; local, no communication."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for fragment in trained_fragments(self.engine, self.model):
            self.averages[fragment.name].lerp_(fragment.master, 1 - decay)
        self.updates += 1
