"""Per-rank program of the guard's test: trains with objectives that are not finite at chosen places, going on where a run stands.

usage: poison.py STAGE RESULTS 'name key=value ...' ['name key=value ...' ...]
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import torch
import torch.distributed as dist

from mmscale.assemble import Run, assemble
from mmscale.config import load_run_config
from mmscale.data.batch import Batch
from mmscale.objectives import Objective, Term
from mmscale.signals import StopRequest
from mmscale.train import resume, start_logging, train
from mmscale.watchdog import Watchdog
from mmscale.world import connect, read_world

PLACES = {(0, 0): ("captioning", "loss"), (3, 1): ("masked_image", "gradient"), (5, 1): ("contrastive", "loss")}
"""(step, rank): which objective, and whether its loss or only its gradient is not finite there."""


class Poisoned:
    """An objective, but for some places."""

    def __init__(self, objective: Objective, global_batch: int) -> None:
        self.objective, self.global_batch = objective, global_batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.objective, name)

    def loss(self, state: Any, batch: Batch, model: Any) -> Term:
        """The objective's term, or what is to be guarded against."""
        term = self.objective.loss(state, batch, model)
        step = int(batch.positions_M[0]) // self.global_batch
        name, what = PLACES.get((step, dist.get_rank()), ("", ""))
        if name != self.objective.name:
            return term
        bad = term.sum * torch.inf if what == "loss" else term.sum + (0 * term.sum).sqrt()
        return dataclasses.replace(term, sum=bad)


def poisoned(run: Run) -> Run:
    """The run with such objectives."""
    return dataclasses.replace(run, objectives=[Poisoned(o, run.plan.global_batch) for o in run.objectives])


def main() -> None:
    """Train every named variant in turn."""
    stage, results, *variants = [w for w in sys.argv[1:] if not w.startswith("--local_rank")]
    world = read_world()
    group = connect(world, 120)
    for variant in variants:
        name, *words = variant.split()
        run = poisoned(assemble(load_run_config(stage, [f"run={results}/{name}", *words]), world, group))
        start_logging(run.folder, world)
        assert train(run, resume(run), StopRequest(), Watchdog(run.config, run.folder, world))
        run.engine.destroy()


if __name__ == "__main__":
    main()
