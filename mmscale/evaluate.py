"""Evaluation: a model, a task and a data set give metrics, and a record of every prediction."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from mmscale.assemble import checkpoint_config
from mmscale.board import write_evaluation
from mmscale.checkpoint.find import resolve
from mmscale.checkpoint.manifest import NAME as MANIFEST_NAME
from mmscale.checkpoint.model_folder import open_model, tokenizer_of
from mmscale.checkpoint.state import read_state
from mmscale.config import RunConfig
from mmscale.data.collate import Collator
from mmscale.data.dataset import ShardDataset
from mmscale.data.loader import evaluation_batches
from mmscale.data.tokenize import TextTokenizer
from mmscale.data_config import reads_no_words
from mmscale.model import MMScaleModel
from mmscale.objectives_config import DECODING, ObjectivesConfig, TaskConfig, check_decoding
from mmscale.run_folder import replace_file
from mmscale.tasks import Record, Task, build_task, kind_of, kind_of_stage
from mmscale.tasks.evaluated import Evaluated
from mmscale.tasks.interval import score_records
from mmscale.tasks.rerank import Look
from mmscale.tasks.task import Metrics
from mmscale.tasks.together import Together
from mmscale.unfinished import NAME as UNFINISHED
from mmscale.unfinished import Unfinished
from mmscale.world import World
from shards import configfile
from shards.configfile import need
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
    """captioning, answering: beam width; 1 is greedy."""
    temperature: float = 0.0
    """captioning, answering: above 0, tokens are drawn, keyed by the run's seed and the sample; 0 takes the likeliest."""
    top_k: int = 0
    """Draw among so many of the likeliest tokens; 0 for all."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together have this probability."""
    rerank: int = 0
    """retrieval: so many of the first candidates of each query are ordered anew by the matching head; 0 for none."""
    free: bool = False
    """answering: write any answer, also where the stage lists them (task.answers=listed)."""
    image: bool = True
    """Feed the image; false is the text-only control of a model trained that way."""
    text: bool = True
    """Tasks with a head: feed the text; false is the image-only control of a model trained that way."""
    out: str | None = None
    """Folder for report.json, predictions.jsonl and pictures; null is evaluations/TASK of the checkpoint's run, or NAME-evaluations/TASK
    beside a checkpoint NAME of no run."""
    label: str | None = None
    """Json field of the target where it is another one than in training, such as what says that a sample is an anomaly; null: as it was."""
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
    need(
        command.device != "cuda" or torch.cuda.is_available(),
        "`device=cuda`: torch sees no CUDA device here. Take device=auto or device=cpu.",
    )
    folder = resolve(checkpoint).resolve()
    config = evaluation_config(checkpoint_config(folder), command)
    task = build_task(config)
    device = torch.device("cuda" if command.device == "auto" and torch.cuda.is_available() else command.device.replace("auto", "cpu"))
    model = open_model(folder).to(device).eval()
    tokenizer = TextTokenizer(tokenizer_of(folder), config.data.begin)
    start = time.perf_counter()
    out = Path(command.out) if command.out else _usual_out(folder) / command.task
    unfinished = Unfinished(out / UNFINISHED, _identity(folder, config, command, device, task))
    if unfinished.done:
        logger.info("going on after %d batches that an interrupted evaluation has left in %s", len(unfinished.done), unfinished.path)
    records = predict_records(
        model, task, config, tokenizer, samples=command.samples, batch=command.batch, device=device, unfinished=unfinished
    )
    metrics = score_records(task, records) | {"seconds": time.perf_counter() - start}
    write_report(out, {"checkpoint": str(folder), "task": command.task, "data": command.data, "metrics": metrics}, records)
    draw = kind_of(command.task).draw
    if draw is not None:
        shown = ShardDataset(command.data, seed=0, store=config.store)
        draw(Evaluated(records=records, dataset=shown, config=config, out=out, model=model, tokenizer=tokenizer, device=device))
    if config.log.tensorboard:
        write_evaluation(out, command.task, read_state(folder).step, metrics)
    unfinished.remove()
    logger.info("wrote %s", out)
    return metrics


def _usual_out(folder: Path) -> Path:
    """Of a run's checkpoint the run's; of one by itself, such as an average, beside it and with its name."""
    of_run = folder.parent.name == "checkpoints"
    return folder.parent.parent / "evaluations" if of_run else folder.with_name(f"{folder.name}-evaluations")


