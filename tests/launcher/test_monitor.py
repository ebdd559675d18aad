"""Runs are summed up from their folders alone, a run that died without a word included."""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from launcher import run_commands
from launcher.logs import LineFollower
from launcher.monitor import LaunchRecord, find_runs, last_metrics, newest_job, read_launch, read_status, summarize, write_launch
from launcher.plan import LaunchPlan, LaunchRequest
from launcher.start import plan_here
from launcher.submit import submit
from launcher.supervise import supervise
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
    assert (summary.state, summary.step, summary.steps, summary.metrics["loss"], summary.eta_s) == ("running", 20, 100, 0.05, 160.0)


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


@pytest.mark.parametrize(
    ("exit_code", "before", "state"),
    [(1, "stopped", "failed"), (1, "running", "failed"), (1, "finished", "finished"), (None, "finished", "died")],
)
def test_status_of_an_earlier_launch_does_not_count(tmp_path: Path, exit_code: int | None, before: str, state: str) -> None:
    """But that a run is finished: what was refused since has changed nothing."""
    write_run(tmp_path, before, launch_id="a")
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


def write_logs(run: Path, launch_id: str, **texts: str) -> None:
    folder = run / "logs" / launch_id
    folder.mkdir(parents=True)
    for rank, text in texts.items():
        (folder / f"rank-{rank.removeprefix('r')}.log").write_text(text)


@pytest.mark.parametrize(
    ("history", "launch_id", "state"),
    [
        ([], "slurm-7-0", "running"),
        ([], None, "submitted"),
        (["T slurm-6-0 ended code=1 next=stop"], None, "submitted"),
        (["T slurm-7-0 began nodes=n1"], None, "starting"),
        (["T slurm-7-0 began nodes=n1"], "slurm-7-0", "running"),
        (["T slurm-7-1 began nodes=n1"], "slurm-7-0", "starting"),
        (["T slurm-7-0 ended code=1 checkpoint=none next=requeue failed=n2"], "slurm-7-0", "requeued"),
        (["T slurm-7-0 ended code=86 checkpoint=none next=stop: no"], "slurm-7-0", "failed"),
        (["T slurm-7-0 ended code=85 checkpoint=none next=stop: asked"], "slurm-7-0", "stopped"),
    ],
)
def test_state_of_a_job_is_told_from_the_folder(tmp_path: Path, history: list[str], launch_id: str | None, state: str) -> None:
    if launch_id is not None:
        write_run(tmp_path, launch_id=launch_id, pid=ended_process())
    (tmp_path / "job.history").write_text("".join(line + "\n" for line in history))
    write_launch(tmp_path, replace(launch_record(None), job="7", engine="slurm"))
    assert summarize(tmp_path).state == state


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """SLURM's client as far as it is asked here: job 8 runs, no other is in the queue; what scancel was told is in a file."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    told = tmp_path / "scancel"
    for name, line in (("squeue", 'case "$*" in *--jobs=8\\ *) echo RUNNING ;; esac'), ("scancel", f'echo "$*" >> {told}')):
        (bin_folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (bin_folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_folder}{os.pathsep}{os.environ['PATH']}")
    return told


@pytest.mark.parametrize("job", ["7", None])
def test_a_script_that_was_submitted_by_hand_is_the_runs_job(tmp_path: Path, queue: Path, job: str | None) -> None:
    run = tmp_path / "run"
    write_run(run, launch_id="slurm-8-0", pid=ended_process())
    (run / "job.history").write_text("T slurm-8-0 began nodes=n1\n")
    if job is not None:
        write_launch(run, replace(launch_record(None), job=job, engine="slurm"))
    assert summarize(run).state == "running"
    assert newest_job(run) == "8"
    plan = plan_of_run(run)
    for launch in (supervise, submit):
        with pytest.raises(RunError, match=r"is SLURM's job 8 already, which is running: two launches would write over each other"):
            launch(plan)
    run_commands.stop(run, None)
    assert queue.read_text() == "--signal=USR1 --batch 8\n"
    assert (run / "stop").exists()


def test_a_launcher_whose_ranks_are_elsewhere_keeps_its_run(tmp_path: Path) -> None:
    """Its own processes need not show the run in their environment: pdsh's do not."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as other:
        try:
            created = psutil.Process(other.pid).create_time()
            write_launch(tmp_path, replace(launch_record(None), pid=other.pid, created=created, grace_s=20.0))
            with pytest.raises(RunError, match=rf"is already being trained on this machine, by the processes {other.pid}: two launches"):
                supervise(plan_of_run(tmp_path))
            with pytest.raises(RunError, match=r"`--grace-s 600`: the run's launcher kills the ranks 20 s after a signal"):
                run_commands.stop(tmp_path, 600.0)
            assert other.poll() is None
            run_commands.stop(tmp_path, None)
            assert other.wait(10) == -15
        finally:
            other.kill()


