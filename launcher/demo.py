"""`make demo`: the main job from raw pairs to evaluated models, as the very commands that a user would type.

Without data of the user's own it draws glyphs and holds out whole styles of them; otherwise it holds out every tenth shard.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from launcher.engines.programs import find_program
from launcher.errors import LaunchError
from shards.errors import ConfigError, MmscaleError
from shards.manifest import read_manifest

TABLES = {".csv", ".tsv", ".jsonl", ".parquet"}
CONFIGS = Path("configs/demo")
RANKS = 2
ROWS_PER_SHARD = 50
"""Of the user's own pairs: small shards, so that a tenth of them can be held out of few pairs too."""
BATCH, EPOCHS, FEWEST_STEPS, MOST_STEPS = 128, 30, 200, 1600
"""Pretraining on the user's own pairs: so many passes, within bounds; the batch is that of the stage file."""
OWN_MODEL = ("model.image_size=64", "model.patch_size=16", "model.image_mean=[0.5,0.5,0.5]", "model.image_std=[0.5,0.5,0.5]")
"""The user's pictures are looked at more closely than glyphs, with as many patches, and are not all black on white."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One command of the demo."""

    title: str
    words: tuple[str, ...]
    """What follows `mmscale`."""


def glyph_stages(out: Path) -> list[Stage]:
    """The stages over drawn glyphs. Pure."""
    shards, pretrain, finetune = out / "shards", out / "pretrain", out / "finetune"
    return [
        *(
            Stage(
                title=f"glyphs, {split} styles -> shards",
                words=("shards", "write", str(CONFIGS / "shards.yaml"), f"glyphs.split={split}", f"out={shards / split}"),
            )
            for split in ("train", "heldout")
        ),
        _launch("pretraining", "pretrain.yaml", f"run={pretrain}", f"data.shards={shards / 'train'}"),
        _launch(
            "fine-tuning: the script of a glyph",
            "finetune.yaml",
            f"run={finetune}",
            f"data.shards={shards / 'train'}",
            f"init_from={pretrain}",
        ),
        _evaluate("retrieval", pretrain, out),
        _evaluate("captioning", pretrain, out),
        _evaluate("classification", finetune, out, "samples=0"),
    ]


def own_stages(out: Path, label: str | None, pairs: int) -> list[Stage]:
    """The stages over the user's own pairs, once `write_own_shards` has written and parted them. Pure.

    Args:
        out: folder of everything.
        label: field to classify by.
        pairs: how many there are; the fewer, the sooner more steps would only learn them by heart.
    """
    steps = min(MOST_STEPS, max(FEWEST_STEPS, pairs * EPOCHS // BATCH))
    shards, pretrain, finetune = out / "shards", out / "pretrain", out / "finetune"
    data = (f"data.shards={shards / 'train'}", f"data.tokenizer={shards / 'all' / 'tokenizer'}")
    stages = [
        *(Stage(title=f"{part} shards -> a data set", words=("shards", "index", str(shards / part))) for part in ("train", "heldout")),
        _launch("pretraining", "pretrain.yaml", f"run={pretrain}", *data, *OWN_MODEL, f"train.steps={steps}"),
        _evaluate("retrieval", pretrain, out),
        _evaluate("captioning", pretrain, out),
    ]
    if label is not None:
        words = (f"run={finetune}", *data, *OWN_MODEL, f"init_from={pretrain}", f"data.label={label}", "data.text=null")
        stages.append(_launch(f"fine-tuning: the label {label}", "finetune.yaml", *words))
        stages.append(_evaluate("classification", finetune, out, "samples=0"))
    return stages


def source_words(data: Path) -> tuple[str, ...]:
    """How `mmscale shards write` reads a path: a table by its suffix, a folder of tars, a folder of files.

    Raises:
        ConfigError: there is nothing, or a file of another kind.
    """
    if not data.exists():
        raise ConfigError(f"There is no {str(data)!r}. Give DATA the path of a folder of images with .txt or .json files, or of a table.")
    if data.is_file() and data.suffix not in TABLES:
        raise ConfigError(f"{str(data)!r} is not a table that can be read: its name must end in {', '.join(sorted(TABLES))}.")
    source = "table" if data.is_file() else "webdataset" if any(data.glob("*.tar")) else "folder"
    return (f"source={source}", f"path={data}")


def hold_out(shards: Path) -> None:
    """Part a data set by whole shards, every tenth for testing: hard links, no bytes are copied.

    Raises:
        ConfigError: fewer than two shards.
    """
    tars = sorted((shards / "all").glob("*.tar"))
    if len(tars) < 2:
        raise ConfigError(f"These are too few pairs to hold some out: at least {ROWS_PER_SHARD + 1} are needed.")
    every = min(10, len(tars))
    for number, tar in enumerate(tars, start=1):
        part = shards / ("train" if number % every else "heldout")
        part.mkdir(exist_ok=True)
        for path in (tar, tar.with_name(f"{tar.stem}.index.arrow")):
            if not (part / path.name).exists():
                os.link(path, part / path.name)


def main(
    data: Annotated[Path | None, typer.Option(help="The user's own pairs: a folder or a table.")] = None,
    label: Annotated[str | None, typer.Option(help="Field of the user's pairs to classify by; default: no classifier.")] = None,
    words: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="How the pairs are read: columns.image=...")] = None,
) -> None:
    """Run the demo and end with a table, summary.json and where to look further."""
    start = time.monotonic()
    try:
        if data is None and (label or words):
            raise ConfigError("LABEL and WORDS say how pairs of your own are read. Give DATA, the path of the pairs, too.")
        if data is None:
            out, stages = Path("runs/demo"), glyph_stages(Path("runs/demo"))
        else:
            out = Path("runs") / f"demo-{data.resolve().stem}"
            write_own_shards(data, out / "shards", words or [])
            stages = own_stages(out, label, read_manifest(out / "shards" / "all").rows)
        for number, stage in enumerate(stages, start=1):
            run_stage(stage, f"{number} of {len(stages)}")
        summary = summarize(read_metrics(out / "evaluations"), minutes=(time.monotonic() - start) / 60)
    except KeyboardInterrupt as e:
        print("demo: interrupted; started again, it goes on from here", file=sys.stderr)
        raise typer.Exit(130) from e
    except MmscaleError as e:
        print(f"demo: {e}", file=sys.stderr)
        raise typer.Exit(2 if isinstance(e, ConfigError) else 1) from e
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print_summary(summary, out)


