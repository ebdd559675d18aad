"""Loading a checkpoint into an engine, on any number of ranks and any ZeRO stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mmscale.checkpoint.fingerprint import fingerprint
from mmscale.checkpoint.index import StateIndex
from mmscale.checkpoint.pieces import AVERAGE, BUFFER, FROZEN, MASTER, NOT_MOMENTS, Piece, create_moments, live_state, refresh_weights
from mmscale.checkpoint.reader import StateReader
from mmscale.checkpoint.tensor_file import NAMES
from mmscale.ema import MovingAverage
from mmscale.errors import CheckpointError

AVERAGE_UPDATES = "average_updates"
_WORDS = {MASTER: "trained", FROZEN: "frozen", BUFFER: "a buffer"}


def load_state(folder: Path, engine: Any, model: nn.Module, average: MovingAverage | None, group: dist.ProcessGroup) -> None:
    """Load weights, moments, frozen weights, buffers and the moving average, then compare every tensor's hash (all ranks call).

    Each rank reads the ranges that it holds under the present topology from whichever files have them.

    Raises:
        CheckpointError: the checkpoint has a tensor that the run has no place for, lacks one, or a tensor is not what was saved.
    """
    reader = StateReader(folder)
    index = reader.index
    _check_tensors(folder, index, model, average)
    if hasattr(engine.optimizer, "checkpoint_event_prologue"):  # ZeRO 3: give up gathered copies of small weights
        engine.optimizer.checkpoint_event_prologue()
    steps = {k: v for k, v in index.scalars.items() if k != AVERAGE_UPDATES}
    create_moments(engine, model, {kind: set(names) for kind, names in index.tensors.items() if kind not in NOT_MOMENTS}, steps)
    pieces = live_state(engine, model, average).pieces
    with torch.no_grad():
        for piece in pieces:
            piece.values.copy_(reader.read(piece.kind, piece.name, piece.start, piece.values.numel()))
    if average is not None:
        average.updates.fill_(index.scalars[AVERAGE_UPDATES])
    refresh_weights(engine, model)
    if hasattr(engine.optimizer, "checkpoint_event_epilogue"):  # gather them again
        engine.optimizer.checkpoint_event_epilogue()
    _compare(folder, index, live_state(engine, model, average).pieces, group)


def restore_counters(engine: Any, step: int) -> None:
    """Tell DeepSpeed how far the run is."""
    engine.global_steps = step
    engine.global_samples = step * engine.train_batch_size()
    engine.micro_steps = step * engine.gradient_accumulation_steps()


def _check_tensors(folder: Path, index: StateIndex, model: nn.Module, average: MovingAverage | None) -> None:
    """Refuse by name what cannot be honoured."""
    start = f"The run's checkpoint {str(folder)!r} cannot be continued:"
    if (AVERAGE in index.tensors) != (average is not None):
        had, has = ("a", "none") if AVERAGE in index.tensors else ("no", "one")
        raise CheckpointError(f"{start} it holds {had} moving average and the run is to have {has}. Restore `train.ema_decay`.")
    now = _described(model)
    saved = {n: (kind, e.shape, e.dtype) for kind in (MASTER, FROZEN, BUFFER) for n, e in index.tensors.get(kind, {}).items()}
    for name in sorted(set(saved) | set(now)):
        before, after = saved.get(name), now.get(name)
        if before is None or after is None:
            raise CheckpointError(f"{start} the tensor {name} is only in the {'run' if before is None else 'checkpoint'}.")
        if before[0] != after[0]:
            raise CheckpointError(f"{start} {name} was {_WORDS[before[0]]} and is {_WORDS[after[0]]} now. Restore `optimizer.freeze`.")
        if before != after:
            raise CheckpointError(f"{start} {name} is {before[2]} of shape {before[1]} there and {after[2]} of shape {after[1]} here.")


def _described(model: nn.Module) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """Kind, shape and type of each tensor of a model, as a checkpoint would hold it."""
    described = {n: (BUFFER, tuple(b.shape), NAMES[b.dtype]) for n, b in model.named_buffers()}
    for name, parameter in model.named_parameters():
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        described[name] = (MASTER, shape, "F32") if parameter.requires_grad else (FROZEN, shape, NAMES[parameter.dtype])
    return described


def _compare(folder: Path, index: StateIndex, pieces: list[Piece], group: dist.ProcessGroup) -> None:
    """Compare the hash of every tensor that is live now with the one that it was saved with (all ranks call)."""
    order = {key: i for i, key in enumerate(sorted(index.names()))}
    sums = torch.zeros(len(order), dtype=torch.int64)
    wrong: list[str] = []
    for piece in pieces:
        value = fingerprint(piece.values, piece.start)
        if not piece.replicated:
            sums[order[piece.kind, piece.name]] += value - (1 << 64) if value >> 63 else value
        elif f"{value:016x}" != index.tensors[piece.kind][piece.name].fingerprint:
            wrong.append(f"{piece.kind} {piece.name}")
    dist.all_reduce(sums, group=group)
    sharded = {(p.kind, p.name) for p in pieces if not p.replicated}
    for key in sharded:
        if f"{int(sums[order[key]]) & (1 << 64) - 1:016x}" != index.tensors[key[0]][key[1]].fingerprint:
            wrong.append(f"{key[0]} {key[1]}")
    everyone: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, wrong, group=group)
    if names := sorted({name for own in everyone for name in own}):
        raise CheckpointError(f"After loading {str(folder)!r}, {len(names)} tensors are not what was saved, such as {names[0]}.")
