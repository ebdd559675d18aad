"""Jobs on a real SLURM of two nodes: whatever ends an attempt, the run ends as one that nothing has happened to."""

from __future__ import annotations

import re

import pytest

from tests.cluster.cluster import wait_for
from tests.cluster.jobs import TRAIN, Jobs
from tests.launcher.launching import MMSCALE

pytestmark = pytest.mark.cluster


def near_the_limit(jobs: Jobs, job: str) -> None:
    """Lower a running job's limit to the next minute but half a one, so that SLURM's signal before it is due, and not past."""
    words = jobs.cluster.run("squeue", "--noheader", f"--jobs={job}", "--format=%M").stdout.strip().split(":")
    minutes = int(words[-2]) + (1 if int(words[-1]) < 30 else 2)
    jobs.cluster.run("scontrol", "update", f"jobid={job}", f"timelimit={minutes}")


@pytest.fixture(scope="module")
def undisturbed(jobs: Jobs) -> str:
    """A run that was really trained, and that nothing happened to."""
    jobs.wait(jobs.submit("undisturbed", module=TRAIN), "COMPLETED")
    return "undisturbed"


def test_job_runs_on_both_nodes_to_its_end(jobs: Jobs) -> None:
    job = jobs.submit("plain")
    assert jobs.wait(job, "COMPLETED")["ExitCode"] == "0:0"
    assert jobs.history("plain") == ["began checkpoint=none nodes=n[1-2]", "ended code=0 checkpoint=step-00000012 next=stop"]
    logs = jobs.folder / "plain" / "logs" / f"slurm-{job}-0"
    assert [(logs / f"rank-{rank}.log").read_text() for rank in (0, 1)] == ["rank 0 on n1\n", "rank 1 on n2\n"]
    jobs.nothing_left()


def test_script_runs_by_itself(jobs: Jobs) -> None:
    """What a launch has written is all that a user needs to go on, with sbatch alone."""
    jobs.wait(jobs.submit("by-hand"), "COMPLETED")
    for checkpoint in sorted((jobs.folder / "by-hand" / "checkpoints").iterdir())[1:]:
        checkpoint.rename(checkpoint.with_name(f".away-{checkpoint.name}"))
    job = jobs.cluster.run("sbatch", "--parsable", jobs.folder / "by-hand" / "job.sbatch").stdout.strip()
    jobs.wait(job, "COMPLETED")
    assert jobs.history("by-hand")[-2:] == [
        "began checkpoint=step-00000004 nodes=n[1-2]",
        "ended code=0 checkpoint=step-00000012 next=stop",
    ]


def test_fault_at_every_start_ends_with_86_and_the_node_is_avoided(jobs: Jobs) -> None:
    options = ["--set", "slurm.restarts=3", "--set", "slurm.node_failures=2"]
    job = jobs.submit("fault", *options, behaviour="fail on n2")
    wait_for(lambda: len(jobs.history("fault")) == 2, 240)
    jobs.cluster.hurry(job)
    wait_for(lambda: len(jobs.history("fault")) == 4, 240)
    # the peer of a rank that failed waits as in a collective, until srun ends it: 143, or 137
    assert re.fullmatch(r"ended code=1(43|37) checkpoint=none next=requeue failed=n2", jobs.history("fault")[1])
    assert re.fullmatch(r"ended code=1(43|37) checkpoint=none next=requeue failed=n2 avoid=n2", jobs.history("fault")[3])
    wait_for(lambda: jobs.cluster.job(job)["ExcNodeList"] == "n2", 90)
    jobs.cluster.run("scontrol", "update", f"jobid={job}", "excnodelist=")
    jobs.cluster.hurry(job)
    assert jobs.wait(job, "FAILED")["ExitCode"] == "86:0"
    assert jobs.history("fault")[-1] == "ended code=86 checkpoint=none next=stop: 3 attempts in a row added no checkpoint"
    jobs.nothing_left()


def test_cancelled_job_commits_and_goes_on_when_submitted_again(jobs: Jobs, undisturbed: str) -> None:
    job = jobs.submit("cancelled", module=TRAIN, allowed=2)
    jobs.reach("cancelled", 2)
    jobs.cluster.run("scancel", job)
    jobs.wait(job, "CANCELLED")
    wait_for(lambda: jobs.history("cancelled")[-1].startswith("ended"), 60)
    jobs.nothing_left()
    assert jobs.history("cancelled")[-1] == "ended code=85 checkpoint=step-00000003 next=stop: SLURM is ending the job"
    jobs.wait(jobs.submit("cancelled", module=TRAIN), "COMPLETED")
    jobs.same("cancelled", undisturbed)


