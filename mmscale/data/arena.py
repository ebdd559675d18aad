"""Memory that batches lie in, used again and again: a fresh page costs up to 7 us, for some images more than their decoding.

An arena is lent as a tensor and comes back by itself when the last tensor that shares its memory is gone, so whoever holds a batch
may keep it for as long as he likes.
"""

from __future__ import annotations

import mmap
import os
import weakref

import numpy as np
import torch
from torch import Tensor


def map_shared(descriptor: int, size_bytes: int) -> Tensor:
    """Map the memory of a file descriptor as a uint8 tensor; another process that maps it sees the same bytes."""
    return torch.from_numpy(np.frombuffer(mmap.mmap(descriptor, size_bytes), np.uint8))


class ArenaPool:
    """Arenas of one size; it grows when all are lent.

    Args:
        size_bytes: of an arena.
        shared: whether other processes can map them. The memory is anonymous (memfd): it is not bounded by the size of /dev/shm, and
            nothing is left behind however the processes end.

    Attributes:
        descriptors: of shared arenas, by index.
    """

    def __init__(self, size_bytes: int, *, shared: bool = False) -> None:
        self.size_bytes = max(1, size_bytes)
        self.descriptors: list[int] = []
        self._shared = shared
        self._arenas: list[Tensor] = []
        self._free: list[int] = []

    def __len__(self) -> int:
        """Arenas allocated so far."""
        return len(self._arenas)

    def take(self) -> int:
        """Reserve a free arena, allocating one where there is none."""
        if self._free:
            return self._free.pop()
        self._arenas.append(self._allocate())
        return len(self._arenas) - 1

    def give_back(self, index: int) -> None:
        """Free an arena that was taken and never lent."""
        self._free.append(index)

    def lend(self, index: int) -> Tensor:
        """Return a taken arena as (size_bytes,) uint8. It is free again when the last tensor on this memory is gone."""
        alias = self._arenas[index].numpy()[:]
        weakref.finalize(alias, self._free.append, index).atexit = False
        return torch.from_numpy(alias)

    def close(self) -> None:
        """Let the arenas go; those still lent live on until they are released."""
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors.clear()
        self._arenas.clear()
        self._free.clear()

    def _allocate(self) -> Tensor:
        if not self._shared:
            return torch.empty(self.size_bytes, dtype=torch.uint8)
        descriptor = os.memfd_create("mmscale-batch", os.MFD_CLOEXEC)
        self.descriptors.append(descriptor)
        os.ftruncate(descriptor, self.size_bytes)
        return map_shared(descriptor, self.size_bytes)
