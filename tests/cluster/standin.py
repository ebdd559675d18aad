"""A rank's program that trains nothing, so that many jobs take seconds: it counts steps, commits, stops when asked, fails as told.

MMSCALE_STANDIN is `run`, `fail` (before its first step, on every node) or `fail on HOST`. PACE_S is the time of a step.
"""

import os
import signal
import sys
import time
from pathlib import Path

from mmscale.checkpoint.find import committed, name_of, step_of
from mmscale.checkpoint.manifest import NAME
from mmscale.config import load_run_config
from mmscale.run_folder import RunFolder

EVERY = 4


def main() -> int:
    """Behave like a rank; the first argument is a configuration file."""
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _: asked.append(number))
    config, behaviour, host = load_run_config(sys.argv[1], sys.argv[2:]), os.environ["MMSCALE_STANDIN"], os.uname().nodename
    folder, first, steps = RunFolder(Path(config.run)), os.environ["SLURM_PROCID"] == "0", config.train.steps
    found = committed(folder.checkpoints)
    step = step_of(found[-1]) if found else 0
    print(f"rank {os.environ['SLURM_PROCID']} on {host} begins at step {step}", flush=True)
    if behaviour in ("fail", f"fail on {host}"):
        time.sleep(0.5)
        raise ValueError(f"something is wrong with {host}")
    while step < steps:
        time.sleep(float(os.environ["PACE_S"]))
        step += 1
        if first:
            folder.write_status("running", step=step, steps=steps)
            if asked or step % EVERY == 0 or step == steps:
                (folder.checkpoints / name_of(step)).mkdir(parents=True, exist_ok=True)
                (folder.checkpoints / name_of(step) / NAME).touch()
        if asked and step < steps:
            if first:
                folder.write_status("stopped", step=step, steps=steps)
            return 85
    if first:
        folder.write_status("finished", step=steps, steps=steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
