"""Worker processes, and threads of this process until they have started: the first batch does not wait for anybody's imports.

A fork server imports torch, for seconds, before its first worker can run. Micro-batches are the same whoever builds them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from mmscale.data.build import Builder, Micro
from mmscale.data.dataset import Place
from mmscale.data.feed import Feed, ThreadFeed
from mmscale.data.workers import WorkerFeed


class StartingFeed:
    """Starts worker processes in the background, and goes over to them once they run.

    Args:
        builder: makes the micro-batches; it is pickled to each worker.
        samples: largest micro-batch.
        workers: how many processes.
        threads: decode threads in each; until they run, as many in this process as in all of them.
        pin: copy to page-locked memory, for a CUDA device.
    """

    def __init__(self, builder: Builder, *, samples: int, workers: int, threads: int, pin: bool = False) -> None:
        self._local = ThreadFeed(builder, samples=samples, threads=workers * threads, pin=pin)
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="mmscale-start")
        self._start = self._starter.submit(WorkerFeed, builder, samples=samples, workers=workers, threads=threads, pin=pin)
        self._turns: deque[Feed] = deque()

    @property
    def workers(self) -> WorkerFeed:
        """Wait until the workers run.

        Raises:
            OSError: the system starts no more processes.
        """
        return self._start.result()

    def submit(self, places: Sequence[Place]) -> None:
        """Ask for a micro-batch of at most `samples` places.

        Raises:
            RunError: the worker whose turn it is has died.
        """
        feed: Feed = self.workers if self._start.done() else self._local
        feed.submit(places)
        self._turns.append(feed)

    def take(self) -> Micro:
        """Wait for the micro-batch that was asked for first.

        Raises:
            RunError: its worker has died. Whatever a worker or thread raised is raised again here.
        """
        micro = self._turns.popleft().take()
        if self._start.done() and self._local not in self._turns:
            self._local.close()  # its memory goes as its last batches do
        return micro

    def ready(self) -> int:
        """Count the micro-batches that can be taken without waiting, as far as is seen."""
        return self._local.ready() + (self.workers.ready() if self._start.done() else 0)

    def close(self) -> None:
        """Drop what is under way and end the threads and the processes."""
        self._local.close()
        self._starter.shutdown(wait=True)
        if self._start.exception() is None:
            self.workers.close()
