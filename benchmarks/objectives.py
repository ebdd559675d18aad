"""One forward for five objectives against one forward per objective: the same losses and gradients, the samples a second of both.

    python benchmarks/objectives.py [--sizes 192x6 64x3] [--rounds 8] [--out benchmarks/results/objectives.json]

All three ways train the same model on the same batches of glyph pairs (64 samples, every sample takes part in every objective) with the
same fused AdamW, one thread, fp32:

- `one`: the model's forward with all five objectives, one backward.
- `each`: five forwards and backwards, each with one objective alone and the whole batch; gradients are added up.
- `lean`: as `each`, but a forward is given only what its objective reads (no texts for contrastive and captioning, no captions for masked
  language, neither for masked image). It is what five loops written for one objective each would cost.

That losses agree to 1e-5 and gradients to 1e-5 of the largest is asserted first. The ways take turns step by step (A B C, C B A, ...);
ratios are those of a round's sums, medians over rounds are kept.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from step import SIZES, cpu_name, now, prepare, stage_config, write_glyphs
from torch import Tensor

from mmscale.assemble import Run, assemble, build_model
from mmscale.data.batch import Batch
from mmscale.engine import Trainee
from mmscale.model.model import no_text
from mmscale.objectives import Objective
from mmscale.optim import build_optimizer
from mmscale.world import World, connect, read_world

OF_FIVE = [size for size in SIZES if size != "peers"]
ROUND = 4
"""Steps of each way in a round."""
WARM_UP = 2
"""Steps of each way before the first round."""
ALL_TAKE_PART = ["objectives.matching.fraction=1", "objectives.masked_language.fraction=1", "objectives.masked_image.fraction=1"]
UNREAD = {
    "contrastive": ("text",),
    "captioning": ("text",),
    "matching": (),  # draws its hard negatives by the captions' embeddings
    "masked_language": ("caption",),
    "masked_image": ("text", "caption"),
}
"""Streams that an objective reads nothing of."""
WAYS = ("one", "each", "lean")


class Way:
    """One way to train, with a model and an optimizer of its own."""

    def __init__(self, name: str, run: Run) -> None:
        self.name, self.objectives = name, run.objectives
        self.trainee = Trainee(build_model(run.config, run.tokenizer, None, None)[0], run.objectives)
        self.optimizer = build_optimizer(self.trainee, run.config.optimizer)

    def backward(self, batch: Batch, factors_K: Tensor) -> dict[str, float]:
        """Add the gradient of a batch; the loss sum of each objective."""
        if self.name == "one":
            loss, sums_K, _ = self.trainee(batch, factors_K)
            loss.backward()
            return dict(zip((o.name for o in self.objectives), sums_K.tolist(), strict=True))
        found = {}
        for index, objective in enumerate(self.objectives):
            part = lean(batch, objective) if self.name == "lean" else batch
            loss, sums_K, _ = self.trainee(part, factors_K[index : index + 1], [objective])
            loss.backward()
            found[objective.name] = sums_K.item()
        return found

    def step(self, batch: Batch, factors_K: Tensor) -> None:
        """Take a step."""
        self.optimizer.zero_grad()
        self.backward(batch, factors_K)
        self.optimizer.step()


def lean(batch: Batch, objective: Objective) -> Batch:
    """The batch without the streams that an objective reads nothing of."""
    return replace(batch, **dict.fromkeys(UNREAD[objective.name], no_text(batch)))


def assert_equal(ways: Sequence[Way], batch: Batch, factors_K: Tensor) -> dict[str, float]:
    """Check that all ways give the same losses and gradients; the largest differences, relative."""
    expected = ways[0].backward(batch, factors_K)
    gradients = [p.grad.clone() for p in ways[0].trainee.parameters()]
    largest = max(g.abs().max().item() for g in gradients)
    worst = {"loss": 0.0, "gradient": 0.0}
    for way in ways[1:]:
        for name, loss in way.backward(batch, factors_K).items():
            worst["loss"] = max(worst["loss"], abs(loss - expected[name]) / abs(expected[name]))
        differences = (p.grad - g for p, g in zip(way.trainee.parameters(), gradients, strict=True))
        worst["gradient"] = max(worst["gradient"], *(d.abs().max().item() / largest for d in differences))
    assert max(worst.values()) < 1e-5, worst
    return worst


def measure(place: Path, size: str, rounds: int, world: World, group: dist.ProcessGroup) -> dict[str, Any]:
    """Measure one size of model."""
    config = stage_config(place, size, 0, *ALL_TAKE_PART)
    run = assemble(config, world, group)
    batches = prepare(run, WARM_UP + rounds * ROUND)
    ways = [Way(name, run) for name in WAYS]
    case: dict[str, Any] = {"size": size, "batch": config.train.global_batch, "rounds": rounds}
    case["parameters"] = sum(p.numel() for p in ways[0].trainee.parameters())
    case["largest_differences"] = assert_equal(ways, *batches[0])
    sums = []
    for number in range(-1, rounds):
        gc.collect()
        some = batches[:WARM_UP] if number < 0 else batches[WARM_UP + number * ROUND :][:ROUND]
        sums.append(dict.fromkeys(WAYS, 0.0))
        for turn, (batch, factors_K) in enumerate(some):
            for way in ways if turn % 2 == 0 else ways[::-1]:
                start = time.perf_counter()
                way.step(batch, factors_K)
                sums[-1][way.name] += time.perf_counter() - start
    del sums[0]
    for name in WAYS:
        case[f"{name}_samples_per_s"] = config.train.global_batch * ROUND / statistics.median(s[name] for s in sums)
    for name in WAYS[1:]:
        ratios = sorted(s[name] / s["one"] for s in sums)
        case[f"ratio_to_{name}"], case[f"ratios_to_{name}"] = statistics.median(ratios), ratios
    run.engine.destroy()
    rates = ", ".join(f"{name} {case[f'{name}_samples_per_s']:.1f}" for name in WAYS)
    print(f"{size}: {rates} samples/s; {case['ratio_to_each']:.2f} x each, {case['ratio_to_lean']:.2f} x lean", flush=True)
    return case | {"date": now()}


def main() -> None:
    """Write shards, measure, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "objectives.json")
    parser.add_argument("--sizes", nargs="+", choices=OF_FIVE, default=OF_FIVE)
    parser.add_argument("--rounds", type=int, default=8)
    words = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("mmscale").addHandler(logging.NullHandler())
    world = read_world()
    group = connect(world, 300)
    with tempfile.TemporaryDirectory() as temporary:
        for size in words.sizes:
            write_glyphs(Path(temporary), size)
        cases = [measure(Path(temporary), size, words.rounds, world, group) for size in words.sizes]
    dist.destroy_process_group()
    report = {
        "benchmark": "objectives",
        "what": "a training step of one forward for five objectives against one forward per objective; fp32, one thread",
        "ratio": f"samples a second of `one` over those of the other way, medians over rounds of {ROUND} steps",
        "results": cases,
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "system": platform.platform()},
        "versions": {n: version(n) for n in ("mmscale", "torch")} | {"python": platform.python_version()},
        "date": now(),
    }
    words.out.parent.mkdir(parents=True, exist_ok=True)
    words.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
