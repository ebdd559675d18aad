"""Runs on the cluster: launched, waited for, compared. A run is tiny, or a stand-in's that trains nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.cluster.cluster import Cluster, wait_for
from tests.launcher.launching import MMSCALE
from tests.training.runs import audited, losses, records

STEPS = 12
PATIENCE_S = 240
TRAIN, STANDIN = "tests.cluster.paced", "tests.cluster.standin"
FINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}


@dataclass
class Jobs:
    """Starts runs of one stage, a rank on each of two nodes."""

    cluster: Cluster
    stage: Path
    folder: Path

    def launch(self, name: str, *options: object, module: str = TRAIN, allowed: int = STEPS, behaviour: str = "run") -> list[str]:
        """The words of a launch."""
        words = [MMSCALE, "launch", self.stage, f"run={self.folder / name}", f"train.steps={STEPS}", "checkpoint.every=4"]
        self.allow(allowed)
        variables = {"ALLOWED": self.folder / "allowed", "MMSCALE_STANDIN": behaviour}
        told = [word for key, value in variables.items() for word in ("--set", f"environment.{key}={value}")]
        told += ["--set", "checks.run=false"]  # `test_nodes.py` has the checks
        return [*map(str, words), "checkpoint.keep=0", "--module", module, *told, *map(str, options)]

    def allow(self, steps: int = STEPS) -> None:
        """Let runs come so far; there they wait."""
        (self.folder / "allowed.tmp").write_text(str(steps))
        (self.folder / "allowed.tmp").rename(self.folder / "allowed")

    def submit(self, name: str, *options: object, module: str = STANDIN, allowed: int = STEPS, behaviour: str = "run") -> str:
        """Submit a run as a job; its number."""
        slurm = ["--engine", "slurm", "--nodes", "2", "--ranks-per-node", "1", "--set", "slurm.time='30'", "--set", "slurm.signal_s=20"]
        words = self.launch(name, *slurm, *options, module=module, allowed=allowed, behaviour=behaviour)
        return self.cluster.run(*words).stdout.split()[1].rstrip(":")

    def wait(self, job: str, state: str) -> dict[str, str]:
        """Wait until a job is in a state; a state that it cannot leave any more fails at once."""
        wait_for(lambda: self.cluster.job(job)["JobState"] in {state, *FINAL}, PATIENCE_S)
        found = self.cluster.job(job)
        assert found["JobState"] == state, f"{found} {''.join(p.read_text() for p in self.folder.glob(f'*/job-{job}.log'))}"
        return found

    def step(self, name: str) -> int:
        """How far a run is."""
        metrics, status = self.folder / name / "metrics.jsonl", self.folder / name / "status.json"
        if metrics.exists():
            return max((r["step"] for r in records(metrics)), default=0)
        return int(records(status)[0]["step"]) if status.exists() else 0

    def reach(self, name: str, step: int) -> None:
        """Wait until a run is so far."""
        wait_for(lambda: self.step(name) >= step, PATIENCE_S)

    def same(self, name: str, other: str, steps: int = STEPS) -> None:
        """Every loss of two runs bit for bit, and the same samples read for it."""
        assert losses(self.folder / name) == losses(self.folder / other)
        assert audited(self.folder / name) == audited(self.folder / other)
        assert len(losses(self.folder / name)) == steps

    def rank(self, number: int, module: str = STANDIN) -> psutil.Process:
        """A rank's process."""
        found = [p for p in self.cluster.processes(f"-u -m {module}") if p.name() not in ("srun", "bash")]
        return next(p for p in found if str(number) in (p.environ().get("SLURM_PROCID"), p.environ().get("RANK")))

    def began(self, name: str, attempts: int, step: int) -> None:
        """Wait for the attempt of this number to begin, and let it come to a step that none before it has seen."""
        wait_for(lambda: sum(line.startswith("began") for line in self.history(name)) == attempts, PATIENCE_S)
        self.allow(step)
        self.reach(name, step)

    def history(self, name: str) -> list[str]:
        """What the job's script noted of its attempts, without times; nothing before it has begun."""
        path = self.folder / name / "job.history"
        return [line.split(" ", 2)[2] for line in path.read_text().splitlines()] if path.exists() else []

    def nothing_left(self) -> None:
        """No process of any run is there, on any host."""
        wait_for(lambda: self.cluster.processes(TRAIN) == [] == self.cluster.processes(STANDIN), 15)
