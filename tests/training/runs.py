"""Starts real training runs for the tests: tiny glyph shards, a tiny model, two ranks under deepspeed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from mmscale.ports import free_port

STAGE = """
data: {max_text_tokens: 16, augment: {shift: 1}}
model: {hidden_size: 32, num_heads: 2, unimodal_layers: 1, fusion_layers: 1, image_size: 16, patch_size: 8, max_text_tokens: 16,
        projection_size: 16, dropout: 0.1}
objectives:
  contrastive: {weight: 1}
  matching: {weight: 1}
  masked_language: {weight: 1, mask: 0.3}
  captioning: {weight: 1}
  masked_image: {weight: 1, mask: 0.5}
train: {steps: 12, global_batch: 16, seed: 1, precision: fp32, timeout_s: 120}
optimizer: {warmup_steps: 4, lr: 2e-3}
log: {every: 1, tensorboard: false}
audit: {samples: true}
"""


def write_stage(folder: Path, shards: Path, text: str = STAGE) -> Path:
    """Write a stage file; `run` and `data.shards` are given as words."""
    path = folder / "stage.yaml"
    path.write_text(text.replace("data: {", f"data: {{shards: {shards}, ", 1))
    return path


def environment() -> dict[str, str]:
    """The environment of a run: one thread a rank, CPU, no launch of somebody else's."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("MMSCALE_")}
    return env | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONUNBUFFERED": "1"}


def deepspeed_command(ranks: int, stage: Path, *words: str) -> list[str]:
    """The plain command of a user."""
    script = Path(sys.executable).with_name("deepspeed")
    return [
        *(sys.executable, str(script), "--num_accelerators", str(ranks), "--master_port", str(free_port())),
        *("--module", "mmscale.train", str(stage), *words),
    ]


def train(ranks: int, stage: Path, *words: str, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    """Run to the end."""
    command = deepspeed_command(ranks, stage, *words)
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=timeout_s)


def run_grid(ranks: int, stage: Path, results: Path, lines: list[str], program: str = "grid.py") -> None:
    """Run `grid.py`, or another program of this folder, under torchrun."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(ranks),
        "--master-port",
        str(free_port()),
        str(Path(__file__).with_name(program)),
    ]
    done = subprocess.run([*command, str(stage), str(results), *lines], env=environment(), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def kill_after(ranks: int, stage: Path, words: list[str], run: Path, *, lines: int, extra_s: float, timeout_s: float = 500) -> None:
    """Start a run, wait until its metrics have grown by so many lines and some time, and kill -9 every process of it."""
    before = count_lines(run)
    process = subprocess.Popen(
        deepspeed_command(ranks, stage, *words),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + timeout_s
    while count_lines(run) - before < lines and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(extra_s)
    everyone = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)] if process.poll() is None else []
    for victim in everyone:
        victim.suspend()  # so that nobody can react to the death of another
    for victim in everyone:
        victim.send_signal(signal.SIGKILL)
    process.wait()
    psutil.wait_procs(everyone, timeout=10)


def count_lines(run: Path) -> int:
    """Lines of metrics so far."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def records(path: Path) -> list[dict[str, Any]]:
    """Records of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(run: Path) -> list[tuple[int, dict[str, float]]]:
    """Step and every loss of each logged step, to compare bit for bit."""
    names = ("loss", "grad_norm")
    return [(r["step"], {k: v for k, v in r.items() if k in names or k.startswith("loss/")}) for r in records(run / "metrics.jsonl")]


def audited(run: Path) -> dict[int, tuple[int, str]]:
    """Position -> (step, key) over all ranks; of a position read twice because of a resume the later line stands."""
    return {r["position"]: (r["step"], r["key"]) for path in sorted((run / "audit").glob("rank-*.jsonl")) for r in records(path)}
