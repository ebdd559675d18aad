"""Micro-batches built by worker processes, handed over in shared memory.

Why not DataLoader's workers: each of its batches takes fresh shared memory, whose pages cost as much as decoding the images, and a
killed worker is noticed after 5 s. Here the memory is used again, a message is a few hundred bytes, and every worker has a socket of its
own, whose end is seen at once.

Why a fork server: the parent holds threads (torch, gloo, NCCL, loggers) and perhaps a CUDA context, and a fork copies their locks as they
stand but not the threads that would release them. The fork server is a fresh interpreter that has none of these; it imports this module
once, and its workers start in milliseconds where spawned ones import torch each.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import signal
import sys
import traceback
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from multiprocessing.util import Finalize

import torch

from mmscale.data.arena import ArenaPool, Bytes, map_shared
from mmscale.data.build import Builder, Micro, Quarantined
from mmscale.data.dataset import Place
from mmscale.data.packing import Packed, pack, unpack
from mmscale.data.statistics import StoreMeter, Work
from mmscale.errors import RunError

JOIN_S = 5.0
"""How long a worker may take to end before it is killed."""


@dataclass(frozen=True, slots=True)
class _Task:
    arena: int
    places: Sequence[Place]


@dataclass(frozen=True, slots=True)
class _Reply:
    packed: Packed
    quarantined: list[Quarantined]
    work: Work


@dataclass(frozen=True, slots=True)
class _Failure:
    error: BaseException | None
    """None where it cannot be pickled."""
    text: str


class WorkerFeed:
    """Workers take turns: micro-batch j is built by worker j modulo their number.

    Args:
        builder: makes the micro-batches; it is pickled to each worker.
        samples: largest micro-batch.
        workers: how many processes.
        threads: decode threads in each.
        pin: copy to page-locked memory, for a CUDA device.

    Raises:
        RunError: a worker has died before it could begin.
    """

    def __init__(self, builder: Builder, *, samples: int, workers: int, threads: int, pin: bool = False) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(_preload())
        self._pin = pin
        self._workers = [_Worker(context, i, builder, builder.arena_bytes(samples), threads) for i in range(workers)]
        self._asked = self._taken = 0
        # an interpreter that ends without close() waits for its children, and they for the end of the connection
        self._at_exit = Finalize(self, _hang_up, args=([worker.connection for worker in self._workers],), exitpriority=10)
        try:
            for worker in self._workers:
                worker.wait_for_start()
        except RunError:
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return [worker.process.pid or 0 for worker in self._workers]

    def submit(self, places: Sequence[Place]) -> None:
        """Ask for a micro-batch of at most `samples` places.

        Raises:
            RunError: the worker whose turn it is has died.
        """
        self._workers[self._asked % len(self._workers)].submit(places)
        self._asked += 1

    def take(self) -> Micro:
        """Wait for the micro-batch that was asked for first.

        Raises:
            RunError: its worker has died. Whatever a worker raised is raised again here, with its traceback in a note.
        """
        micro = self._workers[self._taken % len(self._workers)].take()
        self._taken += 1
        return Micro(micro.batch.pin_memory(), micro.quarantined, micro.work) if self._pin else micro

    def ready(self) -> int:
        """Count the workers whose next micro-batch is built; a worker's further ones lie behind it unseen."""
        return sum(bool(worker.tasks) and worker.connection.poll() for worker in self._workers)

    def close(self) -> None:
        """Drop what is under way and end the processes."""
        self._at_exit()
        for worker in self._workers:
            worker.end()


