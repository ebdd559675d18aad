"""Visual questions on published sets: easy-VQA and SHAPES, from shards to a table beside the published results.

    python benchmarks/vqa.py easy-vqa | shapes [--seeds 0 1 2] [--jobs 1] [--place runs/vqa] [--out benchmarks/results/vqa-SET.json]

Every command is one that a user would type: `mmscale shards write`, `mmscale launch`, `mmscale evaluate`. Only the training split is ever
trained on, from random weights. For each seed: training and evaluation; for the first seed also two controls of the same size, one that
sees the question alone, one the image alone. `--jobs` seeds run side by side; a rank has one thread. Times are wall seconds of training on
the machine named in the result.
"""

from __future__ import annotations

import argparse
import json
import statistics
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tables.commands import call, conditions, train
from tables.sources import REPOSITORY, easy_vqa, shapes

from mmscale.config import load_run_config
from mmscale.data.augment import draws_for, follows, rewrite
from mmscale.data.labels import label_vocabulary
from shards.read import ShardReader

CONTROLS = {"question only": ["data.image=false"], "image only": ["data.text=null"]}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a set is learned."""

    split: str
    """What is evaluated."""
    ranks: int
    """Ranks of a run."""
    published: dict[str, float]
    """Accuracy by method, from the set's README."""
    note: str
    words: tuple[str, ...]
    """Of the training."""


SMALL = (
    *("model.hidden_size=64", "model.num_heads=4", "model.unimodal_layers=0", "model.text.layers=2", "model.fusion_layers=4"),
    *("model.image.convolution=true", "model.text.convolution=true", "model.text.table_std=1"),
    *("train.global_batch=128", "train.precision=fp32", "zero.stage=0"),  # the fastest for so small a model on CPUs
)
MUON = (
    *("optimizer.name=muon", "optimizer.lr=2e-3", "optimizer.weight_decay=0.1"),
    *("optimizer.min_lr_ratio=0.02", "train.ema_decay=0.995"),
)
RECIPES = {
    "easy-vqa": Recipe(
        split="test",
        ranks=1,
        published={"CNN + bag of words, 8 epochs": 0.938, "question-only lookup": 0.670, "majority": 0.364},
        note="Complete published splits. The recipe was tuned on a tenth of the training images.",
        words=(
            *("train.steps=2400", *MUON, "optimizer.warmup_steps=100", "model.patch_size=8", *SMALL),
            *("model.image_mean=[0.9,0.9,0.9]", "model.image_std=[0.2,0.2,0.2]", "data.augment.dihedral=true"),
        ),
    ),
    "shapes": Recipe(
        split="val",
        ranks=1,
        published={
            "NMN (official test)": 0.906,
            "N2NMN, policy search from scratch (official test)": 0.9619,
            "VIS+LSTM (official test)": 0.653,
            "majority": 0.615,
        },
        note="Trained on reconstructed images: the published training images of train.large are not to be had. Evaluated on the original "
        "val split; its questions never occur in the training split. Flips, quarter turns and exchanged channels change images and "
        "questions together, so that some of them can occur in an augmented batch. The recipe was tuned on 24 of the training questions.",
        words=(
            *("train.steps=8000", *MUON, "optimizer.warmup_steps=200", "model.image_size=30", "model.patch_size=10", *SMALL),
            *("model.image_mean=[0.09,0.09,0.09]", "model.image_std=[0.25,0.25,0.25]"),
            *("data.augment.dihedral=true", "data.augment.directions=[above,right of,below,left of]"),
            *("data.augment.channel_permutation=true", "data.augment.colours=[red,green,blue]"),
        ),
    ),
}


def write_shards(name: str, place: Path) -> Path:
    """Write both splits once; the tokenizer is trained on the training split."""
    tables = {"easy-vqa": easy_vqa, "shapes": shapes}[name](place / "tables")
    for split, table in tables.items():
        out = place / "shards" / split
        words = ["source=table", f"path={table}", f"out={out}", "quarantine.max_fraction=0", "image.format=png"]
        tokenizer = ["tokenizer.kind=wordpiece", "tokenizer.vocab_size=500", "tokenizer.lowercase=true"] if split == "train" else []
        call(["shards", "write", *words, *tokenizer], place / f"shards-{split}.log")
    return place / "shards"


