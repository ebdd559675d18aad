"""A pipeline of real runs."""

import subprocess
from pathlib import Path

import pytest

from tests.launcher.launching import MMSCALE, REPO
from tests.training.runs import environment, losses


@pytest.mark.slow
def test_a_changed_launch_is_trained_anew(tmp_path: Path, stage: Path) -> None:
    """With real runs: the command alone would say that the run is finished."""
    text = (
        f"folder: {tmp_path}/p\nstages:\n  - {{name: one, command: 'launch {stage} run={{folder}}/one train.steps=2 optimizer.lr=1e-3'}}\n"
    )
    path = tmp_path / "pipeline.yaml"
    path.write_text(text)
    found = []
    for rate in ("1e-3", "1e-3", "5e-3"):
        path.write_text(path.read_text().replace("1e-3", rate))
        done = subprocess.run([MMSCALE, "pipeline", path], cwd=REPO, env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        found.append(losses(tmp_path / "p" / "one"))
    assert found[0] == found[1] != found[2]
    assert losses(tmp_path / "p" / "one.before-1") == found[0]
