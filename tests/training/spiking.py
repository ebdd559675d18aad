"""`mmscale.train` whose losses are a thousand times as large in the steps that SPIKES names, counted from 1: `step,step,...`."""

from __future__ import annotations

import dataclasses
import os
import sys
from typing import Any

from mmscale import train
from mmscale.assemble import Run
from mmscale.objectives import Term
from tests.training.altered import Altered

STEPS = {int(step) for step in os.environ["SPIKES"].split(",") if step}
assemble = train.assemble


class Spiking(Altered):
    """Out of proportion in some steps."""

    def alter(self, term: Term, step: int) -> Term:
        """A thousand times the term in those steps."""
        return dataclasses.replace(term, sum=term.sum * 1000) if step + 1 in STEPS else term


def spiking(*arguments: Any) -> Run:
    """A run with such objectives."""
    run = assemble(*arguments)
    return dataclasses.replace(run, objectives=[Spiking(o, run.plan.global_batch) for o in run.objectives])


if __name__ == "__main__":
    train.assemble = spiking
    sys.exit(train.main())
