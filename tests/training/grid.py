"""Per-rank program of the parity test: one process group, many short runs.

usage: grid.py STAGE RESULTS 'name key=value ...' ['name key=value ...' ...]
"""

from __future__ import annotations

import sys

from mmscale.assemble import assemble
from mmscale.config import load_run_config
from mmscale.signals import StopRequest
from mmscale.train import start_logging, train
from mmscale.watchdog import Watchdog
from mmscale.world import connect, read_world


def main() -> None:
    """Train every named variant in turn."""
    stage, results, *variants = [w for w in sys.argv[1:] if not w.startswith("--local_rank")]
    world = read_world()
    group = connect(world, 120)
    for variant in variants:
        name, *words = variant.split()
        run = assemble(load_run_config(stage, [f"run={results}/{name}", *words]), world, group)
        start_logging(run.folder, world)
        assert train(run, None, StopRequest(), Watchdog(run.config, run.folder, world))
        run.engine.destroy()


if __name__ == "__main__":
    main()
