"""`mmscale checkpoints pin|export|average`: what is done with a run's checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from mmscale.checkpoint.find import committed, name_of, resolve
from mmscale.checkpoint.manifest import find_fault
from mmscale.checkpoint.retention import pin
from mmscale.errors import CheckpointError
from mmscale.run_folder import RunFolder
from shards.errors import ConfigError


def pin_checkpoint(run: Path, step: int, *, pinned: bool) -> None:
    """Keep a checkpoint for good, or no longer.

    Raises:
        CheckpointError: the run has none of that step.
    """
    folder = RunFolder(run).checkpoints / name_of(step)
    if folder not in committed(RunFolder(run).checkpoints):
        known = ", ".join(f.name for f in committed(RunFolder(run).checkpoints)) or "none"
        raise CheckpointError(f"The run {str(run)!r} has no checkpoint of step {step}. It has: {known}.")
    pin(folder, pinned=pinned)
    print(f"{folder}   {'pinned' if pinned else 'no longer pinned'}")


def export_checkpoint(checkpoint: Path, out: Path, *, shard_gib: float, dtype: Literal["fp32", "bf16"], average: bool) -> None:
    """Write a checkpoint's model in the transformers layout.

    Raises:
        CheckpointError: there is no such checkpoint, or `out` exists.
    """
    from mmscale.checkpoint.export import export_model

    folder = resolve(checkpoint)
    files = export_model(folder, out, shard_bytes=int(shard_gib * 2**30), dtype=dtype, average=average)
    print(f"{folder} -> {out}: {len(files)} files, {sum(f.stat().st_size for f in files) / 2**20:,.1f} MiB")


def average_checkpoints(run: Path, out: Path, last: int) -> None:
    """Write the mean of a run's newest checkpoints as a checkpoint.

    Raises:
        ConfigError: fewer than two.
        CheckpointError: the run has fewer than asked for, one is damaged, or `out` exists.
    """
    from mmscale.checkpoint import export

    if last < 2:
        raise ConfigError(f"`--last` must be at least 2; got {last}.")
    found = committed(RunFolder(run).checkpoints)
    if len(found) < last:
        raise CheckpointError(
            f"The run {str(run)!r} has {len(found)} checkpoints, and {last} are asked for. Train with a larger checkpoint.keep."
        )
    for folder in found[-last:]:
        if (fault := find_fault(folder)) is not None:
            raise CheckpointError(f"The checkpoint {str(folder)!r} is damaged: {fault}.")
    export.average_checkpoints(found[-last:], out)
    print(f"{', '.join(f.name for f in found[-last:])} -> {out}")
