"""`mmscale.train` with a pause before every step, so that a tiny run lasts long enough for something to happen to it.

The file that PACE_FILE names holds the seconds; it is read all the time, so that the pace can be changed.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

from mmscale import train

step = train.optimizer_step


def paced(*arguments: Any) -> Any:
    """Wait, and take the step."""
    start = time.monotonic()
    while time.monotonic() - start < float(Path(os.environ["PACE_FILE"]).read_text() or 0):
        time.sleep(0.05)
    return step(*arguments)


if __name__ == "__main__":
    train.optimizer_step = paced
    sys.exit(train.main())
