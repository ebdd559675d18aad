"""Does every objective learn? Held-out losses on glyph pairs, against an untrained model and against a control.

    python benchmarks/learns.py [--steps 600] [--batch 64] [--every 2] [--jobs 2] [--out benchmarks/results/learns.json]

Trains one model for each objective alone, one for all five together, at equal steps, batches, rates and seeds, on glyphs of the training
styles; losses and retrieval are those of the held-out styles. Controls, where chance and what can be had without learning the task show:

- contrastive, matching, masked language, captioning: the same training with each picture moved on to the next sample, so that captions
  and pictures are as before but say nothing of each other;
- masked image, which reads no caption: the best constant prediction of a patch (the mean over the very held-out patches).

All five weigh 1, and take all samples. `won` says whether the trained model's loss is below both. R@1 is among `candidates` held-out pairs.
Captions are compared with captioning alone too, because contrastive training alone cannot write any. Writes PNG beside the JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import datetime, timezone
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from mmscale.assemble import build_model, find_tokenizer
from mmscale.config import RunConfig, load_run_config
from mmscale.data.batch import Batch
from mmscale.data.collate import Collator
from mmscale.data.dataset import ShardDataset
from mmscale.data.loader import StepLoader
from mmscale.data.tokenize import TextTokenizer
from mmscale.engine import Trainee
from mmscale.evaluate import EvaluateCommand, evaluation_config, predict_records
from mmscale.model import MMScaleModel
from mmscale.model.sequences import Wanted
from mmscale.objectives import build_objectives
from mmscale.optim import build_optimizer, learning_rate
from mmscale.tasks import build_task
from shards import configfile
from shards.config import WriteConfig
from shards.write import write_shards

OBJECTIVES = ("contrastive", "matching", "masked_language", "captioning", "masked_image")
STAGE = """
data: {max_text_tokens: 24}
model: {hidden_size: 128, num_heads: 4, unimodal_layers: 2, fusion_layers: 2, image_size: 32, patch_size: 8, max_text_tokens: 24,
        image_mean: [0.92, 0.92, 0.92], image_std: [0.25, 0.25, 0.25]}
