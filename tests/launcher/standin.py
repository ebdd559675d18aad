"""A per-rank program for the tests of supervision: it trains nothing, but starts, lives and dies as told by MMSCALE_STANDIN."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from mmscale.config import load_run_config
from mmscale.run_folder import RunFolder

STEPS = 100
SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


def main() -> int:
    """Behave like a rank; the first argument is a configuration file."""
    rank, behaviour = int(os.environ["RANK"]), os.environ["MMSCALE_STANDIN"]
    folder = RunFolder(Path(load_run_config(sys.argv[1], sys.argv[2:]).run))
    print(f"hello from rank {rank} of {os.environ['WORLD_SIZE']}, {os.environ['OMP_NUM_THREADS']} threads, {os.environ['DS_ACCELERATOR']}")
    if behaviour == "stubborn":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if behaviour == "commit":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(85))
    subprocess.Popen(SLEEP)  # like a loader's worker
    subprocess.Popen(SLEEP, start_new_session=True)  # one that leaves the session
    if rank == 0:
        folder.write_status("running", step=0, steps=STEPS)
    time.sleep(0.5)
    for step in range(STEPS):
        if behaviour == "finish":
            break
        if behaviour == "give up" and step == 1:
            return 0
        if behaviour == "raise" and step == 5 and rank == 1:
            raise ValueError("the second rank met something odd")
        if rank == 0:
            folder.write_status("running", step=step, steps=STEPS)
            print(f"step {step}")
        time.sleep(0.3)
    if rank == 0:
        folder.write_status("finished", step=STEPS, steps=STEPS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