def evaluation_config(trained: RunConfig, command: EvaluateCommand) -> RunConfig:
    """Point the configuration that a checkpoint was trained with at the data to evaluate on.

    Raises:
        ConfigError: the model has no head for the task.
    """
    check_decoding("", command.beams, command.temperature, command.top_k, command.top_p)
    kind, own = kind_of(command.task, key="task"), kind_of_stage(trained)
    if kind.head is not None and (own is None or own.head != kind.head):
        origin = "It comes from pretraining" if trained.task is None else f"It was trained for `task.name={trained.task.name}`"
        raise ConfigError(
            f"`task={command.task}` needs a model with a {kind.head} head; this one was trained without. {origin}: fine-tune it for the "
            "task first."
        )
    need(command.batch > 0, f"`batch` must be at least 1; got {command.batch}.")
    need(command.samples >= 0, f"`samples` must be at least 1, or 0 for all; got {command.samples}.")
    need(command.rerank >= 0, f"`rerank` must be at least 1, or 0 for none; got {command.rerank}.")
    need(
        not command.rerank or trained.objectives.matching.weight > 0,
        f"`rerank={command.rerank}` orders candidates by the matching head, which this model was not trained with. Train with "
        "objectives.matching.weight=1 beside the task retrieval, or set rerank=0.",
    )
    need(
        not kind.caption or not reads_no_words(trained.data),
        f"`task={command.task}` needs a model that has read captions; this one was trained without words.",
    )
    # what another task was to learn says nothing of anomalies
    same = not kind.masks or (own is not None and own.masks)
    data = replace(
        trained.data,
        shards=command.data,
        label=command.label or (trained.data.label if same else None),
        temperature=1.0,
        weights_from={},
        image=trained.data.image and command.image,
        text=trained.data.text if command.text else None,
        caption=trained.data.caption or "caption",
    )
    masked = trained.objectives.masked_image
    need(
        not kind.masks or masked.weight > 0 or (own is not None and own.masks),
        f"`task={command.task}` needs a model that has learned to guess hidden patches; this one has not. Train with "
        f"task.name={command.task} or objectives.masked_image.weight=1.",
    )
    # the task alone decides which streams a batch has; how much was hidden in training stays known
    options = trained.task.options if trained.task is not None else {}
    listed = trained.task is not None and trained.task.answers == "listed" and not command.free
    chosen = {name: getattr(command, name) for name in DECODING}
    task = TaskConfig(name=command.task, **chosen, answers="listed" if listed else "free", options=options)
    return replace(trained, data=data, objectives=ObjectivesConfig(masked_image=replace(masked, weight=0.0)), task=task)


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
    unfinished: Unfinished | None = None,
) -> list[Record]:
    """Predict for a random but fixed subset of a data set (all ranks call, when there are several).

    Args:
        samples: size of the subset; 0 is all.
        batch: samples in a batch of a rank.
        world, group: the ranks that share the work; every rank runs the model equally often, as ZeRO 3 needs.
        unfinished: of one process: what an interrupted evaluation has predicted, and what keeps the rest.

    Returns:
        On rank 0 all records in order of position, each sample once; on other ranks nothing.

    Raises:
        DataError: no sample has what the task needs.
    """
    dataset = ShardDataset(config.data.shards, seed=0, image_size=config.model.image_size, store=config.store)
    collator = Collator.from_config(config, tokenizer, training=False, facts=model.config.facts)
    together = Together.of(world, group)
    total = min(samples or len(dataset), len(dataset))
    kept = {} if unfinished is None else unfinished.done
    own: list[Record] = [record for number in sorted(kept) for record in kept[number]]
    with torch.no_grad():
        batches = evaluation_batches(dataset, collator, samples=total, batch=batch, rank=together.rank, size=together.size, skip=kept)
        for number, micro, quarantined in batches:
            found = task.predict(model, micro.to(device), tokenizer)
            bad = [{"position": place, "key": key, "left_out": f"it does not decode: {why.rstrip('.')}"} for place, key, why in quarantined]
            found = [*found, *bad]
            if unfinished is not None:
                unfinished.add(number, found)
            own += found
    records = together.gather(own)
    left_out = sorted((r for r in records if "left_out" in r), key=lambda r: r["position"])
    records = [r for r in records if "left_out" not in r]
    why = f" {left_out[0]['key']}, for example: {left_out[0]['left_out']}." if left_out else ""
    count, why = together.tell((len(records), why))
    if not count:
        why = why or _looked_for(config, dataset)
        raise DataError(
            f"No sample of {config.data.shards!r} has what the task {task.name} needs.{why} Look at them with `mmscale shards show`."
        )
    if left_out:
        logger.warning("%d of %d samples of %r are left out.%s", len(left_out), len(left_out) + count, config.data.shards, why)
    if not together.rank and (others := total - len(left_out) - count):
        label = f" (data.label={config.data.label})" if config.data.label else ""
        logger.warning("%d of %d samples of %r have not what the task %s asks for%s", others, total, config.data.shards, task.name, label)
    records = sorted(records, key=lambda r: r["position"])
    kind = kind_of_stage(config)
    if kind is None or kind.refine is None:
        return records
    look = Look(model=model, config=config, dataset=dataset, collator=collator, batch=batch, device=device, together=together)
    return kind.refine(look, records)


def _looked_for(config: RunConfig, dataset: ShardDataset) -> str:
    """What the task reads, and what there is: a misspelt field shows."""
    if not config.data.label or not len(dataset):
        return ""
    names = ", ".join(map(repr, dataset.reader[0, 0].fields())) or "no fields"
    return f" It reads data.label={config.data.label}; the first sample's json has {names}."


def _identity(folder: Path, config: RunConfig, command: EvaluateCommand, device: torch.device, task: Task) -> dict[str, Any]:
    """Everything that the records of an evaluation depend on; of a task of one's own the file that it is in, which is mended meanwhile."""
    commit = (folder / MANIFEST_NAME).read_bytes() if (folder / MANIFEST_NAME).is_file() else b""
    settings = {name: value for name, value in configfile.to_plain(command).items() if name != "out"}
    return {
        "checkpoint": [str(folder), hashlib.sha256(commit).hexdigest()],
        "data": ShardDataset(command.data, seed=0, store=config.store).digest,
        "config": configfile.to_plain(config),
        "command": settings,
        "device": device.type,
        "versions": {name: version(name) for name in ("mmscale", "torch")},
        "code": hashlib.sha256(Path(inspect.getfile(type(task))).read_bytes()).hexdigest(),
    }


def write_report(out: Path, report: dict[str, Any], records: Sequence[Record]) -> None:
    """Write report.json and predictions.jsonl; embeddings stay out of the latter."""
    out.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({k: v for k, v in r.items() if not hasattr(v, "shape")}, ensure_ascii=False) for r in records)
    replace_file(out / "predictions.jsonl", "".join(f"{line}\n" for line in lines))
    replace_file(out / "report.json", json.dumps(report, indent=1) + "\n")
