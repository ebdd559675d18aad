"""`mmscale.train` whose step hangs at a place: STALL is `STEP RANK HOW`.

`sleep` frees the interpreter's lock and `hold` does not; with `slow` nothing hangs, but from there the rank's forwards take 0.5 s more;
with `ask` the rank gets a request to stop, which the next step acts on.
"""

import ctypes
import os
import signal
import sys
import time
from typing import Any

from mmscale import train

STEP, RANK, HOW = os.environ["STALL"].split()
HANG = {"sleep": time.sleep, "hold": ctypes.PyDLL(None).sleep}
step = train.optimizer_step


def stalling(run: Any, batch: Any, asked: bool) -> Any:
    """Take a step, or hang."""
    if HOW == "slow" and (batch.step + 1, run.world.rank) == (int(STEP), int(RANK)):
        run.trainee.model.register_forward_pre_hook(lambda *_: time.sleep(0.5))
    elif HOW == "ask" and (batch.step + 1, run.world.rank) == (int(STEP), int(RANK)):
        os.kill(os.getpid(), signal.SIGUSR1)
    elif (batch.step + 1, run.world.rank) == (int(STEP), int(RANK)):
        HANG[HOW](600)
    return step(run, batch, asked)


if __name__ == "__main__":
    train.optimizer_step = stalling
    sys.exit(train.main())
