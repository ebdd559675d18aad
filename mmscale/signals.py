"""Requests to stop: a handler only sets a flag; the ranks agree on it at the next step."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from types import FrameType


class StopRequest:
    """Whether a signal has asked this process to checkpoint and stop."""

    def __init__(self) -> None:
        self.asked = False
        self.enough = False
        """Whether the evaluations say that more training does not pay; then the run ends with this step, as finished."""
        self._terminated = False

    def listen(self) -> None:
        """Take SIGTERM, SIGUSR1 and SIGUSR2 as requests; a second SIGTERM ends the process at once.

        A scheduler may send a first SIGTERM soon after its warning SIGUSR1: the checkpoint that is being made is not to be lost to it.
        """
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM:
            if self._terminated:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            self._terminated = True
        self.asked = True


def die_with_parent() -> None:
    """Have the kernel kill this process when the launcher that started it is gone (Linux; elsewhere nothing happens)."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGKILL)