objectives: {masked_language: {mask: 0.3}, masked_image: {mask: 0.5}}
optimizer: {lr: 2.0e-3, warmup_steps: 60, weight_decay: 0.1}
train: {precision: fp32}
"""
EVALUATED = 16
"""Held-out batches that a loss is a mean over."""


def write_glyphs(place: Path, every: int) -> None:
    """Write shards of training styles and of held-out styles."""
    for split, kind in (("train", "bpe"), ("heldout", "none")):
        words = ["source=glyphs", f"out={place}/{split}", f"glyphs.split={split}", f"glyphs.every={every}", "rows_per_shard=1024"]
        words += ["processes=1", f"tokenizer.kind={kind}", "tokenizer.vocab_size=2048"]
        write_shards(configfile.load(WriteConfig, None, words), progress=False)


def stage_config(place: Path, names: Sequence[str], steps: int, batch: int, *more: str) -> RunConfig:
    """The stage of these objectives."""
    path = place / "stage.yaml"
    if not path.exists():
        path.write_text(STAGE)
    words = [f"run={place}/run", f"data.shards={place}/train", f"train.steps={steps}", f"train.global_batch={batch}"]
    return load_run_config(path, [*words, *(f"objectives.{name}.weight=1" for name in names), *more])


def batches(config: RunConfig, shards: Path, steps: int) -> Iterator[Batch]:
    """Batches of a data set as training sees them, masks and noise included."""
    tokenizer = TextTokenizer(find_tokenizer(config, None))
    dataset = ShardDataset(shards, seed=config.train.seed, image_size=config.model.image_size)
    collator = Collator.from_config(config, tokenizer, training=True)
    size = config.train.global_batch
    with StepLoader(dataset, collator, global_batch=size, micro_batch=size, rank=0, size=1, steps=steps) as loader:
        for step in loader:
            yield step.micro[0]


def shuffled(batch: Batch) -> Batch:
    """Each picture moved on to the next sample that has one."""
    return replace(batch, pixels_NCHW=batch.pixels_NCHW.roll(1, 0))


def train(config: RunConfig, place: Path, control: bool) -> MMScaleModel:
    """Train a model from nothing."""
    objectives = build_objectives(config)
    model = build_model(config, TextTokenizer(find_tokenizer(config, None)), None, None)[0]
    trainee = Trainee(model.train(), objectives)
    optimizer = build_optimizer(trainee, config.optimizer)
    for step, batch in enumerate(batches(config, place / "train", config.train.steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.train.steps, config.optimizer)
        factors_K = torch.tensor([o.weight / max(1.0, o.count(batch)) for o in objectives])
        optimizer.zero_grad()
        trainee(shuffled(batch) if control else batch, factors_K)[0].backward()
        torch.nn.utils.clip_grad_norm_(trainee.parameters(), config.train.clip_norm)
        optimizer.step()
    return model.eval()


@torch.no_grad()
def held_out_losses(model: MMScaleModel, config: RunConfig, place: Path) -> dict[str, float]:
    """Mean losses over held-out batches, of the objectives of a configuration; the best constant of `masked_image` where it is one."""
    objectives, patches = build_objectives(config), []
    sums, counts = dict.fromkeys((o.name for o in objectives), 0.0), dict.fromkeys((o.name for o in objectives), 0.0)
    for batch in batches(config, place / "heldout", EVALUATED):
        terms = model(batch, objectives)
        for objective in objectives:
            sums[objective.name] += terms[objective.name].sum.item()
            counts[objective.name] += objective.count(batch)
        if "masked_image" in sums:
            patches += [target for _, target in model.run(batch, Wanted(masked_image=True)).patches]
    losses = {name: sums[name] / counts[name] for name in sums}
    return losses | ({"constant": torch.cat(patches).var(0, correction=0).mean().item()} if patches else {})


def scores(model: MMScaleModel, config: RunConfig, place: Path, samples: int) -> dict[str, float]:
    """Retrieval and captioning on held-out pairs."""
    found = {}
    tokenizer = TextTokenizer(find_tokenizer(config, None))
    for name, metrics in (("retrieval", ("image_to_text_r1", "text_to_image_r1")), ("captioning", ("exact_match", "chrf"))):
        pointed = evaluation_config(config, EvaluateCommand(task=name, data=str(place / "heldout")))
        task = build_task(pointed)
        records = predict_records(model, task, pointed, tokenizer, samples=samples, batch=250, device=torch.device("cpu"))
        found |= {metric: task.score(records)[metric] for metric in metrics}
    return found


def experiment(place: Path, names: Sequence[str], control: bool, steps: int, batch: int, samples: int) -> dict[str, Any]:
    """Train and evaluate one model; `steps` 0 is an untrained one, evaluated by all objectives of `names`."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    config = stage_config(place, names, max(1, steps), batch)
    if steps:
        model = train(config, place, control)
    else:
        model = build_model(config, TextTokenizer(find_tokenizer(config, None)), None, None)[0].eval()
    result = {"objectives": list(names), "control": control, "steps": steps, "losses": held_out_losses(model, config, place)}
    return result | scores(model, config, place, samples) | {"seconds": time.perf_counter() - start}


def plan(steps: int) -> list[tuple[Sequence[str], bool, int]]:
    """Objectives, whether it is the control, and steps of each model; the longest first."""
    alone = [((name,), False, steps) for name in OBJECTIVES]
    controls = [((name,), True, steps) for name in OBJECTIVES if name != "masked_image"]
    return [(OBJECTIVES, False, steps), *alone, *controls, (OBJECTIVES, False, 0)]


