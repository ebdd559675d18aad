"""An objective whose term is another one in some steps, for what must be told from plain training."""

from __future__ import annotations

from typing import Any

from mmscale.data.batch import Batch
from mmscale.objectives import Objective, Term


class Altered:
    """All of an objective but its term."""

    def __init__(self, objective: Objective, global_batch: int) -> None:
        self.objective, self.global_batch = objective, global_batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.objective, name)

    def loss(self, state: Any, batch: Batch, model: Any) -> Term:
        """The objective's term, or another."""
        return self.alter(self.objective.loss(state, batch, model), int(batch.positions_M[0]) // self.global_batch)

    def alter(self, term: Term, step: int) -> Term:
        """What becomes of a term in a step, counted from 0."""
        raise NotImplementedError
