"""`mmscale runs ...` and `mmscale checkpoints ...`: what is printed about run folders, and stopping a run."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from launcher import logs, monitor, processes, submit
from mmscale.checkpoint.find import committed, step_of
from mmscale.checkpoint.manifest import find_fault, read_manifest
from mmscale.checkpoint.retention import is_pinned
from mmscale.errors import CheckpointError, RunError
from mmscale.finding import render
from mmscale.run_folder import RunFolder

FOLLOW_S = 1.0
GRACE_S = 60.0
"""What ranks get to end whose launcher is gone."""
LAUNCHER_S = 15.0
"""What a launcher gets to clean up after the ranks' time is over."""
ROW = "{:<32} {:<9} {:>17} {:>9} {:>10} {:>6} {:>9}"
ENDED = {"finished", "stopped", "failed", "stuck", "died"}


def ls(below: Path) -> None:
    """Print a line a run.

    Raises:
        RunError: there is none.
    """
    runs = [monitor.summarize(run) for run in monitor.find_runs(below)]
    if not runs:
        raise RunError(f"There is no run at or below {str(below)!r}. Give the folder that holds your runs.")
    print(ROW.format("run", "state", "step", "loss", "samples/s", "MFU", "left"))
    for run in runs:
        steps = f"{_text(run.step)} of {_text(run.steps)}"
        words = [_number(run.metrics, name, form) for name, form in (("loss", ".4f"), ("samples_per_s", ",.1f"), ("mfu", ".1%"))]
        print(ROW.format(str(run.run), run.state, steps, *words, "-" if run.eta_s is None else _duration(run.eta_s)))


def show(run: Path, *, follow: bool = False) -> None:
    """Print what is known of one run, from its folder alone.

    Args:
        run: its folder.
        follow: go on with a line whenever something has changed, until the run has ended.

    Raises:
        RunError: the folder is not a run's.
    """
    summary, launch = monitor.summarize(run), monitor.read_launch(run)
    failed = monitor.unfit(run, launch) if launch is not None else []
    if failed and summary.state not in ("running", "finished", "stopped"):
        print(f"The nodes failed their check:\n{render(failed)}")
    _print_failure(summary)
    print(f"state        {summary.state}, step {_text(summary.step)} of {_text(summary.steps)}")
    if summary.eta_s is not None:
        print(f"left         {_duration(summary.eta_s)}")
    if summary.silent_s is not None and summary.state not in ENDED:
        print(f"last word    {_duration(summary.silent_s)} ago")
    if launch is not None:
        ended = "" if launch.exit_code is None else f", exit code {launch.exit_code}"
        job = "" if launch.job is None else f", job {launch.job}"
        print(f"launch       {launch.launch_id}: {launch.engine}{job}, {launch.ranks} ranks, from {launch.host}{ended}")
        print(f"arguments    {' '.join(launch.arguments)}")
    print(f"restarts     {max(0, summary.launches - 1)}")
    print(f"checkpoints  {', '.join(folder.name for folder in committed(RunFolder(run).checkpoints)) or 'none'}")
    if summary.checkpoint is not None:
        print(f"last commit  {_duration(time.time() - summary.checkpoint.stat().st_mtime)} ago")
    _print_metrics(summary.metrics)
    while follow and summary.state not in ENDED:
        time.sleep(FOLLOW_S)
        before, summary = summary, monitor.summarize(run)
        if (before.state, before.step, before.checkpoint) != (summary.state, summary.step, summary.checkpoint):
            print(progress(summary), flush=True)


def progress(run: monitor.RunSummary) -> str:
    """A run in one line, as `show --follow` prints it."""
    metrics, parts = run.metrics, [f"{run.state:<9} step {_text(run.step)}/{_text(run.steps)}"]
    if "loss" in metrics:
        parts.append(f"loss {metrics['loss']:.4f}")
    parts += [f"{_number(metrics, 'samples_per_s', ',.1f')} samples/s", f"MFU {_number(metrics, 'mfu', '.1%')}"]
    if metrics.get("step_s"):
        parts.append(f"data wait {metrics.get('data_wait_s', 0.0) / metrics['step_s']:.0%}")
    parts += [f"left {'-' if run.eta_s is None else _duration(run.eta_s)}", f"restarts {max(0, run.launches - 1)}"]
    return "  ".join([*parts, f"committed {'-' if run.checkpoint is None else run.checkpoint.name}"])


def show_logs(run: Path, ranks: Sequence[int], lines: int, *, follow: bool = False, to: TextIO = sys.stdout) -> None:
    """Print the ranks' output of the newest launch, each line with its rank before it.

    Args:
        run: its folder.
        ranks: only these; empty for all.
        lines: the last so many of each rank.
        follow: go on with what comes, until the run has ended.
        to: where to.

    Raises:
        RunError: no launch has written any output.
    """
    folders = [folder for folder in monitor.launch_logs(run) if monitor.rank_logs(folder)]
    if not folders:
        raise RunError(f"The run {str(run)!r} has no output of its ranks. `mmscale runs show {run}` tells how it stands.")
    files = {rank: path for rank, path in sorted(monitor.rank_logs(folders[-1]).items()) if not ranks or rank in ranks}
    followers = {rank: logs.LineFollower(path, start=path.stat().st_size) for rank, path in files.items()}
    for rank, path in files.items():
        to.writelines(f"[rank {rank}] {line}\n" for line in logs.tail(path, lines))
    while follow:
        ended = monitor.summarize(run).state in ENDED
        for rank, follower in followers.items():
            to.writelines(f"[rank {rank}] {line}\n" for line in follower.lines())
        to.flush()
        if ended:
            return
        time.sleep(FOLLOW_S)


