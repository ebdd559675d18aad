"""The benchmarks of the step run to their end at tiny sizes on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.training.runs import environment

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TINY = [
    *("model.hidden_size=32", "model.num_heads=2", "model.unimodal_layers=1", "model.fusion_layers=1", "model.image_size=32"),
    *("model.patch_size=16", "model.projection_size=16"),
]


def report(script: str, out: Path, *words: str) -> dict[str, Any]:
    """Run a benchmark and read what it wrote."""
    command = [sys.executable, str(BENCHMARKS / script), "--out", str(out), *words]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.mark.slow
def test_gpu_runs_to_its_end_on_a_cpu(tmp_path: Path) -> None:
    found = report("gpu.py", tmp_path / "gpu.json", "--words", *TINY)
    assert found["checks"]["attention"]["equal"]
    assert found["checks"]["stages"]["equal"]
    assert found["checks"]["waits"] is None
    assert [(case["size"], case["stage"]) for case in found["steps"]] == [("tiny", 1), ("tiny", 2), ("tiny", 3)]
    assert all(case["step_ms"] > 0 and case["estimate_mib"] > 0 and case["mfu"] is None for case in found["steps"])
    assert {"device", "versions", "date"} <= set(found)


@pytest.mark.slow
def test_peers_compares_both_batches_of_flava(tmp_path: Path) -> None:
    found = report("peers.py", tmp_path / "peers.json", "--batch", "4", "--rounds", "1", *TINY)
    assert [case["flava_batch"] for case in found["results"]] == ["doubled", "half"]
    assert all(case["samples_per_s_ratio_cpu"] > 0 and case["mmscale_cpu_ms"] > 0 for case in found["results"])
