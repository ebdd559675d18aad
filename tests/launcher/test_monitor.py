"""Runs are summed up from their folders alone, a run that died without a word included."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import run_commands
from launcher.monitor import LaunchRecord, find_runs, last_metrics, read_launch, read_status, summarize, write_launch
from mmscale.errors import CheckpointError, RunError
from mmscale.run_folder import RunFolder


def write_run(run: Path, state: str = "running", **values: object) -> Path:
    RunFolder(run).write_status(state, **({"step": 20, "steps": 100} | values))
    lines = [{"step": step, "loss": 1 / step, "samples_per_s": 50.0, "step_s": 2.0} for step in (10, 20)]
    RunFolder(run).metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3')
    return run


def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_running_run(tmp_path: Path) -> None:
    summary = summarize(write_run(tmp_path))
    assert (summary.state, summary.step, summary.steps, summary.loss, summary.eta_s) == ("running", 20, 100, 0.05, 160.0)


def test_run_whose_process_is_gone_has_died(tmp_path: Path) -> None:
    assert summarize(write_run(tmp_path, pid=ended_process())).state == "died"


def test_run_on_another_host_is_taken_at_its_word(tmp_path: Path) -> None:
    assert summarize(write_run(tmp_path, pid=ended_process(), host="another-host")).state == "running"


def launch_record(exit_code: int | None, launch_id: str = "b") -> LaunchRecord:
    return LaunchRecord(
        launch_id=launch_id,
        engine="deepspeed",
        ranks=2,
        arguments=("stage.yaml",),
        host=os.uname().nodename,
        pid=ended_process(),
        created=0.0,
        exit_code=exit_code,
    )


@pytest.mark.parametrize(("exit_code", "state"), [(1, "failed"), (None, "died")])
def test_status_of_an_earlier_launch_does_not_count(tmp_path: Path, exit_code: int | None, state: str) -> None:
    write_run(tmp_path, "finished", launch_id="a")
    write_launch(tmp_path, launch_record(exit_code))
    assert summarize(tmp_path).state == state


def test_launch_record_is_read_back(tmp_path: Path) -> None:
    record = launch_record(None)
    write_launch(tmp_path, record)
    assert read_launch(tmp_path) == record
    assert record.launcher() is None


def test_runs_are_found_below_a_folder(tmp_path: Path) -> None:
    for name in ("b", "a/deep", ".hidden"):
        write_run(tmp_path / name)
    (tmp_path / "empty").mkdir()
    assert list(find_runs(tmp_path)) == [tmp_path / "a/deep", tmp_path / "b"]


def test_torn_last_line_of_metrics_is_left_out(tmp_path: Path) -> None:
    newest = last_metrics(write_run(tmp_path))
    assert newest is not None
    assert newest["step"] == 20


def test_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    assert read_status(tmp_path) is None
    with pytest.raises(RunError, match=r"is not a run folder: it has no status\.json"):
        summarize(tmp_path)
    with pytest.raises(RunError, match="There is no run at or below"):
        run_commands.ls(tmp_path)
    with pytest.raises(CheckpointError, match="has no committed checkpoint"):
        run_commands.list_checkpoints(tmp_path)


def test_damaged_status_is_named(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text("{")
    with pytest.raises(RunError, match=r"status\.json' cannot be read"):
        summarize(tmp_path)


def test_stopping_what_does_not_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"Nothing of the run .* runs on this machine"):
        run_commands.stop(write_run(tmp_path), 1.0)


def test_listing_and_showing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "a")
    run_commands.ls(tmp_path)
    run_commands.show(tmp_path / "a")
    out = capsys.readouterr().out
    assert "20 of 100" in out
    assert "0:02:40" in out
    assert "samples_per_s                50" in out
