"""Reads that hold out against a store that fails, stalls and cuts answers short: repeated, hedged, within a deadline."""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

from shards.errors import ShardError
from shards.store import loop
from shards.store.config import StoreConfig
from shards.store.failure import PermanentError, TransientError
from shards.store.hedge import Hedge, size_class
from shards.store.place import shown
from shards.store.statistics import Counters

T = TypeVar("T")
Sink = Callable[[int, memoryview], None]
"""Takes (offset, bytes) of a whole object, in order."""

FIRST_PAUSE_S = 0.05
"""Mean pause before the first repetition; each further one is twice as long."""
LONGEST_PAUSE_S = 10.0
SHORT_ANSWERS = 2
"""Repetitions of a read whose answers are short without a failure: then the object itself is short."""


class Backend(Protocol):
    """One request a call. FileNotFoundError, `TransientError` or `PermanentError` where it fails."""

    async def read(self, name: str, start: int, size: int) -> memoryview:
        """Ask for a range of bytes; fewer come back where the object ends before them."""

    async def read_whole(self, name: str) -> memoryview:
        """Ask for all bytes of an object."""

    async def size(self, name: str) -> int:
        """Ask for an object's size in bytes."""

    async def names(self) -> list[str] | None:
        """List what lies directly below the root; None where that cannot be."""


