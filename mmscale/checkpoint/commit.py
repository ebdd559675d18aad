"""The commit protocol: nothing is a checkpoint until its manifest is complete and its folder is renamed into place.

rank 0 names an attempt -> every rank writes, syncs and hashes its own files into .tmp-step-N.attempt -> the entries are gathered over a
gloo group -> rank 0 checks them against the folder, writes MANIFEST.json, renames the folder, syncs its parent -> all ranks learn the
outcome.
"""

from __future__ import annotations

import logging
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

from mmscale.checkpoint import manifest
from mmscale.checkpoint.find import committed, name_of, step_of
from mmscale.errors import CheckpointError
from mmscale.run_folder import fsync, replace_file

logger = logging.getLogger(__name__)
STATE = "state"
"""Folder of DeepSpeed's files inside a checkpoint (its `tag`)."""


class RecordingCheckpointEngine(TorchCheckpointEngine):  # type: ignore[misc]
    """DeepSpeed's writer of .pt files, which also remembers what this rank wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[Path] = []

    def save(self, state_dict: Any, path: str) -> None:
        """Write one file and make it durable."""
        torch.save(state_dict, path)
        fsync(Path(path))
        self.written.append(Path(path))


def commit(
    checkpoints: Path, step: int, engine: Any, group: dist.ProcessGroup, extra: Callable[[Path], list[Path]], *, keep: int = 0
) -> Path:
    """Write and commit the checkpoint of a step (all ranks call).

    Args:
        checkpoints: folder of the run's checkpoints, on a file system that all ranks share.
        step: optimizer steps done.
        engine: the DeepSpeed engine.
        group: gloo group of all ranks, with a time-out.
        extra: writes this rank's further files into the attempt's folder and returns their paths (all ranks call).
        keep: newest checkpoints to keep; 0 keeps all.

    Returns:
        The committed folder.

    Raises:
        CheckpointError: a file of a rank is missing or cannot be written; the checkpoint before it stays the newest.
    """
    attempt = _name_attempt(checkpoints, step, group)
    recorder = RecordingCheckpointEngine()
    previous, engine.checkpoint_engine = engine.checkpoint_engine, recorder
    try:
        engine.save_checkpoint(str(attempt), tag=STATE, save_latest=False)
    finally:
        engine.checkpoint_engine = previous
    written = recorder.written + extra(attempt)
    entries = [manifest.describe_file(attempt, path) for path in written]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, entries, group=group)
    failure: list[str | None] = [None]
    if dist.get_rank() == 0:
        failure = [_publish(attempt, checkpoints / name_of(step), step, [e for part in gathered for e in part])]
    dist.broadcast_object_list(failure, src=0, group=group)
    if failure[0] is not None:
        raise CheckpointError(failure[0])
    if dist.get_rank() == 0:
        retain(checkpoints, keep)
    return checkpoints / name_of(step)


def _name_attempt(checkpoints: Path, step: int, group: dist.ProcessGroup) -> Path:
    """Agree on a fresh folder for this attempt; what killed attempts left behind is removed."""
    name: list[str] = [""]
    if dist.get_rank() == 0:
        checkpoints.mkdir(parents=True, exist_ok=True)
        for stale in (*checkpoints.glob(".tmp-*"), *checkpoints.glob(".trash-*")):
            shutil.rmtree(stale)
        name = [f".tmp-{name_of(step)}.{secrets.token_hex(4)}"]
        (checkpoints / name[0]).mkdir()
    dist.broadcast_object_list(name, src=0, group=group)
    return checkpoints / name[0]


def _publish(attempt: Path, final: Path, step: int, entries: list[manifest.FileEntry]) -> str | None:
    """Complete the attempt and rename it into place; returns what went wrong, or None."""
    for converter in attempt.glob("zero_to_*.py"):  # DeepSpeed's scripts: model/ is converted already
        converter.unlink()
    on_disk = {p.relative_to(attempt).as_posix() for p in attempt.rglob("*") if p.is_file()}
    named = {e.path for e in entries}
    if on_disk != named:
        return f"The checkpoint of step {step} was not committed: missing {sorted(named - on_disk)}, unknown {sorted(on_disk - named)}."
    try:
        replace_file(attempt / manifest.NAME, manifest.to_json(entries, step))
        for folder in {(attempt / e.path).parent for e in entries}:
            fsync(folder)
        if final.exists():  # left by a run whose later steps were lost; this one replaces it
            final.rename(final.with_name(f".trash-{final.name}.{secrets.token_hex(4)}"))
        attempt.rename(final)
        fsync(final.parent)
    except OSError as e:
        return f"The checkpoint of step {step} was not committed: {e}. The one before it stays the newest."
    return None


def retain(checkpoints: Path, keep: int) -> None:
    """Delete all but the newest `keep` committed checkpoints: renamed first, so that no half-deleted one is ever found."""
    for folder in committed(checkpoints)[:-keep] if keep else []:
        trash = folder.with_name(f".trash-{folder.name}.{secrets.token_hex(4)}")
        folder.rename(trash)
        shutil.rmtree(trash)
        logger.info("deleted the checkpoint of step %d", step_of(folder))
