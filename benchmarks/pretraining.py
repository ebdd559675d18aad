"""Does pretraining help where labels are few? The same fine-tuning on a tenth of the labels, from a pretrained model and from scratch.

    python benchmarks/pretraining.py [trec mr emojitwo glyphs glyph-captions] [--seeds 0 1 2] [--jobs 1] [--place DIR] [--out FILE]

Pretraining sees the whole training part without its labels (the recipes of benchmarks/tables/recipes.py; of glyphs the stage files of the
demo, pretraining with names that do not tell the script; one model for both tasks: the script, seen in the picture alone, and the caption,
whose other words pretraining had), fine-tuning a tenth of it with them, drawn by `mmscale shards filter
fraction=0.1`. Three models: `pretrained`; `scratch`, as many steps of fine-tuning from random weights; `scratch, longer`, as many as
pretraining and fine-tuning have together. No setting was chosen by these numbers, but one: glyphs are read without the rest
of their names, as with it one seed was above 96 % whichever way it was trained. `--jobs` seeds run side by side, a training has one
rank with one thread, and what is finished is not done again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tables.commands import conditions, evaluate, shards, train
from tables.recipes import RECIPES, Part, Stage
from tables.sources import REPOSITORY

FRACTION = 0.1
CASES = ("pretrained", "scratch", "scratch, longer")


@dataclass(frozen=True, kw_only=True)
class Few:
    """How a task is learned from few labels."""

    part: Callable[[Path], Part]
    """Folder to what is learned from and measured on."""
    stages: tuple[Stage, ...]
    """Pretraining and fine-tuning."""
    task: str
    metric: str
    steps: int
    """Of fine-tuning."""
    pretraining_steps: int
    words: tuple[str, ...] = ()
    """Of fine-tuning."""
    folder: str | None = None
    """Another task's, whose shards and pretrained model this one has, too."""


def published(name: str, **few: Any) -> Few:
    """The stages of a published set's recipe, on its first part."""
    recipe = RECIPES[name]
    return Few(part=lambda place: recipe.parts(place, False)[0], stages=recipe.stages, **few)


def glyphs(place: Path) -> Part:
    """Glyphs as the demo writes them: held out are whole styles."""
    written = {
        split: shards("write", place / "shards" / split, "configs/demo/shards.yaml", f"glyphs.split={split}", *words)
        for split, words in (("train", ()), ("heldout", ("tokenizer.kind=none",)))
    }
    return Part(name="styles", train=written["train"], test=written["heldout"])


ON_ONE_CPU = ("train.precision=fp32", "zero.stage=0")
NAMES = Stage(name="pretrain", config="configs/demo/pretrain.yaml", words=("data.caption=name_in_script", *ON_ONE_CPU))
GLYPHS = Few(
    part=glyphs,
    stages=(NAMES, Stage(name="classification", config="configs/demo/finetune.yaml", words=ON_ONE_CPU)),
    task="classification",
    metric="accuracy",
    steps=700,
    pretraining_steps=1600,
    words=("data.text=null",),  # the picture alone
)
TASKS = {
    "trec": published("trec", task="classification", metric="accuracy", steps=400, pretraining_steps=1200),
    "mr": published("mr", task="classification", metric="accuracy", steps=400, pretraining_steps=1500),
    "emojitwo": published("emojitwo", task="tagging", metric="map", steps=300, pretraining_steps=1200, words=("train.global_batch=64",)),
    "glyphs": GLYPHS,
    "glyph-captions": replace(
        GLYPHS,
        stages=(NAMES, Stage(name="captioning", config="configs/demo/pretrain.yaml", words=ON_ONE_CPU)),
        task="captioning",
        metric="exact_match",
        words=("task.name=captioning", "objectives.contrastive.weight=0", "objectives.captioning.weight=0", "optimizer.lr=1e-3"),
        folder="glyphs",
    ),
}


def measure(name: str, part: Part, few: Path, seed: int, folder: Path) -> dict[str, Any]:
    """Pretrain once, fine-tune three times."""
    wanted = TASKS[name]
    pretraining, finetuning = wanted.stages
    seeded = f"train.seed={seed}"
    pretrained = folder / pretraining.name
    whole = (f"data.shards={part.train}", seeded, *pretraining.words, f"train.steps={wanted.pretraining_steps}")
    seconds = {"pretraining": train(pretraining.config, pretrained, *whole)}
    found: dict[str, Any] = {"task": name, "seed": seed}
    for case in CASES:
        init = pretrained if case == "pretrained" else "null"
        steps = wanted.steps + (wanted.pretraining_steps if case == "scratch, longer" else 0)
        run = folder / f"{finetuning.name}-{case.replace(', ', '-')}"
        words = (*finetuning.words, *wanted.words)
        seconds[case] = train(finetuning.config, run, f"data.shards={few}", seeded, f"init_from={init}", *words, f"train.steps={steps}")
        found[case] = evaluate(run, wanted.task, part.test)[wanted.metric]
    found["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    found["seconds"] = {case: round(took, 1) for case, took in seconds.items()}
    print(json.dumps(found), flush=True)
    return found


def summarize(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds of each task, and what pretraining brought."""
    tables = {}
    for name, wanted in TASKS.items():
        of_task = [r for r in results if r["task"] == name]
        if not of_task:
            continue
        cases = {case: [r[case] for r in of_task] for case in CASES}
        means = {case: statistics.mean(values) for case, values in cases.items()}
        tables[name] = {
            "metric": wanted.metric,
            "cases": {c: {"mean": means[c], "std": statistics.stdev(v) if len(v) > 1 else None, "by_seed": v} for c, v in cases.items()},
            "gain": means["pretrained"] - means["scratch"],
            "gain_over_longer": means["pretrained"] - means["scratch, longer"],
        }
    return {"benchmark": "pretraining", "fraction": FRACTION, "tasks": tables, "results": results} | conditions(threads_a_training=1)


def main() -> None:
    """Write shards, train, evaluate, save after every task; what the result file has of other tasks stays in it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("tasks", nargs="*", default=list(TASKS), help=f"of {', '.join(TASKS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--place", type=Path, default=REPOSITORY / "runs" / "pretraining")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "pretraining.json")
    words = parser.parse_args()
    before = json.loads(words.out.read_text())["results"] if words.out.exists() else []
    results: list[dict[str, Any]] = [r for r in before if r["task"] not in words.tasks]
    for name in words.tasks:
        place = words.place.resolve() / (TASKS[name].folder or name)
        part = TASKS[name].part(place)
        few = shards("filter", place / "shards" / "few", str(part.train), f"fraction={FRACTION}")
        with ThreadPoolExecutor(words.jobs) as pool:
            folders = [place / f"seed-{seed}" / part.name for seed in words.seeds]
            made = zip(words.seeds, folders, strict=True)
            results += pool.map(lambda one, n=name, p=part, f=few: measure(n, p, f, *one), made)
        words.out.write_text(json.dumps(summarize(results), indent=1) + "\n")
    print(words.out.read_text())


if __name__ == "__main__":
    main()
