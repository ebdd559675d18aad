"""A rank's program that trains nothing, so that many jobs take seconds: it counts steps, commits, stops when asked, fails as told.

MMSCALE_STANDIN is `run`, `fail` (before its first step, on every node) or `fail on HOST`. The file ALLOWED holds
how many steps it may take.
"""

import json
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
    folder, first = RunFolder(Path(config.run)), os.environ["SLURM_PROCID"] == "0"
    print(f"rank {os.environ['SLURM_PROCID']} on {host}", flush=True)
    if behaviour in ("fail", f"fail on {host}"):
        raise ValueError(f"something is wrong with {host}")
    if behaviour != "run" or not first:
        return follow(folder)
    return lead(folder, config.train.steps, asked)


def follow(folder: RunFolder) -> int:
    """A rank that waits for the first one, as in a collective."""
    while True:
        status = json.loads(folder.status.read_text()) if folder.status.exists() else {}
        if status.get("launch_id") == os.environ["MMSCALE_LAUNCH_ID"] and status["state"] != "running":
            return 85 if status["state"] == "stopped" else 0
        time.sleep(0.1)


def lead(folder: RunFolder, steps: int, asked: list[int]) -> int:
    """The rank that counts and commits."""
    found = committed(folder.checkpoints)
    step = step_of(found[-1]) if found else 0
    while step < steps:
        while step >= int(Path(os.environ["ALLOWED"]).read_text() or 0) and not asked:
            time.sleep(0.05)
        step += 1
        folder.write_status("running", step=step, steps=steps)
        if asked or step % EVERY == 0 or step == steps:
            (folder.checkpoints / name_of(step)).mkdir(parents=True, exist_ok=True)
            (folder.checkpoints / name_of(step) / NAME).touch()
        if asked and step < steps:
            folder.write_status("stopped", step=step, steps=steps)
            return 85
    folder.write_status("finished", step=steps, steps=steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