def stop(run: Path, grace_s: float | None) -> None:
    """End a run's processes on this machine: ask its launcher, or the ranks that it left behind; kill what does not end.

    Args:
        run: its folder.
        grace_s: seconds until what is left is killed; None for those that its launcher gives the ranks, and some for itself.

    Raises:
        RunError: nothing of it runs here, or its launcher gives the ranks less time.
    """
    launch, queued = monitor.read_launch(run), submit.queued_job(run)
    if queued is not None:
        return _stop_job(run, *queued)
    if launch is not None and launch.job is not None:
        raise RunError(
            f"Job {launch.job} of the run {str(run)!r} is not in SLURM's queue as seen from here. `mmscale runs show {run}` tells how it "
            "stands."
        )
    launcher = None if launch is None else launch.launcher()
    living = list(processes.processes_of_run(run.resolve()))
    if launcher is None and not living:
        raise RunError(f"Nothing of the run {str(run)!r} runs on this machine. `mmscale runs show {run}` tells how it stands.")
    given = GRACE_S if launcher is None or launch is None or launch.grace_s is None else launch.grace_s
    if launcher is not None and grace_s is not None and grace_s > given:
        raise RunError(
            f"`--grace-s {grace_s:g}`: the run's launcher kills the ranks {given:g} s after a signal, as `mmscale launch --grace-s` said. "
            f"Give at most {given:g}, or none for that."
        )
    grace_s = given + LAUNCHER_S if grace_s is None else grace_s
    for process in [launcher] if launcher is not None else living:
        processes.send(process, signal.SIGTERM)
    waited = [*living, *([launcher] if launcher is not None else [])]
    for process in processes.wait_until_gone(waited, grace_s):
        processes.send(process, signal.SIGKILL)
    processes.wait_until_gone(waited, 5.0)
    print(f"stopped: {run} ({monitor.summarize(run).state})")


def _stop_job(run: Path, job: str, state: str) -> None:
    """Have a job's ranks commit a checkpoint and end, for good: its script sees the mark and does not requeue."""
    (run / "stop").touch()
    words = ["--signal=USR1", "--batch"] if state == "RUNNING" else []
    subprocess.run(["scancel", *words, job], check=True)
    print(f"job {job} was {state.lower()} and is {'asked for a checkpoint and its end' if words else 'cancelled'}: {run}")


def list_checkpoints(run: Path) -> None:
    """Print a line a committed checkpoint.

    Raises:
        CheckpointError: the run has none.
    """
    for folder in _checkpoints(run):
        size = sum(entry.size for entry in read_manifest(folder))
        age = time.time() - folder.stat().st_mtime
        pinned = "   pinned" if is_pinned(folder) else ""
        print(f"{folder}   step {step_of(folder):>8}   {size / 2**20:>10,.1f} MiB   {_duration(age)} old{pinned}")


def verify_checkpoints(run: Path) -> int:
    """Re-hash a run's checkpoints.

    Returns:
        1 when one is damaged, else 0.

    Raises:
        CheckpointError: the run has none.
    """
    faults = 0
    for folder in _checkpoints(run):
        fault = find_fault(folder)
        faults += fault is not None
        print(f"{folder}   {'good' if fault is None else 'DAMAGED: ' + fault}")
    return 1 if faults else 0


def _checkpoints(run: Path) -> list[Path]:
    found = committed(RunFolder(run).checkpoints)
    if not found:
        raise CheckpointError(f"The run {str(run)!r} has no committed checkpoint.")
    return found


def _print_failure(summary: monitor.RunSummary) -> None:
    """The words of the rank that failed first, before everything else; nothing of a run that has not failed."""
    folders = monitor.launch_logs(summary.run)
    if summary.state not in ("failed", "stuck", "died", "requeued") or not folders:
        return
    files = monitor.rank_logs(folders[-1])
    rank = logs.first_failure({}, files)
    if rank is not None:
        print(f"rank {rank} failed first ({files[rank]}):")
        print("\n".join(f"  [rank {rank}] {line}" for line in logs.last_words(files[rank])))


def _number(metrics: Mapping[str, Any], name: str, form: str) -> str:
    return "-" if metrics.get(name) is None else format(metrics[name], form)


def _print_metrics(metrics: Mapping[str, object]) -> None:
    for name, value in metrics.items():
        if name not in ("step", "time"):
            print(f"{name:<28} {f'{value:.6g}' if isinstance(value, float) else value}")


def _text(value: object) -> str:
    return "?" if value is None else str(value)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
