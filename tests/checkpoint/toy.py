"""A toy model with all that a checkpoint has to hold (tied, frozen and odd-sized weights, buffers), trained on any topology."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmscale.arithmetic import plan_batch
from mmscale.checkpoint.commit import Contents, commit
from mmscale.checkpoint.load import load_state, restore_counters
from mmscale.checkpoint.pieces import MASTER, live_state
from mmscale.checkpoint.reader import StateReader
from mmscale.config import OptimizerConfig, RunConfig, TrainConfig, ZeroConfig
from mmscale.ema import MovingAverage
from mmscale.engine import deepspeed_config
from mmscale.guard import Gate
from mmscale.optim import build_optimizer

WIDTH, WORDS, BATCH = 7, 11, 8


class Toy(nn.Module):
    """Predicts the next of a row of words; the output layer is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self.frozen.requires_grad_(False)

    def forward(self, words_M: Tensor) -> Tensor:
        """Sum of the losses, (), of predicting the word after each."""
        x = self.embedding(words_M)
        x = x - self.mean.to(x.dtype)
        logits = self.head(self.norm(torch.tanh(self.hidden(torch.relu(self.frozen(x)) + x))))
        return nn.functional.cross_entropy(logits.float(), (words_M + 1) % WORDS, reduction="sum")


def train(
    checkpoints: str, stage: int, steps: int, load: str | None = None, micro: int | None = None, dtype: str = "float32"
) -> dict[str, Any]:
    """Load a checkpoint, commit it again at once as step 0, train and commit; the losses, and whether the model's own weights followed."""
    import deepspeed

    torch.manual_seed(3)
    model, ranks, rank = Toy(), dist.get_world_size(), dist.get_rank()
    config = RunConfig(run="", train=TrainConfig(global_batch=BATCH, micro_batch=micro, clip_norm=0.5), zero=ZeroConfig(stage=stage))
    plan = plan_batch(config, ranks)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    settings = deepspeed_config(config, plan, getattr(torch, dtype), trained, torch.device("cpu"))
    settings["zero_optimization"] |= {"stage3_param_persistence_threshold": 10}
    optimizer = build_optimizer(model, OptimizerConfig(lr=0.02))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    gate, average = Gate(engine, config.train.clip_norm), MovingAverage(engine, model, 0.9)
    group: Any = dist.new_group(backend="gloo")
    result: dict[str, Any] = {"losses": []}
    start = 0
    if load is not None:
        load_state(Path(load), engine, model, average, group)
        start = int(StateReader(Path(load)).index.scalars["average_updates"])
        restore_counters(engine, start)
        save(Path(checkpoints), 0, engine, model, average, group)
        result["stale"] = stale(model, StateReader(Path(load)))
    for step in range(start, start + steps):
        words = torch.randint(0, WORDS, (BATCH,), generator=torch.Generator().manual_seed(step))
        total = torch.zeros(())
        for index in range(plan.accumulation):
            low = (index * ranks + rank) * plan.micro_batch
            loss = engine(words[low : low + plan.micro_batch]) / BATCH
            gate.backward(loss, ranks)
            gate.step()
            total += loss.detach()
        dist.all_reduce(total)
        model.mean.add_(0.01 * step)
        model.batches.add_(1)
        average.update(torch.zeros(()))
        result["losses"].append(float(total))
    save(Path(checkpoints), start + steps, engine, model, average, group)
    return result


def save(checkpoints: Path, step: int, engine: Any, model: nn.Module, average: MovingAverage, group: Any) -> None:
    """Commit the state as it is."""
    live = live_state(engine, model, average)
    pieces = [p.share(dist.get_rank(), dist.get_world_size()) for p in live.pieces]
    commit(checkpoints, Contents(step, [p for p in pieces if p.values.numel()], live.scalars, lambda attempt: []), group)


def stale(model: nn.Module, reader: StateReader) -> list[str]:
    """Names of the trained weights, as the model computes with them, that are not the saved ones rounded to their type."""
    import deepspeed

    found = []
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if parameter.requires_grad and not torch.equal(parameter.detach(), reader.whole(MASTER, name).to(parameter.dtype)):
                found.append(name)
    return found


def hashes(checkpoint: Path) -> dict[str, str]:
    """sha256 of every tensor of a checkpoint, and its counts."""
    reader = StateReader(checkpoint)
    found = {
        f"{kind}/{name}": hashlib.sha256(reader.read(kind, name).view(torch.uint8).numpy().tobytes()).hexdigest()
        for kind, name in reader.index.names()
    }
    return found | {"scalars": str(reader.index.scalars)}
