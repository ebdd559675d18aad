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
from mmscale.checkpoint.find import committed
from mmscale.errors import RunError
from mmscale.finding import Finding
from mmscale.run_folder import RunFolder, read_lines, replace_file


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """status.json, written by rank 0."""

    state: str
    """running, finished, stopped, failed, or stuck (exit code 86)."""
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
    grace_s: float | None = None
    """Seconds that the launcher gives its ranks to end; None for a job of SLURM."""

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
            grace_s=plan.grace_s if job is None else None,
        )

    def ended(self, exit_code: int) -> LaunchRecord:
        """The record once the launch is over."""
        return replace(self, exit_code=exit_code, ended_at=time.time())

    def wrote(self, status: Status | None) -> bool:
        """Whether a status is this launch's, or an attempt's of this job."""
        return self.has(None if status is None else status.launch_id)

    def has(self, launch_id: str | None) -> bool:
        """Whether a launch's name is this one's, or an attempt's of this job."""
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
    """How far a run is."""

    run: Path
    state: str
    """Status.state; `submitted`, `starting` and `requeued` before it runs (again); `died`: it says running, and no process of it is left
    on this machine."""
    step: int | None
    steps: int | None
    metrics: Mapping[str, Any]
    """The newest line of metrics.jsonl; empty where there is none."""
    eta_s: float | None
    """Time to the last step at the newest rate; None unless it runs."""
    silent_s: float | None
    """Time since it last wrote its status."""
    launches: int
    """How often its ranks were started."""
    checkpoint: Path | None
    """The newest that is committed."""


def read_status(run: Path) -> Status | None:
    """Read status.json; None where there is none."""
    record = _read_json(RunFolder(run).status)
    if record is None:
        return None
    names = ("step", "steps", "pid", "host", "launch_id", "time")
    return Status(state=str(record.get("state")), **{name: record.get(name) for name in names})


def read_launch(run: Path) -> LaunchRecord | None:
    """Read launch.json; None where there is none. A job's script that was submitted again by hand is the newer job."""
    record = _read_json(run / "launch.json")
    if record is None:
        return None
    launch = LaunchRecord(**(record | {"arguments": tuple(record["arguments"])}))
    return launch if launch.job is None else replace(launch, job=_newer(launch.job, _noted_job(run)))


def newest_job(run: Path) -> str | None:
    """SLURM's number of the newest job that was a launch of the run; None where there was none."""
    launch = read_launch(run)
    return _newer(launch.job if launch is not None else None, _noted_job(run))


def _noted_job(run: Path) -> str | None:
    """The job whose script has noted something last."""
    words = _last_note(run)
    return words[1].split("-")[1] if len(words) > 1 and words[1].startswith("slurm-") else None


def _newer(one: str | None, other: str | None) -> str | None:
    """SLURM's numbers rise."""
    known = [job for job in (one, other) if job is not None]
    return max(known, key=lambda job: (len(job), job), default=None)


def _last_note(run: Path) -> list[str]:
    path = run / "job.history"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return lines[-1].split() if lines else []


def write_launch(run: Path, record: LaunchRecord) -> None:
    """Replace launch.json."""
    replace_file(run / "launch.json", json.dumps(asdict(record)) + "\n")


def unfit(run: Path, launch: LaunchRecord) -> list[Finding]:
    """What failed in the newest check of a launch's nodes (nodes.json); nothing where they were good, or not checked."""
    record = _read_json(RunFolder(run).nodes)
    if record is None or not launch.has(record["launch_id"]):
        return []
    return [Finding(**finding) for finding in record["findings"] if finding["level"] == "fail"]


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
    state = _state(run, status, launch)
    step = status.step if status is not None and status.step is not None else last.get("step")
    steps = status.steps if status is not None else None
    seconds = last.get("step_s")
    eta = None
    if state == "running" and steps is not None and step is not None and seconds is not None:
        eta = (steps - step) * seconds
    checkpoints = committed(RunFolder(run).checkpoints)
    return RunSummary(
        run=run,
        state=state,
        step=step,
        steps=steps,
        metrics=last,
        eta_s=eta,
        silent_s=None if status is None or status.time is None else max(0.0, time.time() - status.time),
        launches=len(launch_logs(run)),
        checkpoint=checkpoints[-1] if checkpoints else None,
    )


def launch_logs(run: Path) -> list[Path]:
    """The folders of the ranks' output, one a launch or an attempt of a job, oldest first."""
    folder = run / "logs"
    return sorted((p for p in folder.iterdir() if p.is_dir()), key=lambda p: p.stat().st_mtime) if folder.is_dir() else []


def rank_logs(folder: Path) -> dict[int, Path]:
    """Rank -> its output, of a folder of `launch_logs`."""
    return {int(path.stem.removeprefix("rank-")): path for path in folder.glob("rank-*.log")}


def last_metrics(run: Path) -> Mapping[str, Any] | None:
    """The newest line of metrics.jsonl; None where there is none."""
    newest = deque(read_lines(RunFolder(run).metrics), maxlen=1)
    return newest[0] if newest else None


def _state(run: Path, status: Status | None, launch: LaunchRecord | None) -> str:
    """A process that dies by kill -9 cannot say so: whether it lives is looked up, on the machine it ran on."""
    if launch is not None and not launch.wrote(status):
        if launch.job is not None:
            return _job_state(run, f"slurm-{launch.job}-") or "submitted"
        if launch.exit_code is not None:  # a finished run stays so when another launch of it was refused
            return "finished" if status is not None and status.state == "finished" else "failed"
        return "starting" if launch.launcher() is not None or launch.host != os.uname().nodename else "died"
    if status is None or status.state != "running":
        return "unknown" if status is None else status.state
    if str(status.launch_id).startswith("slurm-"):
        return _job_state(run, str(status.launch_id).rpartition("-")[0] + "-") or "running"
    if launch is not None and launch.exit_code is not None:
        return "failed"
    is_here = status.host == os.uname().nodename
    return "died" if is_here and status.pid is not None and not psutil.pid_exists(status.pid) else "running"


def _job_state(run: Path, prefix: str) -> str | None:
    """What the script of a job has noted last; None where the ranks' own word counts, or nothing was noted of this job."""
    words = _last_note(run)
    if len(words) < 3 or not words[1].startswith(prefix):
        return None
    if words[2] != "ended":
        status = read_status(run)
        return None if status is not None and status.launch_id == words[1] else "starting"
    if "next=requeue" in words:
        return "requeued"
    return {"code=0": "finished", "code=85": "stopped"}.get(words[3], "failed")


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
