"""Starting the real `mmscale launch` over the real `deepspeed`, with the stand-in as the ranks' program."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from launcher.processes import processes_of_run

REPO = Path(__file__).resolve().parents[2]
MMSCALE = str(Path(sys.executable).parent / "mmscale")
STAGE = "train: {global_batch: 8}\ndata: {shards: unused}\nobjectives: {contrastive: {weight: 1.0}}\n"


@dataclass
class Launched:
    """A launch under test."""

    process: subprocess.Popen[str]
    run: Path

    def processes(self) -> list[psutil.Process]:
        """What the launch has started."""
        return list(processes_of_run(self.run))

    def named(self, word: str) -> list[psutil.Process]:
        """The processes whose command line holds a word, oldest first."""
        return sorted((p for p in self.processes() if word in " ".join(p.cmdline())), key=lambda p: p.create_time())

    def ranks(self) -> list[psutil.Process]:
        """The rank processes, by rank."""
        ranks = [p for p in self.processes() if p.cmdline()[2:4] == ["-m", "tests.launcher.standin"]]
        return sorted(ranks, key=lambda p: int(p.environ()["RANK"]))

    def output(self, timeout_s: float = 180.0) -> tuple[int, str, str]:
        """Wait for the end: exit code, stdout, stderr."""
        out, err = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, out, err


def write_stage(folder: Path) -> Path:
    """A configuration that loads, for a run folder in `folder`."""
    path = folder / "stage.yaml"
    path.write_text(f"run: {folder / 'run'}\n{STAGE}")
    return path


def start(folder: Path, behaviour: str, *options: str) -> Launched:
    """Start two ranks that behave as told."""
    words = [MMSCALE, "launch", str(write_stage(folder)), "--ranks-per-node", "2", "--module", "tests.launcher.standin", *options]
    process = subprocess.Popen(
        words,
        cwd=REPO,
        env=os.environ | {"MMSCALE_STANDIN": behaviour},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    return Launched(process, folder / "run")


def start_and_wait(folder: Path, behaviour: str, *options: str) -> Launched:
    """Start two ranks and wait until both have come so far as to have children."""
    launched = start(folder, behaviour, *options)
    wait_for(lambda: len(launched.ranks()) == 2 and all(len(p.children()) == 2 for p in launched.ranks()), 180)
    time.sleep(0.5)
    return launched


def wait_for(condition: Callable[[], bool], timeout_s: float) -> None:
    """Wait until something holds, or fail."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.1)
