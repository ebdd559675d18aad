"""The training step on an accelerator: first whether it is right, then how fast it is and what it takes.

    python benchmarks/gpu.py [--sizes tiny small base large] [--stages 1 2 3] [--out benchmarks/results/gpu.json]
    torchrun --nproc-per-node 8 benchmarks/gpu.py ...

Checked: varlen attention against padded, one step of each ZeRO stage (equal losses), no wait of the host for the device in the step but
those that are listed. Timed: step, memory and MFU of each size and stage, with the estimate of memory beside what was used; both back ends
of attention at ragged lengths. Batches are noise, 4 to 64 tokens of text, with contrastive, captioning and masked-language losses.
Without a device all of it runs on the CPU with the tiny size, to its end; then only its not failing means something.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.synthetic import model_config, stage_config, synthetic_batch
from mmscale.arithmetic import plan_batch
from mmscale.config import RunConfig
from mmscale.counts import count
from mmscale.data.loader import StepBatch
from mmscale.data.statistics import Work
from mmscale.engine import Trainee, build_engine
from mmscale.flops import forward_flops, peak_flops
from mmscale.guard import Gate
from mmscale.memory import estimate
from mmscale.model import MMScaleModel
from mmscale.model.attention import Plan, padded_plan, varlen_plan
from mmscale.model.sequences import Wanted
from mmscale.objectives import build_objectives
from mmscale.step import StepSums, optimizer_step
from mmscale.world import World, connect, read_world, resolve_precision

MICRO = {"tiny": 2048, "small": 512, "base": 256, "large": 256}
"""Pairs a micro-batch on a device; large with full activation checkpointing, as its part says. Twice as many where there is `PLENTY`."""
PLENTY = 120 * 2**30
"""Bytes of a device."""
UNREPEATED = {"large": 192}
"""Pairs a micro-batch where there is `PLENTY`, once more without activation checkpointing."""
LONGEST = 64
OBJECTIVES = [
    *("objectives.contrastive.weight=1", "objectives.captioning.weight=1", "objectives.masked_language.weight=1"),
    *("objectives.matching.weight=0", "objectives.masked_image.weight=0"),
]
ALL_OBJECTIVES = ["objectives.matching.weight=1", "objectives.masked_image.weight=1"]
BATCHES = 4
"""Different batches that the steps go through in turn."""


class Case:
    """A model of one size under one stage, ready to take steps."""

    def __init__(self, place: Path, world: World, size: str, stage: int, micro: int, words: Sequence[str], hidden: float = 0.0) -> None:
        named = [f"model={size}", f"zero.stage={stage}", f"train.global_batch={micro * world.size}", *OBJECTIVES]
        self.config: RunConfig = stage_config(place, [*named, f"model.max_text_tokens={LONGEST}", *words])
        self.world, self.shape = world, model_config(self.config)
        self.plan, self.dtype = plan_batch(self.config, world.size), resolve_precision(self.config.train.precision, world.device)
        self.objectives = build_objectives(self.config)
        torch.manual_seed(0)
        self.trainee = Trainee(MMScaleModel(self.shape), self.objectives)
        seeds = [world.rank * BATCHES + i for i in range(BATCHES)]
        self.host = [synthetic_batch(self.shape, micro, seed, longest=LONGEST, hidden=hidden) for seed in seeds]
        self.batches = [b if world.device.type == "cpu" else b.to(world.device) for b in self.host]
        self.counts = [count(self.shape, b, Wanted.of(self.objectives)) for b in self.host]
        self.before = reset_peak(world)
        self.engine = build_engine(self.trainee, self.config, self.plan, self.dtype, world.device)
        self.gate = Gate(self.engine, self.config.train.clip_norm, *self.trainee.model.embeddings())

    def step(self, number: int) -> StepSums:
        """Take one step."""
        at = number % BATCHES
        batch = StepBatch(number, 0, [self.batches[at]], [self.host[at]], 0.0, [], Work(), 0)
        return optimizer_step(self, batch, False)  # what a step needs of a Run, this has too

    def close(self) -> None:
        """Give the memory back."""
        self.engine.destroy()
        del self.engine, self.trainee, self.batches, self.gate
        gc.collect()
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()


def reset_peak(world: World) -> int:
    """Count memory from here; the bytes that are taken already."""
    if world.device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(world.device)
    return int(torch.cuda.memory_allocated(world.device))


def wait(world: World) -> None:
    """Wait until the device has done what it was told."""
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def measure(case: Case, size: str, steps: int) -> dict[str, Any]:
    """Time the steps of a case (the better of two rounds), and compare its memory with the estimate."""
    for number in range(BATCHES):
        case.step(number)
    wait(case.world)
    times = []
    for _ in range(2):  # as in training the host runs ahead of the device, which is waited for at the end of a round alone
        start = time.perf_counter()
        for number in range(steps):
            case.step(number)
        wait(case.world)
        times.append((time.perf_counter() - start) / steps)
    step_s = min(times)
    device, cuda = case.world.device, case.world.device.type == "cuda"
    expected = estimate(case.trainee, case.config, case.plan, case.dtype, device, case.counts)
    used = torch.cuda.max_memory_allocated(device) - case.before if cuda else None
    operations = 3 * statistics.fmean(forward_flops(case.shape, c) for c in case.counts)
    peak = peak_flops(device, case.dtype)
    return {
        "size": size,
        "stage": case.config.zero.stage,
        "ranks": case.world.size,
        "micro_batch": case.plan.micro_batch,
        "precision": str(case.dtype).removeprefix("torch."),
        "activation_checkpointing": case.config.model.activation_checkpointing,
        "compile": case.config.train.compile,
        "step_ms": 1000 * step_s,
        "samples_per_s": case.plan.global_batch / step_s,
        "tflops_a_rank": operations / step_s / 1e12,
        "mfu": None if peak is None else operations / step_s / peak,
        "memory_mib": None if used is None else used / 2**20,
        "estimate_mib": expected.device / 2**20,
        "estimate_over_memory": None if used is None else expected.device / used,
    }


def losses_of_stages(place: Path, world: World, micro: int, words: Sequence[str]) -> dict[str, Any]:
    """The loss of three steps of the tiny model at every stage, and of stage 1 compiled: all compute the same."""
    cases: dict[str, tuple[int, list[str]]] = {str(stage): (stage, []) for stage in range(4)}
    if world.device.type == "cuda":
        cases["1, compiled"] = (1, ["train.compile=true"])
    found = {}
    for name, (stage, more) in cases.items():
        case = Case(place, world, "tiny", stage, micro, [*more, *words])
        found[name] = [sum(case.step(number).reduce()[0]) for number in range(3)]
        case.close()
    spread = max(abs(a - b) / abs(b) for row in found.values() for a, b in zip(row, found["0"], strict=True))
    return {"losses": found, "largest_relative_difference": spread, "equal": spread < 0.02}


def waits(place: Path, world: World, micro: int, words: Sequence[str]) -> dict[str, Any] | None:
    """Where the host waits for the device in a step of all five objectives that logs nothing; None without a device."""
    if world.device.type != "cuda":
        return None
    case = Case(place, world, "tiny", 1, micro, [*ALL_OBJECTIVES, *words], hidden=0.5)
    for number in range(3):
        case.step(number)
    wait(world)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            case.step(3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    case.close()
    root = str(Path(__file__).resolve().parent.parent) + "/"
    places = Counter(f"{w.filename.removeprefix(root)}:{w.lineno}" for w in caught if "synchroniz" in str(w.message))
    return {"waits_a_step": sum(places.values()), "places": dict(places.most_common())}


def attention(world: World, sequences: int, longest: int, heads: int, repeats: int) -> dict[str, Any]:
    """Both back ends over the same ragged sequences, half of them prefix-LM: results, and time of forward and backward."""
    cuda = world.device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(max(1, longest // 16), longest + 1, (sequences,), generator=g)
    prefix = torch.where(torch.arange(sequences) % 2 == 0, lengths, lengths // 2)
    rows = torch.arange(int(lengths.sum()))
    q, k, v = (torch.randn(len(rows), heads, 64, generator=g).to(world.device, dtype).requires_grad_() for _ in range(3))
    place = (lengths.to(world.device), prefix.to(world.device), rows.to(world.device))
    plans: dict[str, Plan] = {"padded": padded_plan(*place, dtype)}
    plans |= {"one_by_one": OneByOne(lengths.tolist(), prefix.tolist())} if not cuda else {"varlen": varlen_plan(*place)}
    outs, report = {}, {"sequences": sequences, "longest": longest, "tokens": len(rows), "dtype": str(dtype).removeprefix("torch.")}
    for name, plan in plans.items():
        outs[name] = plan.attend(q, k, v).detach().float()
        report[f"{name}_ms"] = 1000 * timed(world, lambda plan=plan: plan.attend(q, k, v).sum().backward(), repeats)
    first, second = outs.values()
    report["largest_difference"] = (first - second).abs().max().item()
    report["equal"] = report["largest_difference"] < (0.03 if cuda else 1e-5)
    return report | ({"varlen_speedup": report["padded_ms"] / report["varlen_ms"]} if cuda else {})


class OneByOne:
    """Attention of each sequence by itself, written out: what both back ends must give."""

    def __init__(self, lengths: Sequence[int], prefixes: Sequence[int]) -> None:
        self.lengths, self.prefixes = lengths, prefixes

    def attend(self, q_THK: torch.Tensor, k_THK: torch.Tensor, v_THK: torch.Tensor) -> torch.Tensor:
        """As `Plan.attend`."""
        outs = []
        for q, k, v, prefix in zip(*(x.split(list(self.lengths)) for x in (q_THK, k_THK, v_THK)), self.prefixes, strict=True):
            at = torch.arange(len(q))
            seen = (at[None] <= at[:, None]) | (at[None] < prefix)
            scores = torch.einsum("qhk,shk->hqs", q, k) / q.shape[-1] ** 0.5
            outs.append(torch.einsum("hqs,shk->qhk", scores.masked_fill(~seen, float("-inf")).softmax(-1), v))
        return torch.cat(outs)


def timed(world: World, function: Callable[[], None], repeats: int) -> float:
    """Median seconds of a call."""
    found = []
    for _ in range(repeats + 1):
        wait(world)
        start = time.perf_counter()
        function()
        wait(world)
        found.append(time.perf_counter() - start)
    return statistics.median(found[1:])


def run(world: World, given: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Check, then measure (all ranks call)."""
    cuda = world.device.type == "cuda"
    small = 64 if cuda else 4
    report: dict[str, Any] = {"benchmark": "gpu", "what": __doc__.split("\n", 1)[0], "checks": {}}
    report["checks"]["attention"] = attention(world, 64 if cuda else 6, 512 if cuda else 24, 12 if cuda else 2, 1)
    report["checks"]["stages"] = losses_of_stages(place, world, small, given.words)
    report["checks"]["waits"] = waits(place, world, small, given.words)
    report["attention"] = [attention(world, *s, 20 if cuda else 2) for s in ([(256, 320, 12), (64, 2048, 16)] if cuda else [(6, 24, 2)])]
    report["steps"] = []
    for size in given.sizes:
        plenty = cuda and torch.cuda.get_device_properties(world.device).total_memory > PLENTY
        micro = given.micro or (MICRO[size] * (1 + plenty) if cuda else 4)
        cases: list[tuple[int, int, list[str]]] = [(stage, micro, []) for stage in given.stages]
        if cuda and size in given.compiled:
            cases.insert(0, (1, micro, ["train.compile=true"]))
        if plenty and size in given.compiled and size in UNREPEATED:
            cases.insert(0, (1, UNREPEATED[size], ["train.compile=true", "model.activation_checkpointing=none"]))
        for stage, pairs, words in cases:
            found = one_case(place, world, size, stage, pairs, given, words)
            report["steps"].append(found)
            if world.is_first:
                print(json.dumps(found), flush=True)
                save(report, world, given.out)
    return report


