"""A rank that is killed at a chosen step of a save: every write, flush, rename, removal and new folder of Python's is one."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mmscale.checkpoint.commit import Contents, commit
from mmscale.checkpoint.pieces import Piece
from mmscale.checkpoint.retention import retain
from mmscale.errors import CheckpointError
from mmscale.recovery_config import CheckpointConfig
from mmscale.run_folder import RunFolder

SIZE = 1000
WATCHED = ("write", "fsync", "rename", "replace", "unlink", "mkdir", "rmdir")


def save(run: str, step: int, victim: int = -1, at: int = -1, largest: int | None = None) -> dict[str, Any]:
    """Commit a checkpoint and keep two; rank `victim` is killed before its step `at`; files over `largest` bytes cannot be written.

    Returns:
        The steps of this rank, and what it was told.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    low, high = SIZE * rank // ranks, SIZE * (rank + 1) // ranks
    values = torch.full((high - low,), float(step))
    contents = Contents(step, [Piece("master", "weight", (SIZE,), low, values, False)], {"step": float(step)}, write_documents)
    group: Any = dist.new_group(backend="gloo")
    if largest is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))
    steps: list[str] = []
    restore = watch(steps, at if rank == victim else -1)
    error = None
    try:
        commit(Path(run) / "checkpoints", contents, group)
        if rank == 0:
            retain(RunFolder(Path(run)), CheckpointConfig(keep=2))
    except CheckpointError as e:
        error = str(e)
    restore()
    if largest is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return {"steps": steps, "error": error}


def write_documents(attempt: Path) -> list[Path]:
    """A small file beside the tensors."""
    path = attempt / "run.json"
    path.write_text("{}")
    return [path]


def watch(steps: list[str], at: int) -> Callable[[], None]:
    """Note each system call that changes files, and kill this process before the `at`-th; returns what ends it."""
    before = {name: getattr(os, name) for name in WATCHED}

    def stepping(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def stepped(*arguments: Any, **named: Any) -> Any:
            if len(steps) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            about = arguments[1] if name in ("rename", "replace") else arguments[0]
            steps.append(f"{name} {'fd' if isinstance(about, int) else Path(str(about)).name}")
            return function(*arguments, **named)

        return stepped

    for name, function in before.items():
        setattr(os, name, stepping(name, function))

    def restore() -> None:
        for name, function in before.items():
            setattr(os, name, function)

    return restore
