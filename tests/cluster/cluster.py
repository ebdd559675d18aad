"""A real cluster on this machine, from outside: hosts of their own, SLURM, sshd. All of it ends with the object that stands for it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from mmscale.signals import die_with_parent

REPO = Path(__file__).resolve().parents[2]
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "pdsh", "sshd", "ip", "nsenter", "unshare")
NAMESPACES = ("--mount", "--net", "--uts", "--ipc", "--pid")


def missing() -> str | None:
    """Why there can be no cluster here; None where there can."""
    if os.getuid() != 0:
        return "needs root"
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    lacking = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if lacking:
        return f"not installed: {', '.join(lacking)} (Debian: slurmctld slurmd slurm-client munge pdsh openssh-server iproute2)"
    if subprocess.run(["unshare", *NAMESPACES, "--fork", "true"], capture_output=True, check=False).returncode != 0:
        return "this machine lets nobody make namespaces"
    return None


class Cluster:
    """`hosts` hosts n1, n2, ... and a controller, where commands are run."""

    def __init__(self, hosts: int) -> None:
        self.work = Path(tempfile.mkdtemp(prefix="cluster-"))
        words = [sys.executable, "-m", "tests.cluster.inside", str(hosts), str(self.work)]
        env = os.environ | {"PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"}
        self.log = (self.work / "inside.log").open("w")
        unshare = ["unshare", *NAMESPACES, "--fork", "--mount-proc", "--kill-child", *words]
        self.unshare = subprocess.Popen(unshare, cwd=REPO, env=env, stdout=self.log, stderr=self.log, preexec_fn=die_with_parent)
        wait_for(lambda: (self.work / "environment.json").exists() or self.unshare.poll() is not None, 90)
        assert self.unshare.poll() is None, (self.work / "inside.log").read_text()
        inherited = {k: v for k, v in env.items() if not k.startswith(("MMSCALE_", "SLURM_"))}
        here = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(REPO)}
        self.env = inherited | here | json.loads((self.work / "environment.json").read_text())
        self.first = psutil.Process(self.unshare.pid).children()[0].pid

    def command(self, *words: object) -> list[str]:
        """A command line that runs words on the controller."""
        return ["nsenter", "--target", str(self.first), *NAMESPACES, f"--wd={REPO}", *map(str, words)]

    def start(self, *words: object) -> subprocess.Popen[str]:
        """Start a command on the controller."""
        return subprocess.Popen(self.command(*words), env=self.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def run(self, *words: object, check: bool = True, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
        """Run a command on the controller to its end."""
        done = subprocess.run(self.command(*words), env=self.env, capture_output=True, text=True, check=False, timeout=timeout_s)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def processes(self, word: str) -> list[psutil.Process]:
        """The cluster's processes whose command line holds a word; those that were started from outside are no children of its first."""
        found, ours = [], Path(f"/proc/{self.first}/ns/pid").stat().st_ino
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, OSError):
                if Path(f"/proc/{process.pid}/ns/pid").stat().st_ino == ours and word in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def job(self, job: str) -> dict[str, str]:
        """What SLURM knows of a job."""
        words = self.run("scontrol", "show", "job", job, "--oneliner").stdout.split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def hurry(self, job: str) -> None:
        """Have a requeued job start at once: SLURM lets it wait for two minutes."""
        wait_for(lambda: self.job(job)["JobState"] == "PENDING", 60)
        # started in the second in which its last attempt ends, it meets what slurmd has not put away yet, and fails before its script runs
        wait_for(lambda: not self.processes("slurm_script") and not self.processes(f"[{job}."), 60)
        time.sleep(3)
        deadline, calm = time.monotonic() + 60, 0
        while calm < 3:  # the wait may be set after we have looked
            found = self.job(job)
            if found["JobState"] != "PENDING":
                return
            if found["Reason"] == "BeginTime" or not calm:
                self.run("scontrol", "update", f"jobid={job}", "starttime=now", check=False)
            calm = 0 if found["Reason"] == "BeginTime" else calm + 1
            assert time.monotonic() < deadline, found
            time.sleep(1)

    def close(self) -> None:
        """End everything."""
        self.unshare.kill()
        self.unshare.wait()
        self.log.close()
        shutil.rmtree(self.work, ignore_errors=True)


def wait_for(condition: Callable[[], object], timeout_s: float) -> None:
    """Wait until something holds, or fail."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.2)
