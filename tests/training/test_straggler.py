"""Which rank the others wait for: told by a run with one that is slow, and by numbers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mmscale.own_time import Straggler
from mmscale.ports import free_port
from tests.launcher.launching import REPO
from tests.training.runs import environment, records


def test_a_rank_is_told_of_once_when_it_was_slow_three_times_in_a_row() -> None:
    straggler, said = Straggler(), []
    for own_R in ([1, 1, 1, 4], [1, 1, 3, 1], [1, 2, 3, 1], [9, 1, 1, 1], [9, 1, 1, 1], [9, 1, 1, 1], [9, 1, 1, 1], [1, 1, 1, 1.5]):
        found = straggler.look(own_R)
        said.append((found["slowest_rank"], found["slowest_over_median"], straggler.warning() is not None))
    assert said == [(3, 4, False), (2, 3, False), (2, 3, False), *[(0, 9, i == 2) for i in range(4)], (3, 1.5, False)]


@pytest.mark.slow
@pytest.mark.parametrize("slow", [0, 1])
def test_a_slow_rank_of_a_run_is_named(stage: Path, tmp_path: Path, slow: int) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    command += ["-m", "tests.training.stall", str(stage), f"run={run}", "train.steps=7", "zero.stage=2"]
    env = environment() | {"STALL": f"2 {slow} slow"}
    done = subprocess.run(command, env=env, cwd=REPO, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    lines = records(run / "metrics.jsonl")
    assert [r["slowest_rank"] for r in lines[2:]] == [slow] * 5
    assert all(r["slowest_over_median"] > 1.5 for r in lines[2:]), [r["slowest_over_median"] for r in lines]
    warnings = [line for line in done.stdout.splitlines() if f"rank {slow} took more than 1.5 times the median" in line]
    assert len(warnings) == 1
