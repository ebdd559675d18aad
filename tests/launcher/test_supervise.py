"""Supervision over the real `deepspeed`: every end is reported for what it is, and nothing outlives it."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.monitor import read_launch, summarize
from launcher.processes import processes_of_run
from tests.launcher.launching import MMSCALE, REPO, start, start_and_wait, wait_for


@pytest.fixture(autouse=True)
def _nothing_left(tmp_path: Path) -> Iterator[None]:
    """A test that fails leaves nothing behind either."""
    yield
    for run in (tmp_path / "run", tmp_path / "good" / "run", tmp_path / "bad" / "run"):
        for process in processes_of_run(run):
            process.kill()


def test_finished_run_ends_with_zero_and_leaves_nothing(tmp_path: Path) -> None:
    launched = start(tmp_path, "finish")
    code, out, err = launched.output()
    assert code == 0, err
    assert "hello from rank 0 of 2, 1 threads, cpu" in out
    assert "rank 1" not in out
    assert "finished" in err
    assert launched.processes() == []
    record = read_launch(tmp_path / "run")
    assert record is not None
    assert record.exit_code == 0
    assert json.loads((tmp_path / "run" / "status.json").read_text())["launch_id"] == record.launch_id
    assert summarize(tmp_path / "run").state == "finished"
    logs = tmp_path / "run" / "logs" / record.launch_id
    assert [(logs / f"rank-{rank}.log").read_text().startswith(f"hello from rank {rank}") for rank in (0, 1)] == [True, True]


@pytest.mark.slow
def test_run_whose_node_fails_its_check_is_not_started(tmp_path: Path) -> None:
    launched = start(tmp_path, "finish", "--set", "checks.run=true")
    code, out, err = launched.output()
    assert code == 88, out + err
    assert "fail  paths          " in out
    assert f"The check of the nodes failed on {os.uname().nodename}, and the run was not started. Mend what its table names." in err
    assert not (tmp_path / "run" / "status.json").exists()
    assert summarize(tmp_path / "run").state == "failed"
    assert launched.processes() == []


def test_deepspeeds_launcher_killed_is_a_failure_though_deepspeed_exits_with_zero(tmp_path: Path) -> None:
    launched = start_and_wait(tmp_path, "run")
    launched.named("deepspeed.launcher.launch")[0].kill()
    code, _, err = launched.output(20)
    assert code == 1
    assert "`deepspeed` ended with exit code 0, but the run did not finish: it ended at step" in err
    assert "Traceback" not in err
    assert launched.processes() == []
    assert summarize(tmp_path / "run").state == "failed"


def test_killed_rank_is_named_and_its_peers_end(tmp_path: Path) -> None:
    launched = start_and_wait(tmp_path, "run")
    launched.ranks()[1].kill()
    code, _, err = launched.output(30)
    assert code == 247
    assert "rank 1 ended first; its last lines:\n  [rank 1] hello from rank 1" in err
    assert "`deepspeed` ended with exit code 247, which is how it reports a rank that SIGKILL ended" in err
    assert launched.processes() == []


@pytest.mark.slow
def test_a_stopped_rank_is_killed_when_its_peer_has_failed(tmp_path: Path) -> None:
    launched = start_and_wait(tmp_path, "run", "--grace-s", "3")
    ranks = launched.ranks()
    ranks[0].suspend()
    ranks[1].kill()
    failed = time.monotonic()
    code, _, err = launched.output(60)
    assert time.monotonic() - failed < 25  # DeepSpeed's launcher alone gives it 30 s
    assert code == 247
    assert "rank 1 ended first" in err
    assert launched.processes() == []


@pytest.mark.parametrize("to_group", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_ctrl_c_leaves_no_orphan(tmp_path: Path, to_group: bool) -> None:
    launched = start_and_wait(tmp_path, "run")
    (os.killpg if to_group else os.kill)(launched.process.pid, signal.SIGINT)
    code, _, err = launched.output(20)
    assert code == 130
    assert "ended by SIGINT at step" in err
    assert launched.processes() == []


@pytest.mark.slow
def test_sigterm_reaches_every_rank(tmp_path: Path) -> None:
    launched = start_and_wait(tmp_path, "run")
    launched.process.terminate()
    code, _, err = launched.output(20)
    assert code == 143
    assert "ended by SIGTERM" in err
    assert launched.processes() == []


@pytest.mark.slow
def test_checkpoint_on_request_keeps_its_exit_code(tmp_path: Path) -> None:
    launched = start_and_wait(tmp_path, "commit")
    launched.process.terminate()
    code, _, err = launched.output(20)
    assert code == 85
    assert "stopped on request" in err
    assert launched.processes() == []


@pytest.mark.slow
@pytest.mark.parametrize("twice", [False, True])
def test_ranks_that_ignore_signals_are_killed(tmp_path: Path, twice: bool) -> None:
    launched = start_and_wait(tmp_path, "stubborn", "--grace-s", "60" if twice else "2")
    launched.process.send_signal(signal.SIGINT)
    if twice:
        time.sleep(0.5)
        launched.process.send_signal(signal.SIGINT)
    code, _, err = launched.output(25)
    assert code == 130
    assert "once more kills them at once" in err
    assert launched.processes() == []


@pytest.mark.slow
def test_rank_that_raises_is_told_from_its_peer(tmp_path: Path) -> None:
    launched = start(tmp_path, "raise")
    code, _, err = launched.output()
    assert code == 1
    assert "rank 1 ended first" in err
    assert "[rank 1] ValueError: the second rank met something odd" in err
    assert "The run failed at step" in err
    assert launched.processes() == []


@pytest.mark.slow
def test_ranks_that_end_early_with_zero_have_not_finished(tmp_path: Path) -> None:
    code, _, err = start(tmp_path, "give up").output()
    assert code == 1
    assert "ended with exit code 0, but the run did not finish: it ended at step 0 of 100" in err


@pytest.mark.slow
def test_second_launch_is_refused_and_a_run_can_be_stopped(tmp_path: Path) -> None:
    launched = start_and_wait(tmp_path, "commit")
    code, _, err = start(tmp_path, "run").output()
    assert code == 1
    assert "is already being trained on this machine, by the processes" in err
    listing = subprocess.run([MMSCALE, "runs", "ls", str(tmp_path)], cwd=REPO, capture_output=True, text=True, check=True)
    assert "running" in listing.stdout
    subprocess.run([MMSCALE, "runs", "stop", str(tmp_path / "run")], cwd=REPO, check=True, timeout=60)
    assert launched.output(20)[0] == 85
    assert launched.processes() == []


@pytest.mark.parametrize("engine", ["deepspeed", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_killed_launcher_leaves_no_rank(tmp_path: Path, engine: str) -> None:
    launched = start_and_wait(tmp_path, "run", "--engine", engine)
    launched.process.kill()
    launched.output()
    wait_for(lambda: launched.processes() == [], 15)
    assert summarize(tmp_path / "run").state == "died"


@pytest.mark.slow
def test_a_launcher_that_is_killed_before_its_ranks_are_there_leaves_none_to_come(tmp_path: Path) -> None:
    launched = start(tmp_path, "run")
    wait_for(lambda: len(launched.named("bin/deepspeed")) > 0, 60)
    launched.process.kill()
    launched.output()
    wait_for(lambda: launched.processes() == [], 5)


@pytest.mark.slow
def test_torchrun_finishes_and_fails_alike(tmp_path: Path) -> None:
    (tmp_path / "good").mkdir()
    (tmp_path / "bad").mkdir()
    code, out, err = start(tmp_path / "good", "finish", "--engine", "torchrun").output()
    assert (code, "hello from rank 0 of 2" in out) == (0, True), err
    launched = start_and_wait(tmp_path / "bad", "run", "--engine", "torchrun")
    launched.ranks()[1].kill()
    code, _, err = launched.output(60)
    assert code == 1
    assert "rank 1 ended first" in err
    assert launched.processes() == []
