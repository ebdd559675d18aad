"""Requests to stop, sent to a process of their own."""

import signal
import subprocess
import sys

import pytest

PROGRAM = """
import os, signal, sys, time
from mmscale.signals import StopRequest
stop = StopRequest()
stop.listen()
for name in sys.argv[1:]:
    os.kill(os.getpid(), getattr(signal, name))
    time.sleep(0.01)
sys.exit(85 if stop.asked else 0)
"""


@pytest.mark.parametrize(
    ("names", "code"),
    [
        ([], 0),
        (["SIGUSR1"], 85),
        (["SIGTERM"], 85),
        (["SIGUSR1", "SIGTERM"], 85),
        (["SIGTERM", "SIGUSR1", "SIGUSR2"], 85),
        (["SIGTERM", "SIGTERM"], -signal.SIGTERM),
        (["SIGUSR1", "SIGTERM", "SIGTERM"], -signal.SIGTERM),
    ],
)
def test_a_second_sigterm_alone_ends_a_process_at_once(names: list[str], code: int) -> None:
    assert subprocess.run([sys.executable, "-c", PROGRAM, *names], check=False).returncode == code
