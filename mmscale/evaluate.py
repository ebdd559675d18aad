"""Evaluation: a model, a task and a data set give metrics, and a record of every prediction."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from mmscale.assemble import checkpoint_config
from mmscale.checkpoint.find import resolve
from mmscale.checkpoint.model_folder import open_model, tokenizer_of
from mmscale.config import RunConfig
from mmscale.data.collate import Collator
from mmscale.data.dataset import ShardDataset
from mmscale.data.loader import evaluation_batches
from mmscale.data.tokenize import TextTokenizer
from mmscale.model import MMScaleModel
from mmscale.objectives_config import ObjectivesConfig, TaskConfig
from mmscale.run_folder import replace_file
from mmscale.tasks import Record, Task, build_task, kind_of, kind_of_stage
from mmscale.tasks.interval import score_records
from mmscale.tasks.task import Metrics
from mmscale.world import World
from shards import configfile
from shards.errors import ConfigError, DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateCommand:
    """Keys of `mmscale evaluate CHECKPOINT [CONFIG] key=value ...`."""

    task: str = "???"
    """One of mmscale/tasks, or the dotted name of a module of your own (docs/tasks.md)."""
    data: str = "???"
    """Folder of the data set to evaluate on."""
    samples: int = 0
    """Samples drawn, without repetition, from all of them; 0 is all."""
    batch: int = 250
    """Samples in a batch."""
    beams: int = 1
    """captioning: beam width; 1 is greedy."""
    image: bool = True
    """Feed the image; false is the text-only control of a model trained that way."""
    text: bool = True
    """Tasks with a head: feed the text; false is the image-only control of a model trained that way."""
    out: str | None = None
    """Folder for report.json, predictions.jsonl and pictures; null is evaluations/TASK beside the checkpoint's run."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""


def evaluate_command(checkpoint: str | Path, path: Path | None, words: Sequence[str]) -> Metrics:
    """Evaluate a checkpoint in this process and write report.json, predictions.jsonl and pictures.

    Args:
        checkpoint: a checkpoint, or a run folder (its newest checkpoint).
        path: a YAML file of `EvaluateCommand`'s keys, or null.
        words: `key=value` words that go over it.

    Returns:
        The metrics by name; None for one that is undefined on these samples.

    Raises:
        MmscaleError: not a checkpoint, no such data set or task, or data without what the task needs.
    """
    command = configfile.load(EvaluateCommand, path, words)
    folder = resolve(checkpoint)
    config = evaluation_config(checkpoint_config(folder), command)
    task = build_task(config)
    device = torch.device("cuda" if command.device == "auto" and torch.cuda.is_available() else command.device.replace("auto", "cpu"))
    model = open_model(folder).to(device).eval()
    tokenizer = TextTokenizer(tokenizer_of(folder), config.data.begin)
    start = time.perf_counter()
    records = predict_records(model, task, config, tokenizer, samples=command.samples, batch=command.batch, device=device)
    metrics = score_records(task, records) | {"seconds": time.perf_counter() - start}
    out = Path(command.out) if command.out else folder.parent.parent / "evaluations" / command.task
    write_report(out, {"checkpoint": str(folder), "task": command.task, "data": command.data, "metrics": metrics}, records)
    draw = kind_of(command.task).draw
    if draw is not None:
        draw(records, ShardDataset(command.data, seed=0, store=config.store), config, out)
    logger.info("wrote %s", out)
    return metrics


def evaluation_config(trained: RunConfig, command: EvaluateCommand) -> RunConfig:
    """Point the configuration that a checkpoint was trained with at the data to evaluate on.

    Raises:
        ConfigError: the model has no head for the task.
    """
    kind, own = kind_of(command.task, key="task"), kind_of_stage(trained)
    if kind.head is not None and (own is None or own.head != kind.head):
        origin = "It comes from pretraining" if trained.task is None else f"It was trained for `task.name={trained.task.name}`"
        raise ConfigError(
            f"`task={command.task}` needs a model with a {kind.head} head; this one was trained without. {origin}: fine-tune it for the "
            "task first."
        )
    data = replace(
        trained.data,
        shards=command.data,
        temperature=1.0,
        weights_from={},
        image=trained.data.image and command.image,
        text=trained.data.text if command.text else None,
        caption=trained.data.caption or "caption",
    )
    # the task alone decides which streams a batch has
    options = trained.task.options if trained.task is not None else {}
    task = TaskConfig(name=command.task, beams=command.beams, options=options)
    return replace(trained, data=data, objectives=ObjectivesConfig(), task=task)


def predict_records(
    model: MMScaleModel,
    task: Task,
    config: RunConfig,
    tokenizer: TextTokenizer,
    *,
    samples: int,
    batch: int,
    device: torch.device,
    world: World | None = None,
    group: dist.ProcessGroup | None = None,
) -> list[Record]:
    """Predict for a random but fixed subset of a data set (all ranks call, when there are several).

    Args:
        samples: size of the subset; 0 is all.
        batch: samples in a batch of a rank.
        world, group: the ranks that share the work; every rank runs the model equally often, as ZeRO 3 needs.

    Returns:
        On rank 0 all records in order of position, each sample once; on other ranks nothing.

    Raises:
        DataError: no sample has what the task needs.
    """
    dataset = ShardDataset(config.data.shards, seed=0, image_size=config.model.image_size, store=config.store)
    collator = Collator.from_config(config, tokenizer, training=False, facts=model.config.facts)
    rank, size = (world.rank, world.size) if world else (0, 1)
    total = min(samples or len(dataset), len(dataset))
    own: list[Record] = []
    with torch.no_grad():
        for micro in evaluation_batches(dataset, collator, samples=total, batch=batch, rank=rank, size=size):
            own += task.predict(model, micro.to(device), tokenizer)
    records = own if size == 1 else _gather(own, rank, size, group)
    left_out = sorted((r for r in records if "left_out" in r), key=lambda r: r["position"])
    records = [r for r in records if "left_out" not in r]
    why = f" {left_out[0]['key']}, for example: {left_out[0]['left_out']}." if left_out else ""
    count, why = _agree((len(records), why), size, group)
    if not count:
        raise DataError(
            f"No sample of {config.data.shards!r} has what the task {task.name} needs.{why} Look at them with `mmscale shards show`."
        )
    if left_out:
        logger.warning("%d of %d samples of %r are left out.%s", len(left_out), len(left_out) + count, config.data.shards, why)
    return sorted(records, key=lambda r: r["position"])


def write_report(out: Path, report: dict[str, Any], records: Sequence[Record]) -> None:
    """Write report.json and predictions.jsonl; embeddings stay out of the latter."""
    out.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({k: v for k, v in r.items() if not hasattr(v, "shape")}, ensure_ascii=False) for r in records)
    replace_file(out / "predictions.jsonl", "".join(f"{line}\n" for line in lines))
    replace_file(out / "report.json", json.dumps(report, indent=1) + "\n")


def _gather(own: list[Record], rank: int, size: int, group: dist.ProcessGroup | None) -> list[Record]:
    parts: list[Any] = [None] * size
    dist.gather_object(own, parts if rank == 0 else None, dst=0, group=group)
    return [record for part in parts for record in part] if rank == 0 else []


def _agree(found: tuple[int, str], size: int, group: dist.ProcessGroup | None) -> tuple[int, str]:
    """What rank 0 found, which has all records: on every rank, so that all of them raise or none."""
    told = [found]
    if size > 1:
        dist.broadcast_object_list(told, src=0, group=group)
    return told[0]
