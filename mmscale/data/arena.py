"""Memory that batches lie in, used again and again: a fresh page costs up to 7 us, for some images more than their decoding.

An arena is lent as an array and comes back by itself when the last array or tensor that shares its memory is gone, so whoever holds a
batch may keep it for as long as he likes.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


def map_shared(descriptor: int, size_bytes: int) -> Bytes:
    """Map the memory of a file descriptor; another process that maps it sees the same bytes."""
    return np.frombuffer(mmap.mmap(descriptor, size_bytes), np.uint8)


def page_locked(size_bytes: int) -> Bytes:
    """Allocate memory that a CUDA device copies from by itself."""
    import torch

    pinned: Bytes = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True).numpy()
    return pinned


def pageable(size_bytes: int) -> Bytes:
    """Allocate ordinary memory."""
    return np.empty(size_bytes, np.uint8)


class ArenaPool:
    """Arenas of one size; it grows when all are lent.

    Args:
        size_bytes: of an arena.
        shared: whether other processes can map them. The memory is anonymous (memfd): it is not bounded by the size of /dev/shm, and
            nothing is left behind however the processes end.
        allocate: makes an arena that is not shared.

    Attributes:
        descriptors: of shared arenas, by index.
    """

    def __init__(self, size_bytes: int, *, shared: bool = False, allocate: Callable[[int], Bytes] = pageable) -> None:
        self.size_bytes = max(1, size_bytes)
        self.descriptors: list[int] = []
        self._allocate = self._allocate_shared if shared else allocate
        self._arenas: list[Bytes] = []
        self._free: list[int] = []

    def __len__(self) -> int:
        """Arenas allocated so far."""
        return len(self._arenas)

    def take(self) -> int:
        """Reserve a free arena, allocating one where there is none."""
        if self._free:
            return self._free.pop()
        self._arenas.append(self._allocate(self.size_bytes))
        return len(self._arenas) - 1

    def give_back(self, index: int) -> None:
        """Free an arena that was taken and never lent."""
        self._free.append(index)

    def lend(self, index: int) -> Bytes:
        """Return a taken arena as (size_bytes,) uint8. It is free again when the last array or tensor on this memory is gone."""
        lease = _Lease(self._arenas[index])
        weakref.finalize(lease, self._free.append, index).atexit = False
        return np.asarray(lease)

    def close(self) -> None:
        """Let the arenas go; those still lent live on until they are released."""
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors.clear()
        self._arenas.clear()
        self._free.clear()

    def _allocate_shared(self, size_bytes: int) -> Bytes:
        descriptor = os.memfd_create("mmscale-batch", os.MFD_CLOEXEC)
        self.descriptors.append(descriptor)
        os.ftruncate(descriptor, size_bytes)
        return map_shared(descriptor, size_bytes)


class _Lease:
    """What all arrays on a lent arena refer to. A view of a view refers to the owner of the memory alone, so the owner cannot tell."""

    def __init__(self, arena: Bytes) -> None:
        self.arena = arena
        self.__array_interface__: dict[str, Any] = arena.__array_interface__
