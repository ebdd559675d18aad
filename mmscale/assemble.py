"""From a configuration and a world to everything that the loop needs."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mmscale.arithmetic import BatchPlan, plan_batch
from mmscale.checkpoint.copying import Copying
from mmscale.checkpoint.find import start_of
from mmscale.checkpoint.model_folder import init_from, tokenizer_of
from mmscale.checkpoint.state import RunState, read_state
from mmscale.config import RunConfig
from mmscale.data.collate import Collator
from mmscale.data.dataset import ShardDataset
from mmscale.data.sources import open_training_data
from mmscale.data.targets import Facts
from mmscale.data.tokenize import WORDLESS, TextTokenizer, is_wordless
from mmscale.data_config import missing_tokenizer, mixture_sources, reads_no_words
from mmscale.ema import MovingAverage
from mmscale.engine import Trainee, build_engine
from mmscale.guard import Gate
from mmscale.lora import add_adapters
from mmscale.model import MMScaleModel, mmscale_config
from mmscale.model.heads import NormHead
from mmscale.model_config import modernize
from mmscale.objectives import Objective, build_objectives
from mmscale.optim import freeze
from mmscale.run_folder import RunFolder
from mmscale.tasks import check, head_sizes, study
from mmscale.world import World, resolve_precision
from shards import configfile
from shards.errors import ConfigError, MmscaleError
from shards.store.place import is_url


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Everything of one run; built once, then only used."""

    config: RunConfig
    world: World
    group: dist.ProcessGroup
    folder: RunFolder
    plan: BatchPlan
    dtype: torch.dtype
    dataset: ShardDataset
    tokenizer: TextTokenizer
    tokenizer_folder: Path
    collator: Collator
    objectives: Sequence[Objective]
    trainee: Trainee
    engine: Any
    gate: Gate
    average: MovingAverage | None
    copying: Copying | None
    """Copies checkpoints to an object store, from rank 0."""
    reports: Sequence[str]
    """What initialisation has to say to people."""


def assemble(config: RunConfig, world: World, group: dist.ProcessGroup) -> Run:
    """Build data, model and engine (all ranks call).

    Raises:
        ConfigError, ShardError, CheckpointError: what the configuration asks for cannot be had.
    """
    plan = plan_batch(config, world.size)
    dtype = resolve_precision(config.train.precision, world.device)
    dataset = open_training_data(config)
    origin = start_of(config.init_from) if config.init_from else None
    tokenizer_folder = find_tokenizer(config, origin)
    tokenizer = TextTokenizer(tokenizer_folder, config.data.begin)
    facts = agree_on_facts(config, dataset, world, group)
    check(config, facts, tokenizer)
    model, reports = build_model(config, tokenizer, facts, origin)
    objectives = build_objectives(config, facts)
    for objective in objectives:
        objective.check(plan.micro_batch, world.size)
    trainee = Trainee(model, objectives)
    engine = build_engine(trainee, config, plan, dtype, world.device)
    decay = config.train.ema_decay
    folder = RunFolder(Path(config.run))
    return Run(
        config=config,
        world=world,
        group=group,
        folder=folder,
        plan=plan,
        dtype=dtype,
        dataset=dataset,
        tokenizer=tokenizer,
        tokenizer_folder=tokenizer_folder,
        collator=Collator.from_config(config, tokenizer, training=True, facts=facts),
        objectives=objectives,
        trainee=trainee,
        engine=engine,
        gate=Gate(engine, config.train.clip_norm, *model.embeddings()),
        average=None if decay is None else MovingAverage(engine, model, decay),
        copying=Copying.of(config, folder),
        reports=reports,
    )


def agree_on_facts(config: RunConfig, dataset: ShardDataset, world: World, group: dist.ProcessGroup) -> Facts | None:
    """Take from the training shards what the task needs once, on rank 0, for all (all ranks call).

    Raises:
        ConfigError, ShardError: there is nothing to learn, on every rank alike: none waits for one that has ended.
    """
    found: list[Facts | MmscaleError | None] = [None]
    if world.is_first:
        try:
            found = [study(config, dataset)]
        except MmscaleError as e:
            found = [e]
    dist.broadcast_object_list(found, src=0, group=group)
    if isinstance(found[0], MmscaleError):
        raise found[0]
    return found[0]


