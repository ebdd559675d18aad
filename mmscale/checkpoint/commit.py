"""The commit protocol: nothing is a checkpoint until its manifest is complete and its folder is renamed into place.

rank 0 looks for space and names an attempt -> every rank writes, syncs and hashes its own file in .tmp-step-N.attempt -> what each wrote is
gathered over a gloo group of its own -> rank 0 checks that every tensor is there whole, writes MANIFEST.json, renames the folder, syncs its
parent -> all ranks learn the outcome. A rank that fails says so in the gather: no rank waits for it, and the checkpoint before stays.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mmscale.checkpoint import manifest
from mmscale.checkpoint.find import name_of
from mmscale.checkpoint.index import NAME as INDEX
from mmscale.checkpoint.index import STATE, build_index, file_of
from mmscale.checkpoint.pieces import Piece
from mmscale.checkpoint.tensor_file import TensorPart, total_bytes, write_tensors
from mmscale.errors import CheckpointError
from mmscale.run_folder import fsync, replace_file

LATEST = "latest"
"""File with the name of the newest checkpoint: a hint for people, which nothing here reads."""
_SPARE_BYTES, _SPARE_INODES = 64 << 20, 64
"""Room left for the small files of a checkpoint and of the run."""


@dataclass(frozen=True, slots=True)
class Contents:
    """What this rank puts into a checkpoint."""

    step: int
    """Optimizer steps done."""
    pieces: list[Piece]
    """This rank's share of the tensors; no other rank writes any of it."""
    scalars: dict[str, float]
    """What the optimizer counts."""
    documents: Callable[[Path], list[Path]]
    """Writes the small files into the attempt's folder and returns their paths; called on rank 0."""


@dataclass(frozen=True, slots=True)
class _Report:
    """What a rank has done."""

    files: list[manifest.FileEntry]
    parts: list[TensorPart]
    scalars: dict[str, float]
    error: str | None


def commit(checkpoints: Path, contents: Contents, group: dist.ProcessGroup) -> Path:
    """Write and commit a checkpoint (all ranks call).

    Args:
        checkpoints: folder of the run's checkpoints, on a file system that all ranks share.
        contents: what this rank writes.
        group: gloo group of all ranks, with a time-out, that nobody else uses.

    Returns:
        The committed folder.

    Raises:
        CheckpointError: the same on every rank; nothing was committed, and the checkpoint before it stays the newest.
    """
    attempt = _begin(checkpoints, contents, group)
    report = _write(attempt, contents)
    reports: list[Any] = [None] * dist.get_world_size()
    first = dist.get_rank() == 0
    dist.gather_object(report, reports if first else None, dst=0, group=group)
    failure: list[str | None] = [None]
    if first:
        failure = [_publish(attempt, checkpoints, contents.step, reports)]
        if failure[0] is not None:
            shutil.rmtree(attempt, ignore_errors=True)  # its bytes may be what the disk lacks
    dist.broadcast_object_list(failure, src=0, group=group)
    if failure[0] is not None:
        raise CheckpointError(
            f"The checkpoint of step {contents.step} was not committed: {failure[0]}. The one before it stays the newest."
        )
    return checkpoints / name_of(contents.step)


def _begin(checkpoints: Path, contents: Contents, group: dist.ProcessGroup) -> Path:
    """Agree on a fresh folder for this attempt, where there is room for it; what killed attempts left behind is removed."""
    sizes: list[Any] = [None] * dist.get_world_size()
    first = dist.get_rank() == 0
    dist.gather_object(total_bytes(contents.pieces), sizes if first else None, dst=0, group=group)
    told: list[str | None] = [None, None]
    if first:
        name = f".tmp-{name_of(contents.step)}.{secrets.token_hex(4)}"
        try:
            checkpoints.mkdir(parents=True, exist_ok=True)
            remove_leftovers(checkpoints)
            told = [name, find_lack(checkpoints, sum(sizes), len(sizes))]
            if told[1] is None:
                (checkpoints / name / STATE).mkdir(parents=True)
        except OSError as e:
            told = [name, str(e)]
    dist.broadcast_object_list(told, src=0, group=group)
    if told[1] is not None:
        raise CheckpointError(f"The checkpoint of step {contents.step} was not committed: {told[1]}. The one before it stays the newest.")
    return checkpoints / str(told[0])


def remove_leftovers(checkpoints: Path) -> None:
    """Delete what killed attempts have left in the folder of a run's checkpoints."""
    for stale in (*checkpoints.glob(".tmp-*"), *checkpoints.glob(".trash-*")):
        shutil.rmtree(stale)
    for torn in checkpoints.glob(f".{LATEST}.*.tmp"):
        torn.unlink()


def find_lack(folder: Path, size: int, files: int) -> str | None:
    """Say what a file system lacks for so many bytes and files, or None. One that does not count blocks or inodes has enough."""
    there = os.statvfs(folder)
    free, needed = there.f_bavail * there.f_frsize, size + _SPARE_BYTES
    if there.f_blocks and free < needed:
        return f"{str(folder)!r} has {free / 2**20:,.0f} MiB free and {needed / 2**20:,.0f} MiB are needed; delete something there"
    if there.f_files and there.f_favail < files + _SPARE_INODES:
        return f"{str(folder)!r} has {there.f_favail} free inodes and {files + _SPARE_INODES} are needed; delete files there"
    return None


def _write(attempt: Path, contents: Contents) -> _Report:
    """Write this rank's files; a failure is reported, not raised, so that the others do not wait in vain."""
    rank = dist.get_rank()
    try:
        relative = file_of(rank)
        entry, parts = write_tensors(attempt / relative, relative, contents.pieces)
        files = [entry]
        if rank == 0:
            for path in contents.documents(attempt):
                fsync(path)
                files.append(manifest.describe_file(attempt, path))
    except Exception as e:  # noqa: BLE001  (whatever it is, the other ranks must hear of it)
        return _Report([], [], {}, f"rank {rank}: {e or type(e).__name__}")
    return _Report(files, parts, contents.scalars, None)


def _publish(attempt: Path, checkpoints: Path, step: int, reports: list[_Report]) -> str | None:
    """Complete the attempt and rename it into place; returns what went wrong, or None."""
    errors = [r.error for r in reports if r.error is not None]
    if errors:
        return "; ".join(errors)
    final = checkpoints / name_of(step)
    try:
        index = attempt / STATE / INDEX
        replace_file(index, build_index([r.parts for r in reports], [r.scalars for r in reports]).to_json())
        entries = [e for r in reports for e in r.files] + [manifest.describe_file(attempt, index)]
        on_disk = {p.relative_to(attempt).as_posix() for p in attempt.rglob("*") if p.is_file()}
        named = {e.path for e in entries}
        if on_disk != named:
            return f"missing {sorted(named - on_disk)}, unknown {sorted(on_disk - named)}"
        replace_file(attempt / manifest.NAME, manifest.to_json(entries, step))
        for folder in {parent for e in entries for parent in (attempt / e.path).parents if parent.is_relative_to(attempt)}:
            fsync(folder)
        if final.exists():  # left by a run whose later steps were lost; this one replaces it
            final.rename(final.with_name(f".trash-{final.name}.{secrets.token_hex(4)}"))
        attempt.rename(final)
        fsync(checkpoints)
    except (OSError, CheckpointError) as e:
        return str(e)
    with contextlib.suppress(OSError):
        replace_file(checkpoints / LATEST, final.name + "\n")
    return None
