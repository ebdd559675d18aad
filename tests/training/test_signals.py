"""Requests to stop, sent to a process of their own, and to one rank of a real run wherever it is."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.processes import processes_of_run
from mmscale.checkpoint.find import committed, step_of
from tests.launcher.launching import wait_for
from tests.training.runs import audited, count_lines
from tests.training.test_watchdog import rank_of, start

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


@pytest.mark.slow
def test_a_request_to_one_rank_is_one_commit_wherever_it_comes(stage: Path, tmp_path: Path) -> None:
    """In a step or a save, which take turns here; while a checkpoint is loaded; and two of them, one after the other."""
    run, words = tmp_path / "run", ("train.steps=400", "checkpoint.every=1")
    before = 0
    for victim, names, lines in ((1, ("SIGUSR1",), 5), (0, ("SIGUSR2", "SIGTERM"), None), (1, ("SIGTERM",), 8)):
        launched = start(stage, run, *words)
        try:
            if lines is None:
                wait_for(lambda victim=victim: rank_has_listened(run, victim), 240)  # type: ignore[misc]
            else:
                wait_for(lambda lines=lines, before=before: count_lines(run) >= before + lines, 240)  # type: ignore[misc]
            for name in names:
                rank_of(run, victim).send_signal(getattr(signal, name))
                time.sleep(0.05)
            _, err = launched.communicate(timeout=240)
        finally:
            for process in processes_of_run(run):
                process.kill()
        assert launched.returncode == 85, err
        assert list(processes_of_run(run)) == []
        done = count_lines(run)
        assert step_of(committed(run / "checkpoints")[-1]) == done  # no step is lost
        assert done > before
        assert {step for step, _ in audited(run).values()} == set(range(1, done + 1))
        before = done


def rank_has_listened(run: Path, rank: int) -> bool:
    """Whether a rank takes signals as requests by now."""
    try:
        status = Path(f"/proc/{rank_of(run, rank).pid}/status").read_text()
    except (AssertionError, OSError):
        return False
    caught = int(next(line for line in status.splitlines() if line.startswith("SigCgt:")).split()[1], 16)
    return bool(caught >> (signal.SIGUSR1 - 1) & 1)