def evaluate(run: Path, data: Path) -> dict[str, Any]:
    """Accuracy of a run's newest checkpoint, and of it over those questions alone that no step of the run can have shown."""
    call(["evaluate", str(run), "task=vqa", f"data={data}"], run.with_suffix(".evaluate.log"))
    out = run / "evaluations" / "vqa"
    records = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    shown, reader = questions_shown(run), ShardReader(data)
    samples = (reader[shard, row] for shard, rows in enumerate(reader.rows_per_shard) for row in range(rows))
    asked = {sample.key: sample.fields()["question"] for sample in samples}
    new = [record["label"] == record["prediction"] for record in records if asked[record["key"]] not in shown]
    return {
        "accuracy": json.loads((out / "report.json").read_text())["metrics"]["accuracy"],
        "new_questions": {"samples": len(new), "accuracy": statistics.mean(new) if new else None},
    }


def questions_shown(run: Path) -> set[str]:
    """Every question of a run's data set, and every one that augmentation makes of it."""
    config = load_run_config(run / "config.yaml").data
    questions = set(label_vocabulary(ShardReader(config.shards), "question"))
    if not follows(config.augment):
        return questions
    draws = draws_for(0, np.arange(1000))  # 48 ways to turn and recolour: none is left out
    return {rewrite(question, config.augment, drawn) for question in questions for drawn in draws}


def measure(name: str, place: Path, seed: int, controls: bool) -> dict[str, Any]:
    """One seed: training, evaluation."""
    recipe, shards = RECIPES[name], place / "shards"
    folder = place / f"seed-{seed}"
    words = [f"data.shards={shards / 'train'}", f"train.seed={seed}", "init_from=null", *recipe.words]
    result: dict[str, Any] = {"seed": seed}
    cases: dict[str, list[str]] = {"model": []} | (CONTROLS if controls else {})
    for what, extra in cases.items():
        run = folder / what.replace(" ", "-")
        took = train("configs/finetune/questions.yaml", run, *words, *extra, ranks=recipe.ranks)
        result[what] = evaluate(run, shards / recipe.split) | {"train_s": took}
        print(f"{name}, seed {seed}, {what}: {result[what]['accuracy']:.4f}  ({took:.0f} s)", flush=True)
    return result


def summarize(name: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds, beside what was published."""
    recipe = RECIPES[name]
    found = [r["model"]["accuracy"] for r in results]
    new = [r["model"]["new_questions"]["accuracy"] for r in results]
    return {
        "benchmark": f"vqa {name}",
        "split": recipe.split,
        "note": recipe.note,
        "accuracy_mean": statistics.mean(found),
        "accuracy_std": statistics.stdev(found) if len(found) > 1 else None,
        "new_questions_accuracy": None if None in new else statistics.mean(new),
        "controls": {what: r[what]["accuracy"] for r in results for what in CONTROLS if what in r},
        "published": recipe.published,
        "longest_training_s": max(r["model"]["train_s"] for r in results),
        "results": results,
    } | conditions(ranks_a_run=recipe.ranks)


def main() -> None:
    """Write shards, train, evaluate, save."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("set", choices=list(RECIPES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--place", type=Path, default=REPOSITORY / "runs" / "vqa")
    parser.add_argument("--out", type=Path)
    words = parser.parse_args()
    place = words.place.resolve() / words.set
    place.mkdir(parents=True, exist_ok=True)
    write_shards(words.set, place)
    with ThreadPoolExecutor(words.jobs) as pool:
        results = list(pool.map(lambda seed: measure(words.set, place, seed, seed == words.seeds[0]), words.seeds))
    out = words.out or Path(__file__).parent / "results" / f"vqa-{words.set}.json"
    out.write_text(json.dumps(summarize(words.set, results), indent=1) + "\n")
    print(out.read_text())


if __name__ == "__main__":
    main()
