"""The commands of a table, as a user would type them: each once, its output in a log, training timed."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tables.sources import REPOSITORY

MMSCALE = str(Path(sys.executable).with_name("mmscale"))


def conditions(**machine: Any) -> dict[str, Any]:
    """Where, with which versions and when a result was made.

    Args:
        machine: how the machine was used, such as ranks_a_run.
    """
    return {
        "machine": {"cores": os.cpu_count(), "system": platform.platform()} | machine,
        "versions": {n: version(n) for n in ("mmscale", "torch", "deepspeed")} | {"python": platform.python_version()},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def call(words: list[str], log: Path) -> None:
    """Run `mmscale WORDS` with one thread; its output goes to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        env = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        subprocess.run([MMSCALE, *words], check=True, env=env, cwd=REPOSITORY, stdout=output, stderr=subprocess.STDOUT)


def shards(verb: str, out: Path, *words: str) -> Path:
    """`mmscale shards VERB WORDS out=OUT`, once."""
    if not (out / "manifest.parquet").exists():
        call(["shards", verb, *words, f"out={out}"], out.with_name(f"{out.name}.log"))
    return out


def train(stage: str, run: Path, *words: str, ranks: int = 1) -> float:
    """`mmscale launch STAGE`, unless it is finished; returns its wall seconds, as measured when it was trained."""
    if any(run.glob("checkpoints/*/MANIFEST.json")) and json.loads((run / "status.json").read_text())["state"] == "finished":
        return float(json.loads((run / "seconds.json").read_text()))
    start = time.perf_counter()
    call(["launch", stage, f"run={run}", *words, "--ranks-per-node", str(ranks)], run.with_suffix(".log"))
    seconds = time.perf_counter() - start
    (run / "seconds.json").write_text(json.dumps(seconds))
    return seconds


def evaluate(run: Path, task: str, data: Path, *words: str) -> dict[str, Any]:
    """`mmscale evaluate` of a run's newest checkpoint on a whole data set; returns its metrics."""
    call(["evaluate", str(run), f"task={task}", f"data={data}", "samples=0", *words], run.with_suffix(f".{task}.log"))
    found: dict[str, Any] = json.loads((run / "evaluations" / task / "report.json").read_text())["metrics"]
    return found