def save(report: dict[str, Any], world: World, out: Path) -> None:
    """Write what there is so far."""
    cuda = world.device.type == "cuda"
    report["device"] = torch.cuda.get_device_name(world.device) if cuda else f"cpu ({platform.machine()})"
    report["versions"] = {n: version(n) for n in ("mmscale", "torch", "deepspeed")} | {"python": platform.python_version()}
    report["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")


def one_case(
    place: Path, world: World, size: str, stage: int, micro: int, given: argparse.Namespace, words: Sequence[str]
) -> dict[str, Any]:
    """Measure a case; one that does not fit is said to, and the others go on."""
    case = None
    try:
        case = Case(place, world, size, stage, micro, [*words, *given.words])
        return measure(case, size, given.steps)
    except torch.cuda.OutOfMemoryError:
        return {"size": size, "stage": stage, "micro_batch": micro, "out_of_memory": True}
    finally:
        if case is not None and hasattr(case, "engine"):
            case.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the result from rank 0.

    Returns:
        0, or 1 when a check failed.
    """
    world = read_world()
    cuda = world.device.type == "cuda"
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu.json")
    parser.add_argument("--sizes", nargs="+", choices=list(MICRO), default=list(MICRO) if cuda else ["tiny"])
    parser.add_argument("--stages", type=int, nargs="+", choices=[0, 1, 2, 3], default=[1, 2, 3])
    parser.add_argument("--compiled", nargs="*", choices=list(MICRO), default=["base", "large"], help="also with train.compile, stage 1")
    parser.add_argument("--steps", type=int, default=10 if cuda else 1)
    parser.add_argument("--micro", type=int, help="pairs a micro-batch; default: by size")
    parser.add_argument("--words", nargs="*", default=[], help="key=value words of a stage file, such as train.compile=true")
    given = parser.parse_args(argv)
    connect(world, 600)
    with tempfile.TemporaryDirectory() as place:
        report = run(world, given, Path(place))
    dist.destroy_process_group()
    checks = report["checks"]
    waited = checks["waits"] is not None and checks["waits"]["waits_a_step"] > 0
    return 0 if checks["attention"]["equal"] and checks["stages"]["equal"] and not waited else 1


if __name__ == "__main__":
    sys.exit(main())
