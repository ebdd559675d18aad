"""A training run whose processes are killed, again and again, against the same run left alone: nothing but time may be lost.

    python benchmarks/soak.py [--kills 100] [--steps 300] [--ranks 2] [--seed 0] [--minutes M] [--folder DIR]
                              [--out benchmarks/results/soak.json]

The run is `mmscale launch` over tiny glyph shards with every objective, dropout, accumulation and a moving average, and a checkpoint
every three steps. SIGKILL hits one process of it (the launcher, DeepSpeed's two or torchrun, a rank's parent, a rank, a loader's worker or
its server: the kind is drawn first) at a random moment, sometimes within the first seconds of a start. What is left has to end by
itself; then the same command goes on, with engine, background save and worker processes drawn anew, which change no bit. Exit code 1
unless losses, weights, moments, average and the audit of positions equal the undisturbed run's, and no process outlived its run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil

from launcher.processes import processes_of_run, wait_until_gone
from mmscale.checkpoint import manifest
from mmscale.checkpoint.find import committed, resolve, step_of
from mmscale.run_folder import RunFolder
from shards import configfile
from shards.config import WriteConfig
from shards.write import write_shards

STAGE = """
data: {{shards: {shards}, max_text_tokens: 16, augment: {{shift: 1}}}}
model: {{hidden_size: 32, num_heads: 2, unimodal_layers: 1, fusion_layers: 1, image_size: 16, patch_size: 8, max_text_tokens: 16,
        projection_size: 16, dropout: 0.1}}
objectives:
  contrastive: {{weight: 1}}
  matching: {{weight: 1}}
  masked_language: {{weight: 1, mask: 0.3}}
  captioning: {{weight: 1}}
  masked_image: {{weight: 1, mask: 0.5}}
train: {{steps: {steps}, global_batch: 16, micro_batch: 4, seed: 1, precision: fp32, timeout_s: 120, ema_decay: 0.9}}
optimizer: {{warmup_steps: 4, lr: 2e-3}}
zero: {{stage: 2}}
checkpoint: {{every: 3}}
log: {{every: 1, tensorboard: false}}
audit: {{samples: true}}
"""
KINDS = (
    ("mmscale launch", ("bin/mmscale", "launch")),
    ("torchrun", ("torch.distributed.run",)),
    ("deepspeed's launch.py", ("deepspeed.launcher.launch",)),
    ("deepspeed", ("bin/deepspeed",)),
    ("rank's parent", ("launcher.rank",)),
    ("rank", ("mmscale.train",)),
    ("loader's process", ("multiprocessing",)),
)
"""Kind of a process and the words that its command line holds; the first that fits."""
START_SHARE = 0.25
"""Of fresh starts, those that are aimed at before their first step; it often comes sooner."""
START_S = 20.0
"""Longest time after a start at which such a kill comes."""
MOMENT_S = 0.2
"""Longest time after a step's line in the log at which the other kills come: a step or two, their saves included."""
LAST_STEPS = 15
"""Before the end, in which no kill is due: the run might be over before it comes."""
CYCLE_S = 400.0
"""Time in which a start must have come to the step at which it is killed."""
PATIENCE_S = 60.0
"""Time in which what the launcher's own end leaves must be gone; on a busy machine DeepSpeed's part of it is still importing torch."""
END_S = 90.0
"""Time in which what a kill leaves must have ended."""


@dataclass(slots=True)
class Tally:
    """What was seen."""

    victims: Counter[str] = field(default_factory=Counter)
    codes: Counter[int] = field(default_factory=Counter)
    before_first_step: int = 0
    survived: int = 0
    """Kills after which the run went on, as the victim was not needed any more."""
    outlived: int = 0
    """Processes that had to be ended by us."""
    starts: int = 0
    repeated_steps: int = 0
    """Steps that were done and not committed."""