def compare(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row an objective: held-out losses untrained, of the control, trained alone and among all five."""
    by = {(tuple(r["objectives"]), r["control"], r["steps"] > 0): r for r in results}
    untrained, together = by[OBJECTIVES, False, False]["losses"], by[OBJECTIVES, False, True]["losses"]
    rows = []
    for name in OBJECTIVES:
        control = together["constant"] if name == "masked_image" else by[(name,), True, True]["losses"][name]
        trained = by[(name,), False, True]["losses"][name]
        row = {"objective": name, "untrained": untrained[name], "control": control, "alone": trained, "together": together[name]}
        rows.append(row | {"won": trained < min(untrained[name], control)})
    return rows


def draw(rows: Sequence[dict[str, Any]], results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw losses by objective, and what retrieval and captions gain."""
    from matplotlib.figure import Figure

    kinds = {"untrained": "#d0d0d0", "control": "#fdae61", "alone": "#74add1", "together": "#1a9850"}
    figure = Figure(figsize=(13, 3.4), layout="constrained")
    axes = figure.subplots(1, len(rows) + 1, width_ratios=[*[1] * len(rows), 1.6])
    for axis, row in zip(axes, rows, strict=False):
        axis.bar(list(kinds), [row[kind] for kind in kinds], color=list(kinds.values()))
        axis.set_title(f"{row['objective'].replace('_', ' ')}\nheld-out loss", fontsize=9)
        axis.tick_params(axis="x", rotation=60, labelsize=8)
    kept = (OBJECTIVES, ("contrastive",), ("captioning",))
    shown = [r for r in results if not r["control"] and r["steps"] and tuple(r["objectives"]) in kept]
    labels = ["all five" if len(r["objectives"]) > 1 else f"{r['objectives'][0]}\nalone" for r in shown]
    metrics = {"image_to_text_r1": "#74add1", "text_to_image_r1": "#4575b4", "exact_match": "#1a9850"}
    for shift, (metric, colour) in enumerate(metrics.items()):
        places = [i + 0.27 * (shift - 1) for i in range(len(shown))]
        axes[-1].bar(places, [100 * r[metric] for r in shown], width=0.27, color=colour, label=metric.replace("_", " "))
    axes[-1].set_xticks(range(len(shown)), labels, fontsize=8)
    axes[-1].set_title("held-out styles, %", fontsize=9)
    axes[-1].legend(fontsize=7)
    figure.savefig(path, dpi=120)


def run(place: Path, steps: int, batch: int, samples: int, jobs: int) -> list[dict[str, Any]]:
    """Train and evaluate all models, some side by side."""
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(experiment, place, *case, batch, samples) for case in plan(steps)]
        return [future.result() for future in futures]


def main() -> None:
    """Write shards, train, evaluate, write the result and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "learns.json")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--every", type=int, default=2, help="keep every n-th glyph")
    parser.add_argument("--candidates", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=2)
    words = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        write_glyphs(place, words.every)
        stage_config(place, OBJECTIVES, 1, words.batch)
        results = run(place, words.steps, words.batch, words.candidates, words.jobs)
    rows = compare(results)
    for row in rows:
        print("  ".join(f"{key} {value:.3f}" if isinstance(value, float) else f"{value}" for key, value in row.items()))
    for result in results:
        kind = "untrained" if not result["steps"] else "control" if result["control"] else ""
        what = "all five" if len(result["objectives"]) > 1 else result["objectives"][0]
        parts = (f"{m} {result[m]:.1%}" for m in ("image_to_text_r1", "text_to_image_r1", "exact_match"))
        print(f"{what} {kind}: {', '.join(parts)}, {result['seconds']:.0f} s")
    report = {
        "benchmark": "learns",
        "what": "held-out losses of each objective alone, untrained and of a control; retrieval and captions of all five together",
        "setting": {"steps": words.steps, "batch": words.batch, "glyphs.every": words.every, "candidates": words.candidates},
        "objectives": rows,
        "models": results,
        "minutes": (time.perf_counter() - start) / 60,
        "machine": {"cores": os.cpu_count(), "system": platform.platform()},
        "versions": {n: version(n) for n in ("mmscale", "torch")} | {"python": platform.python_version()},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    words.out.parent.mkdir(parents=True, exist_ok=True)
    words.out.write_text(json.dumps(report, indent=1) + "\n")
    draw(rows, results, words.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
