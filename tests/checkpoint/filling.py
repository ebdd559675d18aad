"""A save on a disk that somebody else fills up while it is being written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mmscale.checkpoint.commit import Contents, commit
from mmscale.checkpoint.pieces import Piece
from mmscale.errors import CheckpointError

SIZE = 1 << 20
"""Elements of the one tensor."""


def fill(path: Path) -> None:
    """Take all the space that there is."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        while os.write(descriptor, bytes(1 << 16)):
            pass
    except OSError:
        os.close(descriptor)


def save_while_filling(run: str, step: int, filler: int = -1) -> str | None:
    """Commit a checkpoint; rank `filler` fills the disk once the check for space has been made. What this rank is told."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    low, high = SIZE * rank // ranks, SIZE * (rank + 1) // ranks
    group: Any = dist.new_group(backend="gloo")

    class Filling(list[Piece]):
        """The pieces, and what happens elsewhere when a rank begins to write them: after the check, which has asked for their sizes."""

        asked = 0

        def __iter__(self) -> Any:
            self.asked += 1
            if self.asked == 2 and rank == filler:
                fill(Path(run) / "filler")
            return super().__iter__()

    pieces = Filling([Piece("master", "weight", (SIZE,), low, torch.full((high - low,), float(step)), False)])
    try:
        commit(Path(run) / "checkpoints", Contents(step, pieces, {"step": float(step)}, lambda attempt: []), group)
    except CheckpointError as e:
        return str(e)
    return None