def plan_of_run(run: Path) -> LaunchPlan:
    """Of two ranks on this machine."""
    return plan_here(LaunchRequest(arguments=("configs/demo/pretrain.yaml", f"run={run}")))


def test_failure_is_shown_first_with_its_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, "running", launch_id="b")
    write_launch(tmp_path, launch_record(1))
    write_logs(tmp_path, "a", r0="old\n")
    write_logs(tmp_path, "b", r0="step 1\n", r1="step 1\nTraceback (most recent call last):\nValueError: odd\n")
    run_commands.show(tmp_path)
    out = capsys.readouterr().out
    assert out.startswith("rank 1 failed first (")
    assert "  [rank 1] ValueError: odd\nstate        failed, step 20 of 100\n" in out
    assert "restarts     1\n" in out


@pytest.mark.parametrize(("launch_id", "is_shown"), [("b", True), ("a", False)])
def test_nodes_that_failed_are_shown_first(tmp_path: Path, capsys: pytest.CaptureFixture[str], launch_id: str, is_shown: bool) -> None:
    write_launch(tmp_path, launch_record(88))
    finding = {"check": "gpus", "level": "fail", "what": "GPU 3 of n2 has 1 memory errors", "fix": "Leave it out.", "node": "n2"}
    record = {"launch_id": launch_id, "findings": [finding, finding | {"level": "pass"}]}
    RunFolder(tmp_path).nodes.write_text(json.dumps(record) + "\n")
    run_commands.show(tmp_path)
    out = capsys.readouterr().out
    assert out.startswith("The nodes failed their check:\nfail  gpus           GPU 3 of n2 has 1 memory errors\n") == is_shown
    assert "state        failed" in out


def test_progress_in_a_line(tmp_path: Path) -> None:
    line = run_commands.progress(summarize(write_run(tmp_path)))
    assert line == "running   step 20/100  loss 0.0500  50.0 samples/s  MFU -  data wait 0%  left 0:02:40  restarts 0  committed -"


def test_lines_of_the_ranks_have_their_number(tmp_path: Path) -> None:
    write_run(tmp_path, "finished")
    with pytest.raises(RunError, match="has no output of its ranks"):
        run_commands.show_logs(tmp_path, [], 2)
    write_logs(tmp_path, "a", r0="one\ntwo\nthree\n", r1="four\n")
    out = io.StringIO()
    run_commands.show_logs(tmp_path, [], 2, follow=True, to=out)
    assert out.getvalue() == "[rank 0] two\n[rank 0] three\n[rank 1] four\n"
    out = io.StringIO()
    run_commands.show_logs(tmp_path, [1], 2, to=out)
    assert out.getvalue() == "[rank 1] four\n"


def test_follower_gives_whole_lines(tmp_path: Path) -> None:
    follower = LineFollower(tmp_path / "log")
    seen = []
    for text in ("one\ntw", "o\nthr"):
        with follower.path.open("a") as file:
            file.write(text)
        seen += follower.lines()
    assert seen == ["one", "two"]
