"""Nodes are checked by their own ranks before a run: what is wrong with one is found there, it is named, and the run does without it.

Three real hosts, each fault planted on one of them alone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.cluster import REPO, Cluster, wait_for
from tests.cluster.jobs import Jobs
from tests.cluster.test_hosts import start

pytestmark = pytest.mark.cluster
CHECK = ("--set", "checks.run=true", "--set", "checks.patience_s=30")
BATCH = "train.global_batch=24"
"""Over three ranks."""


@pytest.fixture(scope="module")
def three(stage: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    """A cluster of three hosts."""
    cluster = Cluster(3)
    yield Jobs(cluster, stage, tmp_path_factory.mktemp("three"))
    cluster.close()


@pytest.fixture(scope="module")
def hostfile(three: Jobs) -> Path:
    path = three.folder / "hosts"
    path.write_text("".join(f"n{number} slots=1\n" for number in (1, 2, 3)))
    return path


def found(jobs: Jobs, name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((jobs.folder / name / "nodes.json").read_text())
    return record


def failed(record: dict[str, Any]) -> list[tuple[str, str | None]]:
    return [(finding["check"], finding["node"]) for finding in record["findings"] if finding["level"] == "fail"]


def odd_sources(folder: Path, host: str) -> str:
    """Where Python finds other sources of this project, a comment apart, on one host alone; for PYTHONPATH."""
    for floor in ("shards", "mmscale", "launcher", "configs"):
        shutil.copytree(REPO / floor, folder / "copy" / floor, ignore=shutil.ignore_patterns("__pycache__"))
    with (folder / "copy" / "mmscale" / "errors.py").open("a") as file:
        file.write("# somebody was here\n")
    (folder / "odd").mkdir()
    lines = ["import os, sys", f"if os.uname().nodename == {host!r}:", f"    sys.path.insert(0, {str(folder / 'copy')!r})"]
    lines += ["    import mmscale  # before the working directory is put in front"]
    (folder / "odd" / "sitecustomize.py").write_text("\n".join(lines) + "\n")
    return f"{folder / 'odd'}:{REPO}"


def test_job_avoids_the_node_that_fails_its_check(three: Jobs, tmp_path: Path) -> None:
    words = [*CHECK, "--set", f"environment.PYTHONPATH={odd_sources(tmp_path, 'n2')}"]
    job = three.submit("odd", *words)
    wait_for(lambda: len(three.history("odd")) == 2, 120)
    three.cluster.hurry(job)
    three.wait(job, "COMPLETED")
    assert three.history("odd") == [
        "began checkpoint=none nodes=n[1-2]",
        "ended code=88 checkpoint=none next=requeue unfit=n2 avoid=n2",
        "began checkpoint=none nodes=n[1,3]",
        "ended code=0 checkpoint=step-00000012 next=stop",
    ]
    assert "fail  code           n2 has other sources of mmscale" in (three.folder / "odd" / f"job-{job}.log").read_text()
    record = found(three, "odd")
    assert (record["state"], sorted(record["nodes"])) == ("passed", ["n1", "n3"])
    three.nothing_left()


def test_slow_link_is_measured_and_its_node_named(three: Jobs, hostfile: Path) -> None:
    three.cluster.run("tc", "qdisc", "add", "dev", "v3", "root", "tbf", "rate", "100mbit", "burst", "64kbit", "latency", "400ms")
    try:
        process = start(three, "slow", hostfile, "torchrun", "run", *CHECK, "--set", "checks.all_reduce_gb_s=0.03", BATCH)
        out, err = process.communicate(timeout=300)
    finally:
        three.cluster.run("tc", "qdisc", "del", "dev", "v3", "root")
    assert process.returncode == 88, out + err
    assert "The check of the nodes failed on n3, and the run was not started" in err
    assert "leave it out: --exclude n3." in err
    assert failed(found(three, "slow")) == [("exchange", "n3"), ("all_reduce", None)]
    assert not (three.folder / "slow" / "status.json").exists()


def test_node_that_does_not_reach_the_first_is_named(three: Jobs, hostfile: Path) -> None:
    three.cluster.run("ip", "-n", "n2", "route", "add", "blackhole", "10.77.0.11")
    try:
        process = start(three, "cut-off", hostfile, "deepspeed", "run", *CHECK, BATCH)
        out, err = process.communicate(timeout=300)
    finally:
        three.cluster.run("ip", "-n", "n2", "route", "del", "blackhole", "10.77.0.11")
    assert process.returncode == 88, out + err
    assert "The check of the nodes failed on n2" in err
    assert failed(found(three, "cut-off")) == [("ranks", "n2")]


def test_good_nodes_run(three: Jobs, hostfile: Path) -> None:
    process = start(three, "good", hostfile, "torchrun", "finish", *CHECK, BATCH)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    assert "pass  clocks" in out
    assert "pass  all_reduce" in out
    assert found(three, "good")["state"] == "passed"