def test_preempted_job_commits_and_is_requeued(jobs: Jobs, undisturbed: str) -> None:
    job = jobs.submit("preempted", module=TRAIN, allowed=2)
    jobs.reach("preempted", 2)
    words = ["--partition=high", "--nodes=2", "--ntasks-per-node=4", "--output=/dev/null", "--wrap=sleep 1"]
    jobs.wait(jobs.cluster.run("sbatch", "--parsable", *words).stdout.strip(), "COMPLETED")
    jobs.allow()
    jobs.cluster.hurry(job)
    jobs.wait(job, "COMPLETED")
    history = jobs.history("preempted")
    assert "ended code=85 checkpoint=step-00000003 next=requeue" in history
    assert history[-1] == "ended code=0 checkpoint=step-00000012 next=stop"
    jobs.same("preempted", undisturbed)


def test_lost_node_costs_what_came_after_the_checkpoint(jobs: Jobs, undisturbed: str) -> None:
    """The ranks wait for one another in a step, over a link that is no more."""
    job = jobs.submit("lost", module=TRAIN, allowed=5)
    jobs.reach("lost", 5)
    jobs.cluster.run("ip", "link", "set", "v2", "down")
    try:
        jobs.allow()
        wait_for(lambda: jobs.cluster.job(job)["JobState"] == "PENDING", 120)
        assert jobs.step("lost") == 5
    finally:
        jobs.cluster.run("ip", "link", "set", "v2", "up")
    wait_for(lambda: "2 idle" in jobs.cluster.run("sinfo", "-h", "-p", "low", "-o", "%D %t").stdout, 120)
    jobs.cluster.hurry(job)
    jobs.wait(job, "COMPLETED")
    began = [line for line in jobs.history("lost") if line.startswith("began")]
    assert began[0] == "began checkpoint=none nodes=n[1-2]"
    assert began[-1] == "began checkpoint=step-00000004 nodes=n[1-2]"
    jobs.same("lost", undisturbed)
    jobs.nothing_left()


def test_run_is_stopped_by_name_and_not_submitted_twice(jobs: Jobs) -> None:
    """Submitted by a launch, then with the script by hand."""
    job = jobs.submit("stopped", allowed=2)
    for step in (2, 6):
        jobs.reach("stopped", step)
        for engine in ("slurm", "deepspeed"):
            again = jobs.cluster.run(*jobs.launch("stopped", "--engine", engine, allowed=step), check=False)
            assert (again.returncode, f"is SLURM's job {job} already, which is running" in again.stderr) == (1, True), again.stderr
        assert f"state        running, step {step} of 12" in jobs.cluster.run(MMSCALE, "runs", "show", jobs.folder / "stopped").stdout
        jobs.cluster.run(MMSCALE, "runs", "stop", jobs.folder / "stopped")
        assert jobs.wait(job, "FAILED")["ExitCode"] == "85:0"
        assert jobs.history("stopped")[-1].endswith("next=stop: asked to stop")
        jobs.nothing_left()
        if step == 2:
            jobs.allow(6)
            job = jobs.cluster.run("sbatch", "--parsable", jobs.folder / "stopped" / "job.sbatch").stdout.strip()


def test_killed_rank_and_time_limit(jobs: Jobs, undisturbed: str) -> None:
    job = jobs.submit("disturbed", module=TRAIN, allowed=6)
    jobs.reach("disturbed", 6)
    jobs.rank(1, TRAIN).kill()
    jobs.allow(7)
    jobs.cluster.hurry(job)
    jobs.reach("disturbed", 7)
    near_the_limit(jobs, job)
    wait_for(lambda: len(jobs.history("disturbed")) == 5, 150)
    jobs.allow()
    jobs.cluster.hurry(job)
    assert jobs.wait(job, "COMPLETED")["ExitCode"] == "0:0"
    history = jobs.history("disturbed")
    assert re.fullmatch(r"ended code=1(37|43) checkpoint=step-00000004 next=requeue failed=n2", history[1])  # its peer is asked to end
    assert history[3] == "USR1: asking the ranks for a checkpoint"
    assert history[4] == "ended code=85 checkpoint=step-00000008 next=requeue"
    assert history[-1] == "ended code=0 checkpoint=step-00000012 next=stop"
    jobs.same("disturbed", undisturbed)
    jobs.nothing_left()
