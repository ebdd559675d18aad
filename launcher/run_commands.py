"""`mmscale runs ...` and `mmscale checkpoints ...`: what is printed about run folders, and stopping a run."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from pathlib import Path

from launcher import monitor, processes
from mmscale.checkpoint.find import committed, step_of
from mmscale.checkpoint.manifest import find_fault, read_manifest
from mmscale.checkpoint.retention import is_pinned
from mmscale.errors import CheckpointError, RunError
from mmscale.run_folder import RunFolder

ROW = "{:<32} {:<9} {:>17} {:>9} {:>10} {:>9}"


def ls(below: Path) -> None:
    """Print a line a run.

    Raises:
        RunError: there is none.
    """
    runs = [monitor.summarize(run) for run in monitor.find_runs(below)]
    if not runs:
        raise RunError(f"There is no run at or below {str(below)!r}. Give the folder that holds your runs.")
    print(ROW.format("run", "state", "step", "loss", "samples/s", "left"))
    for run in runs:
        steps = f"{_text(run.step)} of {_text(run.steps)}"
        rate = "-" if run.samples_per_s is None else f"{run.samples_per_s:,.1f}"
        loss = "-" if run.loss is None else f"{run.loss:.4f}"
        print(ROW.format(str(run.run), run.state, steps, loss, rate, "-" if run.eta_s is None else _duration(run.eta_s)))


def show(run: Path) -> None:
    """Print what is known of one run.

    Raises:
        RunError: the folder is not a run's.
    """
    summary, launch, metrics = monitor.summarize(run), monitor.read_launch(run), monitor.last_metrics(run)
    print(f"state        {summary.state}, step {_text(summary.step)} of {_text(summary.steps)}")
    if summary.eta_s is not None:
        print(f"left         {_duration(summary.eta_s)}")
    if launch is not None:
        ended = "" if launch.exit_code is None else f", exit code {launch.exit_code}"
        print(f"launch       {launch.launch_id}: {launch.engine}, {launch.ranks} ranks, from {launch.host}{ended}")
        print(f"arguments    {' '.join(launch.arguments)}")
    found = committed(RunFolder(run).checkpoints)
    print(f"checkpoints  {', '.join(folder.name for folder in found) or 'none'}")
    _print_metrics(metrics or {})


def stop(run: Path, grace_s: float) -> None:
    """End a run's processes on this machine: ask its launcher, or the ranks that it left behind; kill what does not end.

    Raises:
        RunError: nothing of it runs here.
    """
    launch = monitor.read_launch(run)
    launcher = None if launch is None else launch.launcher()
    living = list(processes.processes_of_run(run.resolve()))
    if launcher is None and not living:
        raise RunError(f"Nothing of the run {str(run)!r} runs on this machine. `mmscale runs show {run}` tells how it stands.")
    for process in [launcher] if launcher is not None else living:
        processes.send(process, signal.SIGTERM)
    waited = [*living, *([launcher] if launcher is not None else [])]
    for process in processes.wait_until_gone(waited, grace_s):
        processes.send(process, signal.SIGKILL)
    processes.wait_until_gone(waited, 5.0)
    print(f"stopped: {run} ({monitor.summarize(run).state})")


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
