"""Loss spikes: told from noise, rolled back, passed over for good; the same one at every restart ends with exit code 86."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mmscale.checkpoint.find import committed, resolve, step_of
from mmscale.checkpoint.manifest import read_manifest
from mmscale.ports import free_port
from mmscale.rollback import LossWindow
from tests.launcher.launching import REPO
from tests.training.alone import Alone
from tests.training.runs import audited, environment, losses, records

WORDS = ("train.steps=24", "checkpoint.every=5", "checkpoint.keep=0", "guard.spike=20", "guard.spike_window=8", "train.ema_decay=0.9")


def test_a_window_tells_spikes_from_noise() -> None:
    rng, window = random.Random(0), LossWindow(50, 10.0)
    found = [window.look(step, 3 - 0.002 * step + rng.gauss(0, 0.1)) for step in range(500)]
    assert found == [None] * 500
    limit = window.limit()
    assert limit is not None
    assert 2.5 < limit < 3.6
    spike = window.look(500, 4.0)
    assert spike is not None
    assert (spike.step, spike.loss, spike.limit) == (500, 4.0, limit)
    assert list(window.losses)[-1] != 4.0  # what is rolled back is no measure
    again = LossWindow(50, 10.0, window.losses)
    assert again.limit() == limit
    flat = LossWindow(3, 10.0, [1.0, 1.0, 1.0])
    assert flat.look(4, 1.09) is None
    assert flat.look(5, 1.2) is not None
    assert LossWindow(4, 1.0, [1.0, 1.0, 1.0]).look(4, 1e9) is None  # too few to tell


def test_a_spike_at_every_restart_ends_with_86_and_a_mended_run_goes_on(alone: Alone, stage: Path, tmp_path: Path) -> None:
    """The objective's weight is what makes the spike, in every step from the restart on."""
    run, words = tmp_path / "run", [w for w in WORDS if not w.startswith("train.steps")]
    code, out, err = alone(stage, f"run={run}", "train.steps=10", *words)
    assert code == 0, out + err
    assert records_of_rollbacks(run) == []
    for attempt in range(2):
        code, out, err = alone(stage, f"run={run}", "train.steps=14", "objectives.captioning.weight=1000", "guard.max_rollbacks=2", *words)
        assert code == 86, out + err
        assert out.count("LOSS SPIKE: the loss of step 1") == (0 if attempt else 2)
        assert err.startswith("mmscale: error: In step 1")
        assert "The run was rolled back to the checkpoint of step 10 2 times already, and guard.max_rollbacks = 2." in err
        status = json.loads((run / "status.json").read_text())
        assert (status["state"], status["reason"]) == ("stuck", err.strip().removeprefix("mmscale: error: "))
    assert [(r["back_to"], r["skipped_steps"]) for r in records_of_rollbacks(run)] == [(10, [11]), (10, [12])]
    assert step_of(resolve(run)) == 10
    code, out, err = alone(stage, f"run={run}", "train.steps=14", *words)
    assert code == 0, out + err
    assert [r["step"] for r in records(run / "metrics.jsonl") if r["loss"] is None] == [11, 12]
    assert [r["skipped_steps"] for r in records(run / "metrics.jsonl")][-4:] == [1, 2, 2, 2]


def test_without_a_checkpoint_a_run_starts_anew_without_the_spike(alone: Alone, stage: Path, tmp_path: Path) -> None:
    run, words = tmp_path / "run", ["guard.spike=0.001", "guard.spike_window=2", "train.steps=6"]
    code, out, err = alone(stage, f"run={run}", *words)
    assert code == 1, out + err
    assert "and there is no checkpoint to roll back to. The same command starts anew without the positions of steps " in err
    (line,) = records_of_rollbacks(run)
    assert line["positions"] == [[16 * (s - 1), 16 * s] for s in line["skipped_steps"]]
    code, out, err = alone(stage, f"run={run}", "train.steps=6")
    assert code == 0, out + err
    assert [r["step"] for r in records(run / "metrics.jsonl") if r["loss"] is None] == line["skipped_steps"]


def records_of_rollbacks(run: Path) -> list[dict[str, object]]:
    """Lines of rollbacks.jsonl."""
    return records(run / "rollbacks.jsonl") if (run / "rollbacks.jsonl").exists() else []


def spiked(stage: Path, run: Path, spikes: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Two ranks whose losses spike at some steps."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    command += ["-m", "tests.training.spiking", str(stage), f"run={run}", *WORDS, *words]
    env = environment() | {"SPIKES": spikes, "PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(command, env=env, cwd=REPO, capture_output=True, text=True, timeout=400, check=False)


@pytest.mark.slow
def test_a_run_that_was_rolled_back_equals_one_that_never_saw_the_spikes(stage: Path, tmp_path: Path) -> None:
    run, words = tmp_path / "run", ("zero.stage=3", "checkpoint.background=true")
    done = spiked(stage, run, "13,18", *words)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = records_of_rollbacks(run)
    assert [(r["step"], r["back_to"], r["skipped_steps"]) for r in lines] == [(13, 10, [12, 13]), (18, 15, [17, 18])]
    assert lines[0]["positions"] == [[176, 192], [192, 208]]
    named = [r for r in records(run / "skipped.jsonl") if r.get("rolled_back")]
    assert {r["step"] for r in named} == {12, 13, 17, 18}
    keys = {(step, key) for step, key in audited(run).values()}
    assert {(r["step"], key) for r in named for key in r["keys"]} == {(s, k) for s, k in keys if s in (12, 13, 17, 18)}
    assert sorted(audited(run)) == list(range(24 * 16))  # no position is lost or comes twice
    told = tmp_path / "told"
    told.mkdir()
    shutil.copy(run / "rollbacks.jsonl", told)
    done = spiked(stage, told, "", *words)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert losses(told) == losses(run)
    assert audited(told) == audited(run)
    for mine, theirs in zip(committed(run / "checkpoints"), committed(told / "checkpoints"), strict=True):
        assert [e for e in read_manifest(mine) if e.path.startswith("state/")] == [
            e for e in read_manifest(theirs) if e.path.startswith("state/")
        ]
