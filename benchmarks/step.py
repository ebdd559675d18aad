"""Our training step against a bare PyTorch loop over the same model, objectives and batches: what the framework costs.

    python benchmarks/step.py [--ranks 1 2] [--sizes 192x6 64x3 peers] [--stages 0 1 2 3] [--rounds 5] [--out benchmarks/results/step.json]

Ours is the loop as users get it: the loader reading glyph shards, the DeepSpeed engine, every hook, a logged line each 10 steps with
TensorBoard. The bare loop is zero_grad, forward, backward, clip_grad_norm_ and the same fused AdamW at the same rates, over batches that
were built beforehand, so that data costs it nothing; with several ranks it is DistributedDataParallel over gloo.

The two take turns step by step (A B, B A, ...), so that a change of the machine's load hits both; a round is 10 steps of each and holds one
logged line. Ratios are those of a round's sums, medians over rounds are kept. A turn of ours ends when the loader has nothing left to
build, so that no work of ours is done in the other's time. CPU time is that of the process with all its threads (summed over ranks);
`main` is the part of the training thread, the rest is the loader's.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from synthetic import PEERS
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from mmscale.assemble import Run, assemble, build_model
from mmscale.config import RunConfig, load_run_config
from mmscale.data.batch import Batch
from mmscale.engine import Trainee
from mmscale.hooks import Hook, StepInfo
from mmscale.optim import build_optimizer, learning_rate
from mmscale.ports import free_port
from mmscale.signals import StopRequest
from mmscale.step import agree, optimizer_step
from mmscale.train import build_hooks, open_loader
from mmscale.world import World, connect, read_world
from shards import configfile
from shards.config import WriteConfig
from shards.write import write_shards

ROUND = 10
"""Steps of each loop in a round: those between two logged lines."""
WARM_UP = 4
"""Steps of each loop before the first round."""
STAGE = """
data: {max_text_tokens: 24}
objectives:
  contrastive: {weight: 1}
  captioning: {weight: 1}
  matching: {weight: 0.25, fraction: 0.125}
  masked_language: {weight: 0.25, fraction: 0.125, mask: 0.3}
  masked_image: {weight: 0.25, fraction: 0.125, mask: 0.5}
model: {image_size: 32, patch_size: 8, max_text_tokens: 24}
train: {global_batch: 64, precision: fp32, steps: 100000}
"""
SIZES = {
    "192x6": ["model.hidden_size=192", "model.num_heads=6", "model.unimodal_layers=4", "model.fusion_layers=2"],
    "64x3": ["model.hidden_size=64", "model.num_heads=2", "model.unimodal_layers=2", "model.fusion_layers=1"],
    "peers": [*PEERS, *(f"objectives.{n}.fraction=1" for n in ("matching", "masked_language", "masked_image")), "train.global_batch=32"],
}
"""All five objectives over 64 samples a step: a model of 7 M parameters, and one so small that fixed costs weigh most; and the size,
objectives and batch of benchmarks/peers.py."""
PIXELS = {"peers": 64}
"""Side of a size's images, where it is not 32."""
Times = tuple[float, float, float]
"""Wall, CPU of the process, CPU of the training thread; seconds."""


def stage_config(place: Path, size: str, stage: int, *more: str) -> RunConfig:
    """One size at one stage; without the average of the weights, which the bare loop does not have."""
    path = place / "stage.yaml"
    path.write_text(STAGE)
    words = [f"run={place}/{size}-{stage}", f"data.shards={shards_of(place, size)}", f"zero.stage={stage}", f"log.every={ROUND}"]
    return load_run_config(path, [*words, *SIZES[size], *more])