def checkpoint_config(folder: Path) -> RunConfig:
    """Read the configuration that a checkpoint's run was trained with.

    Raises:
        CheckpointError: the checkpoint does not say, or is of another version.
    """
    config = dict(read_state(folder).config)
    config["model"] = modernize(config.get("model", {}))
    return configfile.build(RunConfig, [(str(folder), config)])


def find_tokenizer(config: RunConfig, origin: Path | None) -> Path:
    """Choose the tokenizer: the named one, else that of the checkpoint to start from, else that of the (first) shards.

    A stage that reads no words needs none: without one it has `WORDLESS`, of the special tokens alone. One that reads words and starts from
    such a stage has that of its shards.

    Raises:
        ConfigError: only the shards could have one, and they have none, or lie behind a URL.
    """
    if config.data.tokenizer is not None:
        return _there(config, Path(config.data.tokenizer))
    wordless = reads_no_words(config.data)
    if origin is not None and tokenizer_of(origin).is_dir() and (wordless or not is_wordless(tokenizer_of(origin))):
        return tokenizer_of(origin)
    sources = mixture_sources(config.data)
    place = sources[0].path if sources else config.data.shards
    if wordless and (is_url(place) or not (Path(place) / "tokenizer").is_dir()):
        return WORDLESS
    if is_url(place):
        raise ConfigError("`data.tokenizer` must name a local folder when `data.shards` is a URL. Copy the data set's tokenizer/ once.")
    return _there(config, Path(place) / "tokenizer")


def _there(config: RunConfig, folder: Path) -> Path:
    if not folder.is_dir():
        raise ConfigError(missing_tokenizer(config.data, folder))
    return folder


def build_model(config: RunConfig, tokenizer: TextTokenizer, facts: Facts | None, origin: Path | None) -> tuple[MMScaleModel, list[str]]:
    """Build the model on the CPU, equal on every rank, and start it from the weights that the configuration names."""
    torch.manual_seed(config.train.seed)
    special = {"pad": tokenizer.pad, "begin": tokenizer.begin, "end": tokenizer.end, "mask": tokenizer.mask}
    candidates = config.objectives.contrastive.group or config.train.global_batch
    shape = mmscale_config(config.model, tokenizer.vocab_size, special, head_sizes(config, facts), candidates=candidates)
    if facts is not None:
        shape.keep(facts)
    model = MMScaleModel(shape)
    if facts is not None and facts.log_odds is not None:
        (head,) = model.task_heads.values()
        assert isinstance(head, NormHead)
        head.start_at(facts.log_odds)
    reports = [str(r) for r in model.load_pretrained_towers(config.model)]
    if origin is not None:
        reports.append(str(init_from(model, origin)))
    if config.lora.rank:
        reports.append(add_adapters(model, config.lora))
    frozen = freeze(model, config.optimizer.freeze)
    if frozen:
        reports.append(f"frozen      {len(frozen)} tensors, such as {frozen[0]}")
    return model, reports


def run_state(
    run: Run, *, step: int, samples_seen: int, quarantined: int, skipped: int, skipped_in_a_row: int, losses: Sequence[float] = ()
) -> RunState:
    """Describe the run as it stands, for its checkpoint."""
    plain = configfile.to_plain(run.config)
    model = {k: v for k, v in plain["model"].items() if not k.startswith("init_") and k != "activation_checkpointing"}
    if run.config.lora.rank:
        model["lora"] = plain["lora"]
    # a run goes on with the optimizer and the rates by depth that it was begun with
    begun = {"name": "adamw", "layer_decay": 1, "head_lr_ratio": 1}
    model |= {f"optimizer.{k}": plain["optimizer"][k] for k, usual in begun.items() if plain["optimizer"][k] != usual}
    return RunState(
        step=step,
        samples_seen=samples_seen,
        quarantined=quarantined,
        skipped=skipped,
        skipped_in_a_row=skipped_in_a_row,
        data=run.dataset.digest,
        order=run.dataset.order.fingerprint(samples_seen),
        tokenizer=run.tokenizer.digest,
        model=model | {"vocab_size": run.tokenizer.vocab_size},
        global_batch=run.plan.global_batch,
        topology={
            "ranks": run.world.size,
            "micro_batch": run.plan.micro_batch,
            "zero.stage": run.config.zero.stage,
            "precision": str(run.dtype).removeprefix("torch."),
        },
        objectives={o.name: o.weight for o in run.objectives},
        config=plain,
        losses=list(losses),
        versions={"python": platform.python_version()} | {n: version(n) for n in ("mmscale", "torch", "deepspeed", "transformers")},
    )
