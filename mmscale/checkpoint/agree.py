"""Ranks agreeing on the checkpoint to go on from: each hashes its share of the files."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from mmscale.checkpoint import manifest
from mmscale.checkpoint.find import committed, set_aside


def agree_on_newest(checkpoints: Path, group: dist.ProcessGroup) -> Path | None:
    """Find the newest checkpoint that is whole; bad ones are named and set aside (all ranks call).

    Returns:
        The same folder on every rank, or None where there is none.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    while True:
        found: list[Path | None] = [None]
        fault: str | None = None
        if rank == 0:
            folders = committed(checkpoints)
            found = [folders[-1] if folders else None]
            fault = manifest.find_fault(folders[-1], hashes=False) if folders else None
        told: list[object] = [*found, fault]
        dist.broadcast_object_list(told, src=0, group=group)
        folder, fault = told  # type: ignore[assignment]
        if not isinstance(folder, Path):
            return None
        if fault is None:
            entries = sorted(manifest.read_manifest(folder), key=lambda e: -e.size)
            faults: list[str | None] = [None] * ranks
            dist.all_gather_object(faults, manifest.find_changed(folder, entries[rank::ranks]), group=group)
            fault = next((f for f in faults if f is not None), None)
        if fault is None:
            return folder
        if rank == 0:
            set_aside(folder, fault)
        dist.barrier(group=group)
