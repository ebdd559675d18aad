"""What an objective is, and how the configured ones are built.

An objective counts what its loss is a mean over before the forward, on the CPU batch; after the forward it sums its loss over
the local batch. The trainer divides by the count over all ranks and accumulation, so the loss does not depend on either.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from mmscale.data.batch import Batch
from mmscale.model.state import State

if TYPE_CHECKING:
    from mmscale.model.model import MMScaleModel


@dataclass(frozen=True, slots=True)
class Term:
    """One objective's loss over one micro-batch of one rank."""

    sum: Tensor
    """fp32 scalar in the graph: the sum of the losses of the local items."""
    logs: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Detached (sum, count) pairs; a metric is the ratio of their sums over ranks and accumulation."""


def ratio(hits: Tensor) -> tuple[Tensor, Tensor]:
    """A log pair from flags: how many are set, out of how many."""
    return hits.sum().float(), torch.full((), float(len(hits)), device=hits.device)


class Objective(Protocol):
    """One term of the loss."""

    @property
    def name(self) -> str:
        """Its name in the log."""
        ...

    @property
    def weight(self) -> float:
        """Its factor in the total loss."""
        ...

    def wants(self) -> dict[str, Any]:
        """Fields of `sequences.Wanted` that it turns on."""
        ...

    def check(self, micro_batch: int, ranks: int) -> None:
        """Raise ConfigError when it cannot work on this topology."""
        ...

    def count(self, batch: Batch) -> float:
        """Items that the loss is a mean over, from the batch alone."""
        ...

    def loss(self, state: State, batch: Batch, model: MMScaleModel) -> Term:
        """The sum of the loss over the local items, in the graph even when there is none."""
        ...
