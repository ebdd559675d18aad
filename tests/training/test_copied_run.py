"""Real runs that copy their checkpoints to a real S3 server: killed while they do, on a machine that is lost."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmscale.checkpoint.find import committed, resolve, step_of
from tests.launcher.launching import REPO
from tests.shards.bucket import ENVIRONMENT, s3_server, upload
from tests.shards.faulty_proxy import FaultyProxy
from tests.training.runs import environment, losses
from tests.training.test_saving import tensor_files


@pytest.fixture(scope="module")
def s3_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Port of an S3 server with a bucket `runs`."""
    with s3_server() as port:
        upload(tmp_path_factory.mktemp("empty"), port, "runs")
        yield port


def start(stage: Path, run: Path, port: int, log: Path, *words: str) -> subprocess.Popen[bytes]:
    """A run of one rank that copies to `s3://runs/NAME`."""
    command = [sys.executable, "-m", "mmscale.train", str(stage), f"run={run}", "checkpoint.copy_to=s3://runs/tiny", *words]
    env = environment() | ENVIRONMENT | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
    with log.open("ab") as file:
        return subprocess.Popen(command, env=env, cwd=REPO, stdout=file, stderr=file)


@pytest.mark.slow
def test_a_run_that_is_killed_during_a_copy_on_a_machine_that_is_lost(stage: Path, tiny_run: Path, tmp_path: Path, s3_port: int) -> None:
    words, run, log = ("checkpoint.every=4", "checkpoint.keep=0", "checkpoint.background=true"), tmp_path / "run", tmp_path / "log.txt"

    def kill(method: str, path: str, byte_range: str | None, nth: int) -> str | None:
        """In the middle of the second copy, of step 8 or 12."""
        if method == "PUT" and "step-00000004" not in path and path.endswith("index.json"):
            os.kill(process.pid, signal.SIGKILL)
            return "reset"
        return "fail" if nth == 0 else None  # every request has to be made twice

    with FaultyProxy(s3_port, kill) as proxy:
        process = start(stage, run, proxy.port, log, *words)
        assert process.wait(200) == -signal.SIGKILL, log.read_text()
    assert step_of(resolve(run)) >= 8
    shutil.rmtree(run)
    process = start(stage, run, s3_port, log, *words)
    assert process.wait(200) == 0, log.read_text()
    text = log.read_text()
    assert "fetching the checkpoint of step 4 from s3://runs/tiny/step-00000004." in text
    assert "step-00000004: step 4, 64 samples seen; every tensor compared" in text
    assert [step for step, _ in losses(run)] == list(range(5, 13))
    assert losses(run) == losses(tiny_run)[4:]
    assert tensor_files(run) == tensor_files(tiny_run)
    shutil.rmtree(run)
    process = start(stage, run, s3_port, log, *words)  # it had waited for the last copy
    assert process.wait(200) == 0, log.read_text()
    assert [step_of(f) for f in committed(run / "checkpoints")] == [12]
    assert tensor_files(run).items() <= tensor_files(tiny_run).items()