class _Worker:
    """The parent's end of one worker."""

    def __init__(self, context: mp.context.ForkServerContext, index: int, builder: Builder, arena_bytes: int, threads: int) -> None:
        self.index = index
        self.arenas = ArenaPool(arena_bytes, shared=True)
        self.tasks: deque[_Task] = deque()
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=_work, args=(theirs, builder, arena_bytes, threads), name=f"mmscale-loader-{index}", daemon=True
        )
        self.process.start()
        theirs.close()

    def wait_for_start(self) -> None:
        """Wait for the word that the process has all it needs and no longer minds signals."""
        try:
            self.connection.recv()
        except (EOFError, OSError) as e:
            raise RunError(f"Loader worker {self.index} (pid {self.process.pid}) {self._end()} before it could begin.") from e

    def submit(self, places: Sequence[Place]) -> None:
        known = len(self.arenas)
        task = _Task(self.arenas.take(), places)
        try:
            if len(self.arenas) > known:
                self.connection.send(None)
                send_handle(self.connection, self.arenas.descriptors[-1], self.process.pid or 0)
            self.connection.send(task)
        except OSError as e:
            raise self._death(task) from e
        self.tasks.append(task)

    def take(self) -> Micro:
        task = self.tasks.popleft()
        try:
            reply: _Reply | _Failure = self.connection.recv()
        except (EOFError, OSError) as e:
            raise self._death(task) from e
        if isinstance(reply, _Failure):
            self.arenas.give_back(task.arena)
            raise self._raised(reply)
        return Micro(unpack(reply.packed, torch.from_numpy(self.arenas.lend(task.arena))), reply.quarantined, reply.work)

    def end(self) -> None:
        self.process.join(JOIN_S)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.process.close()
        self.arenas.close()

    def _raised(self, failure: _Failure) -> BaseException:
        if failure.error is None:
            return RunError(f"Loader worker {self.index} failed:\n{failure.text}")
        if hasattr(failure.error, "add_note"):  # Python 3.11
            failure.error.add_note(f"In loader worker {self.index}:\n{failure.text}")
        return failure.error

    def _death(self, task: _Task) -> RunError:
        return RunError(
            f"Loader worker {self.index} (pid {self.process.pid}) {self._end()} while it was to read positions {task.places[0][0]} to "
            f"{task.places[-1][0]}. A SIGKILL nobody sent is the system running out of memory: lower loader.workers or loader.prefetch."
        )

    def _end(self) -> str:
        self.process.join(JOIN_S)
        code = self.process.exitcode
        return f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with exit code {code}"


def _hang_up(connections: Sequence[Connection]) -> None:
    for connection in connections:
        connection.close()


def _preload() -> list[str]:
    """Modules that the fork server imports once for all workers.

    A worker runs its parent's main module again (under another name). Where that is one of ours, what it has imported goes along, or each
    worker would import it anew; main itself does not, for Python warns of running a module that is imported already.
    """
    name: str = getattr(getattr(sys.modules["__main__"], "__spec__", None), "name", "")
    return sorted(n for n in list(sys.modules) if n.startswith("mmscale.") and n != name) if name.startswith("mmscale.") else [__name__]


def _work(connection: Connection, builder: Builder, arena_bytes: int, threads: int) -> None:
    """A worker: tasks in, replies out, until the parent closes the connection or dies."""
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C and a scheduler's warning reach the whole group; the parent decides
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    arenas: list[Bytes] = []
    meter = StoreMeter(builder.dataset.reader)
    with ThreadPoolExecutor(threads) as pool:
        try:
            connection.send(None)
            while True:
                task: _Task | None = connection.recv()
                if task is None:
                    descriptor = recv_handle(connection)
                    arenas.append(map_shared(descriptor, arena_bytes))
                    os.close(descriptor)
                else:
                    reply = _reply(builder, pool, threads, task, arenas[task.arena])
                    if isinstance(reply, _Reply):
                        reply.work.store = meter.take()
                    connection.send(reply)
        except (EOFError, OSError):
            return


def _reply(builder: Builder, pool: ThreadPoolExecutor, threads: int, task: _Task, arena: Bytes) -> _Reply | _Failure:
    job = builder.submit(pool, threads, task.places, arena)
    error = job.error()
    if error is not None:
        return _Failure(error if _survives_pickling(error) else None, "".join(traceback.format_exception(error)))
    micro = job.result()
    return _Reply(pack(micro.batch, torch.from_numpy(arena), builder.decoded_bytes(len(task.places))), micro.quarantined, micro.work)


def _survives_pickling(error: BaseException) -> bool:
    try:
        return type(pickle.loads(pickle.dumps(error))) is type(error)
    except (pickle.PicklingError, TypeError, AttributeError, ValueError):
        return False