class Soak:
    """One run under fire.

    Args:
        stage: its configuration.
        run: its folder.
        ranks: how many.
        steps: of the run.
        rng: draws moments and victims.
    """

    def __init__(self, stage: Path, run: Path, ranks: int, steps: int, rng: random.Random) -> None:
        self.stage, self.run, self.ranks, self.steps, self.rng = stage, run, ranks, steps, rng
        self.tally = Tally()
        self.launch: subprocess.Popen[bytes] | None = None
        self.log = run.with_suffix(".log")

    def start(self, *words: str) -> None:
        """Start the run, or go on with it."""
        options = [f"checkpoint.background={self.rng.choice(['true', 'false'])}", f"loader.workers={self.rng.choice([0, 0, 1])}"]
        options += ["--engine", self.rng.choice(["deepspeed", "torchrun"])]
        command = [str(Path(sys.executable).with_name("mmscale")), "launch", str(self.stage), f"run={self.run}", *options, *words]
        command += ["--ranks-per-node", str(self.ranks), "--grace-s", "10"]
        with self.log.open("ab") as log:
            self.launch = subprocess.Popen(command, env=environment(), stdout=log, stderr=log, start_new_session=True)
        self.tally.starts += 1

    def finish(self) -> int:
        """Let the run come to its end; its exit code."""
        if self.launch is None:
            self.start()
        assert self.launch is not None
        return self.launch.wait()

    def kill(self, goal: int) -> bool:
        """Kill a process once so many steps are done, or before the first.

        Returns:
            Whether there was anything to kill: not when the run has come to its end before.
        """
        fresh = self.launch is None
        if fresh:
            self.start()
        before = stamp(self.run)
        at_start = fresh and self.rng.random() < START_SHARE
        if at_start:
            self._wait(lambda: stamp(self.run) != before, self.rng.uniform(0, START_S))
        else:
            self._wait(lambda: (not fresh or stamp(self.run) != before) and lines(self.run) >= goal, CYCLE_S)
            time.sleep(self.rng.uniform(0, MOMENT_S))
        victim = self._victim()
        if victim is None or lines(self.run) >= self.steps:
            return False
        kind, process = victim
        done, is_before = lines(self.run), stamp(self.run) == before
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:  # it has ended by itself since it was drawn
            return self.kill(goal)
        self.tally.victims[kind] += 1
        self.tally.before_first_step += is_before
        self._end(done)
        return True

    def _wait(self, condition: Callable[[], bool], timeout_s: float) -> None:
        assert self.launch is not None
        deadline = time.monotonic() + timeout_s
        while not condition() and self.launch.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)

    def _victim(self) -> tuple[str, psutil.Process] | None:
        """A kind that there is, then one of its processes."""
        assert self.launch is not None
        found: dict[str, list[psutil.Process]] = {}
        try:
            root = psutil.Process(self.launch.pid)
            for process in (root, *root.children(recursive=True)):
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.setdefault(kind_of(process), []).append(process)
        except psutil.NoSuchProcess:
            pass
        kind = self.rng.choice(sorted(found)) if found else None
        return None if kind is None else (kind, self.rng.choice(found[kind]))

    def _end(self, done: int) -> None:
        """Wait until the run has ended, or has shown that it goes on."""
        assert self.launch is not None
        deadline = time.monotonic() + END_S
        while self.launch.poll() is None and time.monotonic() < deadline:
            if lines(self.run) >= min(done + 5, self.steps) and done:
                self.tally.survived += 1
                return
            time.sleep(0.02)
        if self.launch.poll() == 0 and lines(self.run) == self.steps:
            self.tally.survived += 1
            return
        left = wait_until_gone(list(processes_of_run(self.run)), PATIENCE_S)
        if self.launch.poll() is None:
            left.append(psutil.Process(self.launch.pid))
        for process in left:
            print(f"left over: {process}", flush=True)
            process.kill()
        self.tally.outlived += len(left)
        self.tally.codes[self.launch.wait()] += 1
        self.launch = None
        found = committed(self.run / "checkpoints")
        self.tally.repeated_steps += max(0, lines(self.run) - (step_of(found[-1]) if found else 0))


def kind_of(process: psutil.Process) -> str:
    """What a process of a run is there for."""
    line = process.cmdline()
    for kind, words in KINDS:
        if all(any(word in part for part in line) for word in words):
            return kind
    return "other"


