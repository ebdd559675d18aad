"""The soak of `benchmarks/soak.py` with a few kills."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launcher.launching import REPO
from tests.training.runs import environment


@pytest.mark.slow
def test_a_run_whose_processes_are_killed_equals_one_that_was_left_alone(tmp_path: Path) -> None:
    command = [sys.executable, str(REPO / "benchmarks" / "soak.py"), "--kills", "4", "--steps", "30", "--seed", "5"]
    env = environment() | {"PYTHONPATH": str(REPO)}
    done = subprocess.run([*command, "--out", str(tmp_path / "soak.json")], env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads((tmp_path / "soak.json").read_text())
    assert (result["kills"], result["sound"], result["processes_left_over"]) == (4, True, 0)
