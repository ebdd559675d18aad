"""Micro-batches in the order in which they were asked for, built by threads of this process."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from mmscale.data.arena import ArenaPool, page_locked, pageable
from mmscale.data.build import Builder, Job, Micro
from mmscale.data.dataset import Place
from mmscale.data.statistics import StoreMeter


class Feed(Protocol):
    """First in, first out."""

    def submit(self, places: Sequence[Place]) -> None:
        """Ask for a micro-batch."""
        ...

    def take(self) -> Micro:
        """Wait for the micro-batch that was asked for first."""
        ...

    def ready(self) -> int:
        """Count the micro-batches that can be taken without waiting."""
        ...

    def close(self) -> None:
        """Drop what is under way and leave no thread and no process."""
        ...


class ThreadFeed:
    """Decodes in threads of this process: the decoders release the GIL.

    Args:
        builder: makes the micro-batches.
        threads: how many decode at a time.
        pin: decode into page-locked memory, for a CUDA device.
    """

    def __init__(self, builder: Builder, *, samples: int, threads: int, pin: bool = False) -> None:
        self._builder = builder
        self._threads = max(1, threads)
        self._pin = pin
        self._arenas = ArenaPool(builder.decoded_bytes(samples), allocate=page_locked if pin else pageable)
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="mmscale-decode")
        self._jobs: deque[Job] = deque()
        self._meter = StoreMeter(builder.dataset.reader)

    def submit(self, places: Sequence[Place]) -> None:
        """Ask for a micro-batch of at most `samples` places."""
        arena = self._arenas.lend(self._arenas.take())
        self._jobs.append(self._builder.submit(self._pool, self._threads, places, arena))

    def take(self) -> Micro:
        """Wait for the micro-batch that was asked for first; what went wrong in a thread is raised here."""
        micro = self._jobs.popleft().result()
        micro.work.store = self._meter.take()
        return Micro(micro.batch.pin_memory(), micro.quarantined, micro.work) if self._pin else micro

    def ready(self) -> int:
        """Count the micro-batches that are built."""
        return sum(job.done() for job in list(self._jobs))

    def close(self) -> None:
        """Finish the chunks that run, drop the others, end the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._jobs.clear()
        self._arenas.close()