def write_own_shards(data: Path, shards: Path, words: Sequence[str]) -> None:
    """Write the user's pairs and hold some out.

    Args:
        data: a folder or a table.
        shards: folder that receives `all`, `train` and `heldout`.
        words: more words for `mmscale shards write`.

    Raises:
        ConfigError, LaunchError: as `source_words`, `hold_out` and `run_stage`.
    """
    fixed = (*source_words(data), f"out={shards / 'all'}", f"rows_per_shard={ROWS_PER_SHARD}", "image.short_side=64")
    tokenizer = ("tokenizer.kind=wordpiece", "tokenizer.vocab_size=4096", "tokenizer.lowercase=true")
    run_stage(Stage(title=f"{data} -> shards", words=("shards", "write", *fixed, *tokenizer, *words)), "first")
    hold_out(shards)


def run_stage(stage: Stage, place: str) -> None:
    """Run one command, shown as a user would type it.

    Raises:
        LaunchError: it fails.
    """
    print(f"\n== {place}: {stage.title}\n$ mmscale {shlex.join(stage.words)}", flush=True)
    code = wait_for(subprocess.Popen([find_program("mmscale"), *stage.words], start_new_session=True))
    if code != 0:
        raise LaunchError(f"The stage {stage.title!r} failed with exit code {code}; its own message is above.", exit_code=1)


def wait_for(process: subprocess.Popen[bytes]) -> int:
    """Wait for a command's own end. Ctrl-C is passed on to it, so that it can end what it has started; then it is raised."""
    interrupted: KeyboardInterrupt | None = None
    while True:
        try:
            code = process.wait()
        except KeyboardInterrupt as e:
            interrupted = e
            process.send_signal(signal.SIGINT)
        else:
            if interrupted is not None:
                raise interrupted
            return code


def read_metrics(evaluations: Path) -> dict[str, dict[str, float]]:
    """Read each evaluation's metrics: task -> name -> value."""
    reports = sorted(evaluations.glob("*/report.json"))
    return {path.parent.name: json.loads(path.read_text(encoding="utf-8"))["metrics"] for path in reports}


def summarize(metrics: Mapping[str, Mapping[str, float]], minutes: float) -> dict[str, Any]:
    """Keep the numbers that tell whether the demo worked; accuracies are fractions of 1. Pure."""
    wanted = {
        "retrieval": ("candidates", "image_to_text_r1", "text_to_image_r1"),
        "captioning": ("exact_match",),
        "classification": ("accuracy",),
    }
    kept = {task: {name: metrics[task][name] for name in names} for task, names in wanted.items() if task in metrics}
    return kept | {"minutes": round(minutes, 2)}


def print_summary(summary: Mapping[str, Any], out: Path) -> None:
    """Print the table, and where the pictures and curves are."""
    print()
    for task in (t for t in summary if t != "minutes"):
        for name, value in summary[task].items():
            print(f"{task:<16}{name:<20}{f'{value:>8,.0f}' if name == 'candidates' else f'{value:>8.1%}'}")
    print(f"{'time':<16}{'minutes':<20}{summary['minutes']:>8.1f}")
    picture = out / "evaluations" / "retrieval" / "retrieval.png"
    print(f"\nnumbers      {out / 'summary.json'}\npicture      {picture if picture.exists() else 'none'}")
    print(f"TensorBoard  .venv/bin/tensorboard --logdir {out}")


def _launch(title: str, stage: str, *words: str) -> Stage:
    return Stage(title=title, words=("launch", str(CONFIGS / stage), *words, "--ranks-per-node", str(RANKS)))


def _evaluate(task: str, run: Path, out: Path, *words: str) -> Stage:
    place = (f"data={out / 'shards' / 'heldout'}", f"out={out / 'evaluations' / task}")
    return Stage(title=f"evaluation: {task}", words=("evaluate", str(run), str(CONFIGS / "evaluate.yaml"), f"task={task}", *place, *words))


if __name__ == "__main__":
    typer.run(main)