class Ours:
    """The loop of `mmscale.train`, a step at a time."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.loader = open_loader(run, None)
        self.batches = iter(self.loader)
        self.hooks: list[Hook] = []

    def step(self) -> None:
        """Take a step as `train` does, and let the loader finish what it builds ahead."""
        run, batch = self.run, next(self.batches)
        self.hooks = self.hooks or build_hooks(run, None, batch, StopRequest())
        sums = optimizer_step(run, batch, False)
        info = StepInfo(batch.step + 1, batch.samples_seen_after, batch, sums, last=False)
        for hook in self.hooks:
            hook.after_step(info)
        for job in getattr(self.loader.feed, "_jobs", ()):
            job.result()

    def close(self) -> None:
        """End threads, files and the engine."""
        self.loader.close()
        for hook in self.hooks:
            hook.close()
        self.run.engine.destroy()


class Bare:
    """A plain PyTorch loop over batches in memory."""

    def __init__(self, run: Run, steps: int) -> None:
        self.config, self.size = run.config, run.world.size
        self.trainee: nn.Module = Trainee(build_model(run.config, run.tokenizer, None, None)[0], run.objectives)
        self.optimizer = build_optimizer(self.trainee, run.config.optimizer)
        self.parameters = list(self.trainee.parameters())
        self.batches = prepare(run, steps)
        if self.size > 1:
            self.trainee = DistributedDataParallel(self.trainee, gradient_as_bucket_view=True)
        self.done = 0
        self.loss = torch.zeros(())

    def step(self) -> None:
        """Take a step."""
        batch, factors_K = self.batches[self.done]
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.done, self.config.train.steps, self.config.optimizer)
        self.optimizer.zero_grad()
        self.loss, _, _ = self.trainee(batch, factors_K)
        (self.loss * self.size).backward()
        clip_grad_norm_(self.parameters, self.config.train.clip_norm)
        self.optimizer.step()
        self.done += 1


def prepare(run: Run, steps: int) -> list[tuple[Batch, Tensor]]:
    """Build the batches of the first steps, and what their losses are multiplied by (all ranks call)."""
    weights_K = torch.tensor([o.weight for o in run.objectives])
    found = []
    with open_loader(run, None) as loader:
        for _, step in zip(range(steps), loader, strict=False):
            counts_K, _ = agree(run.world, run.objectives, step.host, 0, False)
            found.append((step.micro[0], weights_K / counts_K.clamp(min=1).float()))
    return found


def timed(step: Callable[[], None], world: World) -> Times:
    """Take a step between two moments that all ranks share; wall time is that of the slowest rank, CPU time the sum."""
    if world.size > 1:
        dist.barrier()
    wall, cpu, main = time.perf_counter(), time.process_time(), time.thread_time()
    step()
    wall, cpu, main = time.perf_counter() - wall, time.process_time() - cpu, time.thread_time() - main
    if world.size > 1:
        longest, total = torch.tensor(wall), torch.tensor([cpu, main])
        dist.all_reduce(longest, op=dist.ReduceOp.MAX)
        dist.all_reduce(total)
        return longest.item(), *total.tolist()
    return wall, cpu, main


def rounds(ours: Ours, bare: Bare, world: World, count: int) -> Iterator[tuple[list[Times], list[Times]]]:
    """Yield the times of both loops, round by round, after a warm-up."""
    for number in range(-1, count):
        a: list[Times] = []
        b: list[Times] = []
        gc.collect()
        for turn in range(ROUND if number >= 0 else WARM_UP):
            order = [(ours.step, a), (bare.step, b)]
            for step, times in order if turn % 2 == 0 else order[::-1]:
                times.append(timed(step, world))
        if number >= 0:
            yield a, b


def compare(config: RunConfig, world: World, group: dist.ProcessGroup, count: int) -> dict[str, Any]:
    """Measure one case (all ranks call)."""
    run = assemble(config, world, group)
    ours, bare = Ours(run), Bare(run, WARM_UP + count * ROUND)
    try:
        measured = list(rounds(ours, bare, world, count))
        differences = parameter_difference(run, bare) if config.zero.stage < 3 else None
    finally:
        ours.close()
    sums = [[[sum(t[i] for t in side) for i in range(3)] for side in pair] for pair in measured]
    report: dict[str, Any] = {"parameters": sum(p.numel() for p in bare.parameters), "rounds": count}
    report["largest_weight_difference"] = differences
    for i, name in enumerate(("wall", "cpu", "main")):
        ratios = sorted(a[i] / b[i] for a, b in sums)
        report[f"{name}_ratio"], report[f"{name}_ratios"] = statistics.median(ratios), ratios
        steps = [a[i] / b[i] for ours_10, bare_10 in measured for a, b in zip(ours_10, bare_10, strict=True)]
        report[f"{name}_ratio_of_steps"] = statistics.median(steps)
        for side, who in enumerate(("mmscale", "bare")):
            report[f"{who}_{name}_ms"] = 1000 * statistics.median(pair[side][i] for pair in sums) / ROUND
    return report


def parameter_difference(run: Run, bare: Bare) -> float:
    """Largest difference of a weight after equal steps: both loops did the same work."""
    pairs = zip(run.trainee.parameters(), bare.parameters, strict=True)
    return max((mine.detach() - theirs.detach()).abs().max().item() for mine, theirs in pairs)


def measure_cases(words: argparse.Namespace, place: Path) -> list[dict[str, Any]]:
    """Measure every case of one number of ranks in this process (all ranks call)."""
    torch.set_num_threads(1)
    world = read_world()
    group = connect(world, 300)
    logging.getLogger("mmscale").handlers = [logging.NullHandler()]
    logging.getLogger("mmscale").setLevel(logging.INFO)
    found = []
    for size in words.sizes:
        for stage in words.stages:
            config = stage_config(place, size, stage)
            case = {"ranks": world.size, "size": size, "stage": stage, "batch": config.train.global_batch}
            case |= compare(config, world, group, words.rounds)
            found.append(case | {"date": now()})
            if world.is_first:
                print(line(case), flush=True)
    dist.destroy_process_group()
    return found


def line(case: dict[str, Any]) -> str:
    """Render a case for a person."""
    parts = [f"{case['size']:5} ZeRO {case['stage']}, {case['ranks']} rank(s):"]
    for name in ("wall", "cpu", "main"):
        parts.append(f"{name} {case[f'mmscale_{name}_ms']:.0f} / {case[f'bare_{name}_ms']:.0f} ms = {case[f'{name}_ratio']:.3f}")
    return "  ".join(parts)


def spawn(words: argparse.Namespace, ranks: int, place: Path) -> list[dict[str, Any]]:
    """Measure the cases of several ranks under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", str(free_port()), __file__]
    command += ["--place", str(place), "--rounds", str(words.rounds), "--sizes", *words.sizes, "--stages", *map(str, words.stages)]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return json.loads((place / "cases.json").read_text())


