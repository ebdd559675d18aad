"""Sections that hang, for real: the run ends in time, says which rank hung where, leaves every stack, and goes on bit for bit."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launcher.processes import processes_of_run
from tests.launcher.launching import MMSCALE, REPO, wait_for
from tests.training.alone import Alone
from tests.training.runs import count_lines, environment, losses, train

LIMIT = "watchdog.step_s=12"


def stalled(stage: Path, run: Path, how: str, *words: str) -> subprocess.CompletedProcess[str]:
    """A run of one rank that hangs in its third step."""
    command = [sys.executable, "-m", "tests.training.stall", str(stage), f"run={run}", LIMIT, *words]
    env = environment() | {"STALL": f"3 0 {how}"}
    return subprocess.run(command, env=env, cwd=REPO, capture_output=True, text=True, timeout=240, check=False)


def test_a_section_that_hangs_ends_the_run_and_says_where(alone: Alone, stage: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = stalled(stage, run, "sleep", "checkpoint.every=1", "train.steps=4")
    assert done.returncode == 87, done.stderr
    said = done.stderr.splitlines()[-1]
    assert said.startswith("mmscale: error: The section `step` of rank 0 (process ")
    assert "took longer than watchdog.step_s = 12 s, at step 3 of 4. The stacks of its threads are in " in said
    stacks = (run / "stacks" / "rank-0.txt").read_text()
    assert said.removeprefix("mmscale: error: ") in stacks
    for text in (stacks, done.stderr, (run / "logs" / "rank-0.log").read_text()):
        assert "tests/training/stall.py" in text, text
        assert "in stalling" in text
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "failed"
    assert status["reason"] == said.removeprefix("mmscale: error: ")
    code, out, err = alone(stage, f"run={run}", "checkpoint.every=1", "train.steps=4")
    assert code == 0, out + err
    assert "step-00000002: step 2, 32 samples seen" in out
    assert (run / "stacks" / "rank-0.txt").read_text() == stacks  # evidence stays
    code, out, err = alone(stage, f"run={tmp_path / 'whole'}", "train.steps=4")
    assert code == 0, out + err
    assert losses(run) == losses(tmp_path / "whole")
    assert not (tmp_path / "whole" / "stacks").exists()


@pytest.mark.slow
def test_a_section_that_hangs_with_the_interpreters_lock_ends_too(stage: Path, tmp_path: Path) -> None:
    done = stalled(stage, tmp_path / "run", "hold")
    assert done.returncode == -signal.SIGALRM, done.stderr
    assert "in stalling" in (tmp_path / "run" / "stacks" / "rank-0.txt").read_text()


def start(stage: Path, run: Path, *words: str) -> subprocess.Popen[str]:
    """Two ranks under `mmscale launch`; what their stdout says goes to their logs."""
    command = [MMSCALE, "launch", str(stage), "--ranks-per-node", "2", f"run={run}", "checkpoint.every=5", *words]
    return subprocess.Popen(command, cwd=REPO, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def rank_of(run: Path, rank: int) -> psutil.Process:
    """The process of a rank."""
    found = [p for p in processes_of_run(run) if p.cmdline()[2:4] == ["-m", "mmscale.train"] and p.environ()["RANK"] == str(rank)]
    assert len(found) == 1
    return found[0]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_rank_ends_the_run_which_goes_on_bit_for_bit(stage: Path, tmp_path: Path, victim: int) -> None:
    steps, run, whole = "train.steps=60", tmp_path / "run", tmp_path / "whole"
    launched = start(stage, run, steps, LIMIT)
    try:
        wait_for(lambda: count_lines(run) >= 7, 240)
        rank_of(run, victim).suspend()
        stopped = time.monotonic()
        _, err = launched.communicate(timeout=120)
        assert time.monotonic() - stopped < 75  # 12 of the step, 6 of the watchdog, 31 of DeepSpeed's launcher, and a slow machine
        assert launched.returncode == 87, err
        assert "a rank hung, or a section of it took longer than `watchdog` allows (exit code 87)" in err
        assert list(processes_of_run(run)) == []
    finally:
        for process in processes_of_run(run):
            process.kill()
    done = count_lines(run)
    assert 7 <= done < 60
    other = (run / "stacks" / f"rank-{1 - victim}.txt").read_text()
    assert f"The section `step` of rank {1 - victim} (process " in other
    assert re.search(r"in (all_reduce|all_gather|reduce_scatter|broadcast|backward|wait)", other), other
    assert json.loads((run / "status.json").read_text())["state"] == ("running" if victim == 0 else "failed")
    assert (run / "stacks" / f"rank-{victim}.txt").read_text() == ""
    again = start(stage, run, steps, "watchdog.step_s=300")
    _, err = again.communicate(timeout=400)
    assert again.returncode == 0, err
    undisturbed = train(2, stage, f"run={whole}", steps, "checkpoint.every=5", timeout_s=600)
    assert undisturbed.returncode == 0, undisturbed.stderr
    assert losses(run) == losses(whole)


def stop_worker(run: Path, process: psutil.Process, timeout_s: float) -> list[psutil.Process]:
    """Stop the loader's worker once batches come from it: until it has started, threads build them, and the run goes on without it.

    Returns:
        Everything below the run.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        children = process.children(recursive=True)
        workers = [p for server in process.children() for p in server.children()]
        for worker in workers:
            worker.suspend()
        time.sleep(2)  # what lay ready is trained
        before = count_lines(run)
        time.sleep(3)
        if workers and before and count_lines(run) == before:
            return children
        for worker in workers:
            worker.resume()
        time.sleep(15)  # it loads torch before its first batch
    raise AssertionError("the run went on without its worker")