def environment() -> dict[str, str]:
    """One thread a rank, no accelerator, no launch of somebody else's."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("MMSCALE_")}
    repository = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(p for p in (repository, env.get("PYTHONPATH", "")) if p)
    return env | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}


def lines(run: Path) -> int:
    """Logged steps."""
    path = RunFolder(run).metrics
    return path.read_bytes().count(b"\n") if path.exists() else 0


def stamp(run: Path) -> tuple[int, int]:
    """Changes when a start comes to its first step, which cuts the log back to the checkpoint."""
    path = RunFolder(run).metrics
    found = path.stat() if path.exists() else None
    return (0, 0) if found is None else (found.st_ino, found.st_size)


def losses(run: Path) -> list[dict[str, Any]]:
    """What can be compared bit for bit of each step."""
    records = [json.loads(line) for line in RunFolder(run).metrics.read_text().splitlines()]
    return [{k: v for k, v in r.items() if k in ("step", "loss", "grad_norm") or k.startswith("loss/")} for r in records]


def positions(run: Path) -> dict[int, tuple[int, str]]:
    """Position -> (step, key) over all ranks; of one that was read twice the later line counts."""
    files = sorted((run / "audit").glob("rank-*.jsonl"))
    records = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    return {r["position"]: (r["step"], r["key"]) for r in records}


def state(run: Path) -> dict[str, str]:
    """sha256 of every file of the last checkpoint with tensors in it."""
    return {e.path: e.sha256 for e in manifest.read_manifest(resolve(run)) if e.path.startswith("state/")}


def soak(folder: Path, *, kills: int, steps: int, ranks: int, seed: int, minutes: float = float("inf")) -> dict[str, Any]:
    """Train both runs and compare them.

    Args:
        folder: for everything.
        kills: how many.
        steps: of a run.
        ranks: of a run.
        seed: of moments and victims.
        minutes: after so many no more kills come, and the run is left to its end.
    """
    shards = folder / "shards"
    words = ["source=glyphs", f"out={shards}", "glyphs.every=100", "glyphs.size=16", "rows_per_shard=64", "processes=1"]
    write_shards(configfile.load(WriteConfig, None, [*words, "tokenizer.kind=wordpiece", "tokenizer.vocab_size=300"]), progress=False)
    stage = folder / "stage.yaml"
    stage.write_text(STAGE.format(shards=shards, steps=steps))
    rng = random.Random(seed)
    whole = Soak(stage, folder / "whole", ranks, steps, random.Random(seed + 1))
    began = time.monotonic()
    if whole.finish() != 0:
        raise SystemExit(f"the undisturbed run failed: {whole.log.read_text()[-3000:]}")
    undisturbed_s = time.monotonic() - began
    broken = Soak(stage, folder / "broken", ranks, steps, rng)
    began, done = time.monotonic(), 0
    for kill in range(kills):
        goal = max(1, round((kill + rng.random()) * (steps - LAST_STEPS) / kills))
        if time.monotonic() - began > 60 * minutes or not broken.kill(goal):
            break
        done += 1
        print(f"kill {done} of {kills} at step {lines(broken.run)} after {time.monotonic() - began:.0f} s", flush=True)
    code, tally = broken.finish(), broken.tally
    wrong = [p for p, (step, _) in positions(broken.run).items() if step != p // 16 + 1]
    return {
        "steps": steps,
        "ranks": ranks,
        "seed": seed,
        "kills": done,
        "victims": dict(sorted(tally.victims.items())),
        "kills_before_first_step": tally.before_first_step,
        "kills_that_the_run_survived": tally.survived,
        "exit_codes": {str(c): n for c, n in sorted(tally.codes.items())},
        "last_exit_code": code,
        "starts": tally.starts,
        "steps_done_twice": tally.repeated_steps,
        "processes_left_over": tally.outlived + len(list(processes_of_run(broken.run))),
        "undisturbed_s": round(undisturbed_s, 1),
        "seconds": round(time.monotonic() - began, 1),
        "losses_equal": losses(broken.run) == losses(whole.run),
        "state_equal": state(broken.run) == state(whole.run),
        "positions_equal": positions(broken.run) == positions(whole.run) and not wrong,
        "positions": len(positions(broken.run)),
    }


def sound(result: dict[str, Any]) -> bool:
    """Whether nothing but time was lost."""
    equal = result["losses_equal"] and result["state_equal"] and result["positions_equal"]
    zeros = [n for c, n in result["exit_codes"].items() if c == "0"]  # a run that was killed must not say that it has finished
    whole = result["positions"] == 16 * result["steps"]
    return bool(equal and whole and not zeros and result["last_exit_code"] == 0 and result["processes_left_over"] == 0)


def main() -> None:
    """Run, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no more kills after so many; the result says how many came")
    parser.add_argument("--folder", type=Path, help="kept afterwards; default: a temporary one")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        result = soak(
            folder.resolve(), kills=options.kills, steps=options.steps, ranks=options.ranks, seed=options.seed, minutes=options.minutes
        )
    machine = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    result = {"date": datetime.now(timezone.utc).date().isoformat()} | machine | result | {"sound": sound(result)}
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.exit(0 if result["sound"] and (result["kills"] == options.kills or options.minutes != float("inf")) else 1)


if __name__ == "__main__":
    main()
