"""A pipeline of three stages as jobs that wait for each other: killed within stages and between them, it ends as one that was let alone."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.cluster.cluster import wait_for
from tests.cluster.jobs import FINAL, TRAIN, Jobs
from tests.launcher.launching import MMSCALE
from tests.training.runs import audited, losses

pytestmark = pytest.mark.cluster
LAST = 8
PIPELINE = """
folder: FOLDER
stages:
  - name: pretrain
    command: launch STAGE run={folder}/pretrain train.steps=8 checkpoint.every=4 --module MODULE
  - name: finetune
    after: [pretrain]
    command: launch STAGE run={folder}/finetune init_from={folder}/pretrain train.seed=2 train.steps=8 checkpoint.every=4 --module MODULE
  - name: evaluate
    after: [finetune]
    command: evaluate {folder}/finetune task=retrieval data=SHARDS samples=100 out={folder}/report
"""
CLUSTER = (
    *("--cluster", "slurm", "--set", "nodes=1", "--set", "ranks_per_node=1", "--set", "slurm.gres=null", "--set", "slurm.cpus_per_task=1"),
    *("--set", "slurm.time='30'", "--set", "slurm.signal_s=20"),
)


class Pipeline:
    """One pipeline on the cluster."""

    def __init__(self, jobs: Jobs, shards: Path, name: str) -> None:
        self.jobs, self.name, self.folder = jobs, name, jobs.folder / name
        self.file = jobs.folder / f"{name}.yaml"
        text = PIPELINE.replace("FOLDER", str(self.folder)).replace("STAGE", str(jobs.stage)).replace("SHARDS", str(shards))
        self.file.write_text(text.replace("MODULE", TRAIN))

    def submit(self, allowed: int) -> str:
        """Run the command, for what is not done; what it says."""
        self.jobs.allow(allowed)
        words = [MMSCALE, "pipeline", self.file, *CLUSTER, "--set", f"environment.ALLOWED={self.jobs.folder / 'allowed'}"]
        return self.jobs.cluster.run(*words).stdout

    def job(self, stage: str) -> str:
        return str(json.loads((self.folder / "jobs" / f"{stage}.json").read_text())["job"])

    def cancel(self, *stages: str) -> None:
        """Cancel the jobs of stages, and wait until they are gone."""
        self.jobs.cluster.run("scancel", *(self.job(stage) for stage in stages))
        self.gone("pretrain", "finetune", "evaluate")

    def gone(self, *stages: str) -> None:
        wait_for(lambda: all(self.jobs.cluster.job(self.job(stage))["JobState"] in FINAL for stage in stages), 120)
        wait_for(lambda: self.jobs.cluster.run("squeue", "--noheader").stdout == "", 60)

    def table(self) -> str:
        """The results, without how long the evaluation took."""
        return re.sub(r"seconds [0-9.]+", "", self.jobs.cluster.run(MMSCALE, "pipeline", self.file, "--show").stdout)


def test_pipeline_that_is_killed_everywhere_ends_as_one_that_is_not(jobs: Jobs, glyphs: Path) -> None:
    whole = Pipeline(jobs, glyphs, "whole-pipeline")
    said = whole.submit(LAST)
    assert [line.split(":")[0] for line in said.splitlines()] == ["pretrain", "finetune", "evaluate"]
    jobs.wait(whole.job("evaluate"), "COMPLETED")
    killed = Pipeline(jobs, glyphs, "killed-pipeline")

    killed.submit(6)  # within the first stage
    jobs.reach("killed-pipeline/pretrain", 6)
    killed.cancel("pretrain")
    states = [jobs.cluster.job(killed.job(stage))["JobState"] for stage in ("pretrain", "finetune", "evaluate")]
    assert states == ["CANCELLED"] * 3

    killed.submit(LAST)  # between the first and the second
    jobs.wait(killed.job("pretrain"), "COMPLETED")
    killed.cancel("finetune", "evaluate")

    said = killed.submit(6)  # within the second: a rank is killed, and the job goes on by itself
    assert [line.split(":")[0] for line in said.splitlines()] == ["finetune", "evaluate"]
    jobs.reach("killed-pipeline/finetune", 6)
    jobs.rank(0, TRAIN).kill()
    jobs.allow(LAST)
    jobs.cluster.hurry(killed.job("finetune"))
    jobs.wait(killed.job("evaluate"), "COMPLETED")

    for stage in ("pretrain", "finetune"):
        assert losses(killed.folder / stage) == losses(whole.folder / stage)
        assert audited(killed.folder / stage) == audited(whole.folder / stage)
        assert len(losses(whole.folder / stage)) == LAST
    assert killed.table() == whole.table()
    assert [line.split()[:2] for line in whole.table().splitlines()] == [[s, "done"] for s in ("pretrain", "finetune", "evaluate")]
    assert "r1" in whole.table().splitlines()[-1]
    assert killed.submit(LAST) == ""
    jobs.nothing_left()