@pytest.mark.slow
def test_a_loaders_worker_that_is_stopped_ends_the_run_and_itself(stage: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "err.txt"
    words = ["loader.workers=1", "loader.prefetch=1", "train.steps=100000", "watchdog.data_s=10"]
    command = [sys.executable, "-m", "mmscale.train", str(stage), f"run={run}", *words]
    with log.open("w") as err, subprocess.Popen(command, env=environment(), cwd=REPO, stdout=subprocess.DEVNULL, stderr=err) as process:
        children: list[psutil.Process] = []
        try:
            wait_for(lambda: count_lines(run) >= 10, 240)
            children = stop_worker(run, psutil.Process(process.pid), 240)
            assert process.wait(60) == 87, log.read_text()
            assert "The section `data` of rank 0 (process " in log.read_text()
            _, left = psutil.wait_procs(children, timeout=15)
            assert not left
        finally:
            process.kill()
            for child in children:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()


def test_a_limit_below_zero_is_refused(alone: Alone, stage: Path, tmp_path: Path) -> None:
    code, _, err = alone(stage, f"run={tmp_path}/r", "watchdog.data_s=-1")
    assert code == 2
    assert "`watchdog.data_s` must be seconds, or 0 for no limit; got -1." in err


def test_entering_a_section_costs_next_to_nothing(tmp_path: Path) -> None:
    """In a process of its own: there is one timer a process."""
    program = """
import time
from pathlib import Path
from types import SimpleNamespace
from mmscale.config import RunConfig
from mmscale.run_folder import RunFolder
from mmscale.watchdog import Watchdog
with Watchdog(RunConfig(), RunFolder(Path('.')), SimpleNamespace(rank=0)) as watch:
    start = time.perf_counter()
    for step in range(5000):
        watch.enter('data', step)
        watch.enter('step', step)
    print((time.perf_counter() - start) / 10000)
    begun = watch._entered.deadline
    watch.enter('step', step)
    assert watch._entered.deadline == begun
    watch.enter('step', step, anew=True)
    assert watch._entered.deadline > begun
"""
    env = environment() | {"PYTHONPATH": f"{REPO}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1e-4
