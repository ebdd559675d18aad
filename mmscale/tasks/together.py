"""What ranks that evaluate together tell each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from mmscale.world import World

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Together:
    """This rank among those that share an evaluation."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    """For objects, on CPUs."""

    @classmethod
    def of(cls, world: World | None, group: dist.ProcessGroup | None) -> Together:
        """All ranks of a run, or this process alone."""
        return cls() if world is None else cls(world.rank, world.size, group)

    def gather(self, own: Sequence[T]) -> list[T]:
        """On rank 0 everything that all ranks have, rank by rank; on others nothing (all ranks call)."""
        if self.size == 1:
            return list(own)
        parts: list[Any] = [None] * self.size
        dist.gather_object(list(own), parts if self.rank == 0 else None, dst=0, group=self.group)
        return [item for part in parts for item in part] if self.rank == 0 else []

    def tell(self, found: T) -> T:
        """What rank 0 has found, on every rank (all ranks call)."""
        told = [found]
        if self.size > 1:
            dist.broadcast_object_list(told, src=0, group=self.group)
        return told[0]