class Origin:
    """Where the data set lies. Threads may share it.

    Args:
        url: the root.
        backend: makes the requests.
        config: deadlines, repetitions, hedging.
        counters: what is counted goes there.
    """

    def __init__(self, url: str, backend: Backend, config: StoreConfig, counters: Counters) -> None:
        self.root = shown(url)
        self._backend, self._config, self._counters = backend, config, counters
        self._hedge = Hedge(config.hedge_share)

    def read(self, name: str, start: int, size: int) -> bytes:
        """Read a range of bytes; fewer where the object ends before them.

        Raises:
            FileNotFoundError: there is no such object.
            ShardError: it is refused, or every repetition failed.
        """
        return bytes(self._wait(self._read(name, start, size))) if size > 0 else b""

    def read_whole(self, name: str) -> bytes:
        """Read a small object."""
        return bytes(self._wait(self._repeat(name, lambda: self._hedged(lambda: self._backend.read_whole(name), "whole"))))

    def size(self, name: str) -> int:
        """Return an object's size in bytes."""
        return self._wait(self._repeat(name, lambda: self._hedged(lambda: self._backend.size(name), "size")))

    def names(self) -> list[str] | None:
        """List what lies directly below the root; None where that cannot be."""
        return self._wait(self._repeat("", self._counted(self._backend.names)))

    def download(self, name: str, size: int, sink: Sink) -> None:
        """Read a whole object by several requests at once and hand its bytes on in order; it ends early where the object does."""
        step = self._config.chunk_bytes
        starts = deque(range(0, size, step))
        running: deque[tuple[int, Future[memoryview]]] = deque()
        try:
            while starts or running:
                while starts and len(running) < self._config.concurrency:
                    start = starts.popleft()
                    running.append((start, loop.submit(self._read(name, start, min(step, size - start)))))
                start, answer = running.popleft()
                data = self._timed(answer.result)
                sink(start, data)
                if len(data) < min(step, size - start):
                    return
        finally:
            for _, answer in running:
                answer.cancel()

    def insist(self, name: str, request: Callable[[], Awaitable[T]], done: str, repetitions: int) -> T:
        """Make a request that is none for bytes, with repetitions but without a deadline of its own.

        Args:
            name: of the object, for errors.
            request: what is awaited; may be awaited several times.
            done: what it does, as in "cannot be written".
            repetitions: after transient failures.
        """
        return self._wait(self._repeat(name, request, done, repetitions, float("inf")))

    def sha256(self, name: str) -> str:
        """Hash a whole object."""
        digest = hashlib.sha256()
        self.download(name, self.size(name), lambda _, data: digest.update(data))
        return digest.hexdigest()

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return self._timed(lambda: loop.run(work))

    def _timed(self, wait: Callable[[], T]) -> T:
        begin = time.perf_counter()
        try:
            return wait()
        finally:
            self._counters.add(wait_s=time.perf_counter() - begin)

    async def _read(self, name: str, start: int, size: int) -> memoryview:
        short = 0

        async def attempt() -> memoryview:
            nonlocal short
            data = await self._hedged(lambda: self._backend.read(name, start, size), size_class(size))
            self._counters.add(bytes_fetched=len(data))
            if len(data) < size and short < SHORT_ANSWERS:
                short += 1
                raise TransientError(f"{len(data)} of {size} bytes came")
            return data

        return await self._repeat(name, attempt)

    async def _hedged(self, request: Callable[[], Awaitable[T]], kind: str) -> T:
        """Make a request, and the same again while it is slow; the first answer wins and the others are called off."""
        ask = self._counted(request)
        begin = time.perf_counter()
        tasks: set[asyncio.Future[T]] = {asyncio.ensure_future(ask())}
        try:
            for pause_s, stalled in self._hedge.pauses_s(kind):
                done, _ = await asyncio.wait(tasks, timeout=pause_s, return_when=asyncio.FIRST_COMPLETED)
                if done:
                    break
                if self._hedge.take(stalled):
                    self._counters.add(hedges=1)
                    tasks.add(asyncio.ensure_future(ask()))
            answer = await _first(tasks)
        finally:
            for task in tasks:
                task.cancel()
        self._hedge.observe(kind, time.perf_counter() - begin)
        return answer

    def _counted(self, request: Callable[[], Awaitable[T]]) -> Callable[[], Awaitable[T]]:
        async def ask() -> T:
            self._counters.add(requests=1)
            try:
                return await asyncio.wait_for(request(), self._config.request_timeout_s)
            except (TimeoutError, asyncio.TimeoutError) as e:
                raise TransientError(f"no answer in {self._config.request_timeout_s:g} s") from e

        return ask

    async def _repeat(
        self,
        name: str,
        attempt: Callable[[], Awaitable[T]],
        done: str = "read",
        repetitions: int | None = None,
        deadline_s: float | None = None,
    ) -> T:
        """Repeat after transient failures with growing random pauses, until the deadline."""
        repetitions = self._config.retries if repetitions is None else repetitions
        deadline_s = self._config.deadline_s if deadline_s is None else deadline_s
        end = time.monotonic() + deadline_s
        what = f"{self._shown(name)!r} cannot be {done}"
        for number in range(repetitions + 1):
            try:
                return await asyncio.wait_for(attempt(), None if deadline_s == float("inf") else max(0.001, end - time.monotonic()))
            except PermanentError as e:
                raise ShardError(f"{what}: {e.cause}. {e.fix}") from e
            except (TimeoutError, asyncio.TimeoutError) as e:
                raise _gave_up(what, number + 1, deadline_s, "the deadline passed") from e
            except TransientError as e:
                pause_s = random.uniform(0, 2 * min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**number))
                if number == repetitions or time.monotonic() + pause_s >= end:
                    raise _gave_up(what, number + 1, deadline_s, str(e)) from e
            self._counters.add(retries=1)
            await asyncio.sleep(pause_s)
        raise AssertionError("unreachable")

    def _shown(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root


def _gave_up(what: str, attempts: int, deadline_s: float, cause: str) -> ShardError:
    within = "" if deadline_s == float("inf") else f" within {deadline_s:g} s"
    return ShardError(
        f"{what}, {attempts} times tried{within}: {cause}. "
        "Check the store and the network, or raise `store.retries` and `store.deadline_s`."
    )


async def _first(tasks: set[asyncio.Future[T]]) -> T:
    """Wait for the first answer. A failure that comes first counts too: what is then still under way may well have stalled."""
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    return min(done, key=lambda task: task.exception() is not None).result()
