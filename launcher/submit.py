"""Submit a plan's sbatch script, and what SLURM says of a job."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from launcher.engines import slurm
from launcher.monitor import LaunchRecord, newest_job, write_launch
from launcher.plan import LaunchPlan
from mmscale.errors import RunError
from mmscale.run_folder import RunFolder


def submit(plan: LaunchPlan) -> int:
    """Write the script into the run folder and submit it.

    Returns:
        0: the job is in the queue.

    Raises:
        RunError: a job of this run is in the queue already, or sbatch refuses.
    """
    program = slurm.program(plan)
    if (queued := queued_job(plan.run)) is not None:
        raise already_a_job(plan.run, *queued)
    RunFolder(plan.run).make()
    for path, text in slurm.files(plan).items():
        path.write_text(text, encoding="utf-8")
    done = subprocess.run([program, *slurm.command(plan)[1:]], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RunError(f"sbatch refuses {slurm.script_path(plan)}: {' '.join(done.stderr.split())}")
    job = done.stdout.strip().split(";")[0]
    write_launch(plan.run, LaunchRecord.started(plan, job=job))
    print(f"job {job}: {plan.nodes} nodes x {len(plan.hosts[0][1])} ranks, {slurm.script_path(plan)}")
    print(f"mmscale launch: `mmscale runs show {plan.run}` tells how far it is, `mmscale runs stop {plan.run}` ends it.", file=sys.stderr)
    return 0


def queued_job(run: Path) -> tuple[str, str] | None:
    """The run's newest job and its state, where it is in the queue: submitted from here, by a pipeline, or with the script by hand."""
    job = newest_job(run)
    state = None if job is None else job_state(job)
    return None if job is None or state is None else (job, state)


def already_a_job(run: Path, job: str, state: str) -> RunError:
    """What is said to a second launch of a run that is in the queue."""
    return RunError(
        f"The run {str(run)!r} is SLURM's job {job} already, which is {state.lower()}: two launches would write over each other. Wait for "
        f"it, or stop it with `mmscale runs stop {run}`."
    )


def job_state(job: str) -> str | None:
    """A job's state in SLURM's words; None where it is not in the queue (any more) or this host has no squeue."""
    if shutil.which("squeue") is None:
        return None
    done = subprocess.run(["squeue", "--noheader", f"--jobs={job}", "--format=%T"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
