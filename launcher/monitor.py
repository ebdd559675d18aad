"""What a run is doing, read from its folder: status.json, metrics.jsonl, and launch.json, which the launcher writes."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from launcher.plan import LaunchPlan
from mmscale.errors import RunError
from mmscale.run_folder import RunFolder, read_lines, replace_file


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """status.json, written by rank 0."""

    state: str
    """running, finished, stopped or failed."""
    step: int | None
    steps: int | None
    pid: int | None
    host: str | None
    launch_id: str | None
    """The launch that wrote it; None for a run that `mmscale launch` did not start."""
    time: float | None
    """Seconds since the epoch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchRecord:
    """launch.json: the newest launch of a run."""

    launch_id: str
    engine: str
    ranks: int
    arguments: tuple[str, ...]
    host: str
    pid: int
    """Of the launcher."""
    created: float
    """When that process was created, which tells it from a later one of the same number."""
    exit_code: int | None = None
    """None while it runs, and for a job of SLURM."""
    ended_at: float | None = None
    job: str | None = None
    """SLURM's number of the job that was submitted."""

    @staticmethod
    def started(plan: LaunchPlan, job: str | None = None) -> LaunchRecord:
        """The record of a launch by this process, or of a job that it submitted."""
        me = psutil.Process()
        return LaunchRecord(
            launch_id=plan.launch_id,
            engine=plan.engine,
            ranks=plan.ranks,
            arguments=plan.arguments,
            host=os.uname().nodename,
            pid=me.pid,
            created=me.create_time(),
            job=job,
        )

    def ended(self, exit_code: int) -> LaunchRecord:
        """The record once the launch is over."""
        return replace(self, exit_code=exit_code, ended_at=time.time())

    def wrote(self, status: Status | None) -> bool:
        """Whether a status is this launch's, or an attempt's of this job."""
        launch_id = None if status is None else status.launch_id
        return launch_id == self.launch_id or (self.job is not None and str(launch_id).startswith(f"slurm-{self.job}-"))

    def launcher(self) -> psutil.Process | None:
        """The launcher's process, where it still runs on this machine."""
        if self.exit_code is not None or self.job is not None or self.host != os.uname().nodename:
            return None
        try:
            process = psutil.Process(self.pid)
            return process if abs(process.create_time() - self.created) < 1 and process.status() != psutil.STATUS_ZOMBIE else None
        except psutil.NoSuchProcess:
            return None


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSummary:
    """A run in one line."""

    run: Path
    state: str
    """Status.state, or `died`: it says running, and no process of it is left on this machine."""
    step: int | None
    steps: int | None
    loss: float | None
    samples_per_s: float | None
    eta_s: float | None
    """Time to the last step at the newest rate; None unless it runs."""


def read_status(run: Path) -> Status | None:
    """Read status.json; None where there is none."""
    record = _read_json(RunFolder(run).status)
    if record is None:
        return None
    names = ("step", "steps", "pid", "host", "launch_id", "time")
    return Status(state=str(record.get("state")), **{name: record.get(name) for name in names})


def read_launch(run: Path) -> LaunchRecord | None:
    """Read launch.json; None where there is none."""
    record = _read_json(run / "launch.json")
    return None if record is None else LaunchRecord(**(record | {"arguments": tuple(record["arguments"])}))


def write_launch(run: Path, record: LaunchRecord) -> None:
    """Replace launch.json."""
    replace_file(run / "launch.json", json.dumps(asdict(record)) + "\n")


def find_runs(below: Path) -> Iterator[Path]:
    """Yield the run folders at and below a folder, in order of name; run folders are not searched further."""
    if RunFolder(below).status.is_file() or (below / "launch.json").is_file():
        yield below
    elif below.is_dir():
        for folder in sorted(p for p in below.iterdir() if p.is_dir() and not p.name.startswith(".")):
            yield from find_runs(folder)


def summarize(run: Path) -> RunSummary:
    """Read how far a run is.

    Raises:
        RunError: the folder is not a run's, or a file of it is damaged.
    """
    status, launch = read_status(run), read_launch(run)
    if status is None and launch is None:
        raise RunError(
            f"{str(run)!r} is not a run folder: it has no status.json. Give the folder that `run` names in the stage's configuration."
        )
    last = last_metrics(run) or {}
    state = _state(status, launch)
    step = status.step if status is not None and status.step is not None else last.get("step")
    steps = status.steps if status is not None else None
    seconds = last.get("step_s")
    eta = None
    if state == "running" and steps is not None and step is not None and seconds is not None:
        eta = (steps - step) * seconds
    return RunSummary(
        run=run, state=state, step=step, steps=steps, loss=last.get("loss"), samples_per_s=last.get("samples_per_s"), eta_s=eta
    )


def last_metrics(run: Path) -> Mapping[str, Any] | None:
    """The newest line of metrics.jsonl; None where there is none."""
    newest = deque(read_lines(RunFolder(run).metrics), maxlen=1)
    return newest[0] if newest else None


def _state(status: Status | None, launch: LaunchRecord | None) -> str:
    """A process that dies by kill -9 cannot say so: whether it lives is looked up, on the machine it ran on."""
    if launch is not None and (status is None or status.launch_id != launch.launch_id):
        if launch.exit_code is not None:
            return "failed"
        return "starting" if launch.launcher() is not None or launch.host != os.uname().nodename else "died"
    if status is None or status.state != "running":
        return "unknown" if status is None else status.state
    if launch is not None and launch.exit_code is not None:
        return "failed"
    is_here = status.host == os.uname().nodename
    return "died" if is_here and status.pid is not None and not psutil.pid_exists(status.pid) else "running"


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise RunError(f"{str(path)!r} cannot be read: {e}. Delete it; the run's checkpoints do not depend on it.") from e
    if not isinstance(content, dict):
        raise RunError(f"{str(path)!r} does not hold a JSON object. Delete it; the run's checkpoints do not depend on it.")
    return content
