"""Launches over real pdsh and ssh on two hosts: nothing is left on any of them, however a launch ends."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from launcher.processes import processes_of_run
from tests.cluster.cluster import wait_for
from tests.cluster.jobs import STEPS, TRAIN, Jobs
from tests.launcher.launching import MMSCALE

pytestmark = pytest.mark.cluster
STANDIN = "tests.launcher.standin"


@pytest.fixture
def hostfile(jobs: Jobs) -> Iterator[Path]:
    """Both hosts, a slot each. Afterwards nothing of any run is left."""
    path = jobs.folder / "hosts"
    path.write_text("n1 slots=1\nn2 slots=1\n")
    yield path
    for run in jobs.folder.iterdir():
        for process in processes_of_run(run):
            process.kill()


def start(
    jobs: Jobs, name: str, hostfile: Path, engine: str, behaviour: str, *options: str, module: str = STANDIN, allowed: int = STEPS
) -> subprocess.Popen[str]:
    words = ("--engine", engine, "--hostfile", hostfile, "--grace-s", "10", "--set", "hosts.silence_s=15", *options)
    return jobs.cluster.start(*jobs.launch(name, *words, module=module, allowed=allowed, behaviour=behaviour))


def start_and_wait(jobs: Jobs, name: str, hostfile: Path, engine: str, behaviour: str) -> tuple[subprocess.Popen[str], psutil.Process]:
    """A launch whose ranks run on both hosts, and the launcher's process."""
    process = start(jobs, name, hostfile, engine, behaviour)
    ranks = jobs.folder / name / "logs"
    wait_for(lambda: len([p for p in ranks.glob("*/rank-*.log") if "hello" in p.read_text()]) == 2 or process.poll() is not None, 240)
    assert process.poll() is None, process.communicate()
    time.sleep(1)
    found = [p for p in jobs.cluster.processes(f"run={jobs.folder / name}") if p.cmdline()[1:3] == [MMSCALE, "launch"]]
    return process, found[0]


def is_agent(process: psutil.Process) -> bool:
    """Whether a process belongs to the engine, and not to a rank."""
    try:
        line = " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return True
    return any(word in line for word in ("torch.distributed.run", "deepspeed", "pdsh", "ssh ", "mmscale launch"))


@pytest.mark.parametrize(
    ("engine", "number", "code"),
    [
        ("torchrun", signal.SIGINT, 130),
        ("torchrun", signal.SIGTERM, 143),
        ("deepspeed", signal.SIGINT, 130),
        ("deepspeed", signal.SIGTERM, 143),
        ("deepspeed", signal.SIGKILL, None),
    ],
)
def test_end_of_the_launcher_is_the_end_of_every_rank(
    jobs: Jobs, hostfile: Path, engine: str, number: signal.Signals, code: int | None
) -> None:
    name = f"{engine}-{number.name}"
    process, launcher = start_and_wait(jobs, name, hostfile, engine, "run")
    assert len(list(processes_of_run(jobs.folder / name))) >= 6  # two parents of ranks, two ranks, and what these have started
    launcher.send_signal(number)
    # the ranks, their parents and what they have started; DeepSpeed's and torchrun's own processes may take longer to notice
    wait_for(lambda: [p for p in processes_of_run(jobs.folder / name) if not is_agent(p)] == [], 15)
    wait_for(lambda: list(processes_of_run(jobs.folder / name)) == [], 60)
    out, err = process.communicate(timeout=60)
    assert code is None or process.returncode == code, out + err
    assert code is None or f"ended by {number.name} at step" in err


def test_hosts_are_those_chosen_and_the_end_is_told(jobs: Jobs, hostfile: Path) -> None:
    process = start(jobs, "chosen", hostfile, "torchrun", "finish", "--exclude", "n1")
    out, err = process.communicate(timeout=420)
    assert process.returncode == 0, out + err
    assert "hello from rank 0 of 1" in out
    assert json.loads((jobs.folder / "chosen" / "status.json").read_text())["host"] == "n2"


def test_host_that_is_cut_off_is_named_and_the_relaunch_equals_an_undisturbed_run(jobs: Jobs, hostfile: Path) -> None:
    whole = start(jobs, "whole", hostfile, "torchrun", "run", module="mmscale.train")
    out, err = whole.communicate(timeout=600)
    assert whole.returncode == 0, out + err
    process = start(jobs, "cut", hostfile, "deepspeed", "run", module=TRAIN, allowed=6)
    jobs.reach("cut", 6)
    cut = time.monotonic()
    jobs.cluster.run("ip", "link", "set", "v2", "down")
    try:
        out, err = process.communicate(timeout=90)
        assert process.returncode == 1
        assert "because nothing was heard of n2 for 15 s: the host or its network is down" in err, out + err
        wait_for(lambda: list(processes_of_run(jobs.folder / "cut")) == [], 45)
        assert time.monotonic() - cut < 75
    finally:
        jobs.cluster.run("ip", "link", "set", "v2", "up")
    wait_for(lambda: jobs.cluster.run("ssh", "n2", "true", check=False).returncode == 0, 30)
    process = start(jobs, "cut", hostfile, "deepspeed", "run", module=TRAIN)
    out, err = process.communicate(timeout=420)
    assert process.returncode == 0, out + err
    assert "resumed from" in out
    jobs.same("cut", "whole")


def test_plain_deepspeed_needs_no_launcher(jobs: Jobs, hostfile: Path) -> None:
    """The command of a user; DeepSpeed hands on PYTHONPATH by itself, the rest comes from a file."""
    (jobs.folder / "environment").write_text("DS_ACCELERATOR=cpu\nGLOO_SOCKET_IFNAME=eth0\nOMP_NUM_THREADS=1\n")
    deepspeed = str(Path(MMSCALE).with_name("deepspeed"))
    words = [
        "env",
        f"DS_ENV_FILE={jobs.folder / 'environment'}",
        deepspeed,
        "--hostfile",
        hostfile,
        "--module",
        "mmscale.train",
        jobs.stage,
    ]
    done = jobs.cluster.run(*words, f"run={jobs.folder / 'plain-deepspeed'}", "train.steps=2", timeout_s=300)
    assert done.returncode == 0
    assert json.loads((jobs.folder / "plain-deepspeed" / "status.json").read_text())["state"] == "finished"