def shards_of(place: Path, size: str) -> Path:
    """Where the shards of a size are."""
    return place / f"shards-{PIXELS.get(size, 32)}"


def write_glyphs(place: Path, size: str) -> None:
    """Write shards of a quarter of the glyphs."""
    out = shards_of(place, size)
    words = ["source=glyphs", f"out={out}", f"glyphs.size={PIXELS.get(size, 32)}", "glyphs.every=4", "rows_per_shard=1024", "processes=1"]
    write_shards(configfile.load(WriteConfig, None, [*words, "tokenizer.kind=bpe", "tokenizer.vocab_size=4096"]), progress=False)


def save(out: Path, cases: list[dict[str, Any]]) -> None:
    """Write the result; cases measured now replace those of earlier, others stay."""
    key = lambda c: (c["ranks"], c["size"], c["stage"])  # noqa: E731
    old = json.loads(out.read_text())["results"] if out.exists() else []
    merged = {key(c): c for c in [*old, *cases]}
    report = {
        "benchmark": "step",
        "what": "our training step against a bare PyTorch loop over the same model, objectives and batches; fp32, 1 thread a rank",
        "ratio": f"ours over the bare loop's, medians over rounds of {ROUND} steps each; main: CPU time of the training thread alone",
        "results": [merged[k] for k in sorted(merged)],
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "system": platform.platform()},
        "versions": {n: version(n) for n in ("mmscale", "torch", "deepspeed", "numpy")} | {"python": platform.python_version()},
        "date": now(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")


def now() -> str:
    """This moment, in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def cpu_name() -> str:
    """Name of the processor, as Linux has it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    """Write shards, measure, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "step.json")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--stages", type=int, nargs="+", choices=[0, 1, 2, 3], default=[0, 1, 2, 3])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)  # of a rank that torchrun started
    words = parser.parse_args()
    if words.place is not None:
        found = measure_cases(words, words.place)
        if os.environ["RANK"] == "0":
            (words.place / "cases.json").write_text(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        for size in words.sizes:
            write_glyphs(place, size)
        for ranks in words.ranks:
            save(words.out, spawn(words, ranks, place) if ranks > 1 else measure_cases(words, place))


if __name__ == "__main__":
    main()
