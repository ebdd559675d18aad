"""Published tables, from the sets as they lie on disk to a number beside those of others: ESC-10, TREC, MR, EmojiTwo.

    python benchmarks/published.py esc-10 | trec | mr | emojitwo [--seeds 0 1 2] [--parts N] [--jobs 1] [--tuning] [--place DIR]
        [--out FILE]

Every command is one that a user would type: `mmscale shards write` and `filter`, `mmscale launch`, `mmscale evaluate`. A training has one
rank with one thread, `--jobs` of them run side by side; what is finished is not done again. Recipes, and what they were tuned on, are in
benchmarks/tables/recipes.py: `--tuning` measures on a part held out of the training data instead, with `--words` for keys to try, each
try with a `--place` of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tables.commands import conditions, evaluate, train
from tables.recipes import RECIPES, Part, Recipe
from tables.sources import REPOSITORY


def measure(recipe: Recipe, part: Part, seed: int, folder: Path, words: list[str]) -> dict[str, Any]:
    """Train every stage of one part with one seed, and evaluate."""
    runs: dict[str, Path] = {}
    seconds = {}
    for stage in recipe.stages:
        run = folder / stage.name
        start = [f"init_from={list(runs.values())[-1]}"] if runs else []
        given = [f"data.shards={part.train}", f"train.seed={seed}", *start, *stage.words, *words]
        seconds[stage.name] = train(stage.config, run, *given)
        runs[stage.name] = run
    metrics = {}
    for task, names in recipe.tasks.items():
        found = evaluate(runs.get(task, list(runs.values())[-1]), task, part.test)
        metrics |= {name: found[name] for name in names}
    return {"part": part.name, "seed": seed, **metrics, "train_s": round(sum(seconds.values()), 1)}


def summarize(name: str, recipe: Recipe, results: list[dict[str, Any]], wanted: list[str], words: list[str]) -> dict[str, Any]:
    """A seed's number is the mean over its parts; mean and standard deviation over seeds, beside what was published.

    Args:
        name: of the set.
        recipe: its recipe.
        results: of every training that is done.
        wanted: parts; a seed counts when it has all of them.
        words: what went over the recipe.
    """
    seeds = sorted({r["seed"] for r in results if {o["part"] for o in results if o["seed"] == r["seed"]} == set(wanted)})
    metrics = [metric for names in recipe.tasks.values() for metric in names]
    by_seed = {m: [statistics.mean(r[m] for r in results if r["seed"] == seed) for seed in seeds] for m in metrics}
    return {
        "benchmark": f"published {name}",
        "note": recipe.note,
        "words": words,
        "seeds": seeds,
        "metrics": {
            m: {"mean": statistics.mean(v), "std": statistics.stdev(v) if len(v) > 1 else None, "by_seed": v}
            for m, v in by_seed.items()
            if v
        },
        "published": recipe.published,
        "longest_training_s": max(r["train_s"] for r in results),
        "results": results,
    } | conditions(threads_a_training=1)


def main() -> None:
    """Write shards, train, evaluate, save; the result file holds what is there after every training."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("set", choices=list(RECIPES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--parts", type=int, help="measure so many parts, such as folds; all by default")
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side")
    parser.add_argument("--tuning", action="store_true", help="measure on a part of the training data")
    parser.add_argument("--words", nargs="*", default=[], help="more words for every mmscale launch")
    parser.add_argument("--place", type=Path, default=REPOSITORY / "runs" / "published")
    parser.add_argument("--out", type=Path)
    words = parser.parse_args()
    place, recipe = words.place.resolve() / words.set, RECIPES[words.set]
    parts = recipe.parts(place, words.tuning)
    out = words.out or (place / "tuning.json" if words.tuning else Path(__file__).parent / "results" / f"published-{words.set}.json")
    prefix = "tuning-" if words.tuning else ""
    results: list[dict[str, Any]] = []
    with ThreadPoolExecutor(words.jobs) as pool:
        wanted = [(part, seed) for seed in words.seeds for part in parts[: words.parts]]
        folders = {(part.name, seed): place / f"{prefix}seed-{seed}" / part.name for part, seed in wanted}
        made = [pool.submit(measure, recipe, part, seed, folders[part.name, seed], words.words) for part, seed in wanted]
        for one in as_completed(made):
            results.append(one.result())
            print(json.dumps(results[-1]), flush=True)
            results.sort(key=lambda found: (found["seed"], found["part"]))
            found = summarize(words.set, recipe, results, [p.name for p in parts], words.words) | {"jobs": words.jobs}
            out.write_text(json.dumps(found, indent=1) + "\n")
    print(out.read_text())


if __name__ == "__main__":
    main()
