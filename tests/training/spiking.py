"""`mmscale.train` whose losses are a thousand times as large in the steps that SPIKES names, counted from 1: `step,step,...`."""

from __future__ import annotations

import dataclasses
import os
import sys
from typing import Any

from mmscale import train
from mmscale.assemble import Run
from mmscale.data.batch import Batch
from mmscale.objectives import Objective, Term

STEPS = {int(step) for step in os.environ["SPIKES"].split(",") if step}
assemble = train.assemble


class Spiking:
    """An objective, but for some steps."""

    def __init__(self, objective: Objective, global_batch: int) -> None:
        self.objective, self.global_batch = objective, global_batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.objective, name)

    def loss(self, state: Any, batch: Batch, model: Any) -> Term:
        """The objective's term, or one that is out of proportion."""
        term = self.objective.loss(state, batch, model)
        step = int(batch.positions_M[0]) // self.global_batch + 1
        return dataclasses.replace(term, sum=term.sum * 1000) if step in STEPS else term


def spiking(*arguments: Any) -> Run:
    """A run with such objectives."""
    run = assemble(*arguments)
    return dataclasses.replace(run, objectives=[Spiking(o, run.plan.global_batch) for o in run.objectives])


if __name__ == "__main__":
    train.assemble = spiking
    sys.exit(train.main())
