"""Work on many shards with several processes, started as plain commands: a caller's script needs no `__main__` guard.

Each worker has a socket to its parent. It reads its tasks in a thread of its own: when the parent is gone, however it went, that thread
sees the end of the stream and ends the process. What was being written then simply is not there.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from functools import partial
from itertools import chain, islice
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

from shards.errors import MmscaleError, ShardError
from shards.versions.sole import hold_folder

Task = TypeVar("Task")
Result = TypeVar("Result")
Numbered = tuple[int, Any]


def run(
    function: Callable[..., Result],
    tasks: Iterable[Task],
    processes: int,
    *,
    out: Path | None = None,
    report: Callable[[int], None] | None = None,
) -> Generator[tuple[int, Result], None, None]:
    """Call a function on every task.

    Args:
        function: of a module of this package, a `functools.partial` of one, or an object that is pickled to each worker once.
        tasks: plain values; each is asked for when a process is free. One with a `name` is named where its worker dies.
        processes: how many; 1 works in this one.
        out: a folder that the tasks write into. `sole_writer` waits there for workers that a killed command has left to end.
        report: if given, the function gets a keyword `report`, and what it calls it with arrives here.

    Yields:
        (number of the task, result), in the order in which they are done.

    Raises:
        MmscaleError: raised by a task, or a worker has died.
    """
    waiting = enumerate(tasks)
    first = list(islice(waiting, max(1, processes)))
    if len(first) <= 1:
        call = function if report is None else partial(function, report=report)
        for number, task in chain(first, waiting):
            yield number, call(task)
        return
    workers: list[_Worker] = []
    try:
        workers += [_Worker(function, out, report is not None) for _ in first]
        for worker, given in zip(workers, first, strict=True):  # a task may be larger than a pipe's buffer: then giving waits for the start
            worker.give(given)
        yield from _share(workers, waiting, report)
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    """The parent's side of one worker process."""

    def __init__(self, function: Callable[..., Any], out: Path | None, reports: bool) -> None:
        self.connection, far_end = multiprocessing.Pipe()
        self._task: Any = None
        with far_end:
            # A session of its own: Ctrl-C reaches the parent alone, which then stops its workers.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "shards.pool", str(far_end.fileno())],
                pass_fds=[far_end.fileno()],
                stdin=subprocess.DEVNULL,
                env=worker_environment(),
                start_new_session=True,
            )
        self.connection.send((function, out, reports))

    def give(self, task: Numbered) -> None:
        self._task = task[1]
        try:
            self.connection.send(task)
        except OSError as e:
            raise self._died() from e

    def receive(self) -> Any:
        try:
            return self.connection.recv()
        except (EOFError, OSError) as e:
            raise self._died() from e

    def stop(self) -> None:
        self.connection.close()
        self._process.kill()
        self._process.wait()

    def _died(self) -> ShardError:
        code = self._process.wait()
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        cause = " (out of memory? then use fewer `processes`)" if code == -9 else ""
        where = f" at {self._task.name!r}" if hasattr(self._task, "name") else ""
        return ShardError(f"A worker process ended {how}{cause}{where}. Repeat the command; what is finished is kept.")


def _share(workers: list[_Worker], waiting: Iterator[Numbered], report: Callable[[int], None] | None) -> Iterator[Numbered]:
    """Hand out the tasks as workers become free."""
    busy: dict[Any, _Worker] = {worker.connection: worker for worker in workers}
    while busy:
        for connection in wait(list(busy)):
            worker = busy[connection]
            message = worker.receive()
            if isinstance(message, MmscaleError):
                raise message
            if isinstance(message, int):
                assert report is not None
                report(message)
                continue
            following = next(waiting, None)
            if following is None:
                del busy[connection]
            else:
                worker.give(following)
            yield message


def worker_environment() -> dict[str, str]:
    """The parent's environment, in which the worker finds this very package, starts no threads and keeps the memory of decoded images.

    Given back to the system after each image and taken again, page by page, that memory costs 7 % of the time of a photo of 640 x 480.
    """
    path = [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
    memory = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(256 << 20), "MALLOC_TOP_PAD_": str(64 << 20)}
    return {**memory, **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(part for part in path if part)}


def _work(descriptor: int) -> None:
    """The whole life of a worker process."""
    connection: Connection[Any, Any] = Connection(descriptor)
    held = None
    try:
        function, out, reports = connection.recv()
        call = partial(function, report=connection.send) if reports else function
        held = None if out is None else hold_folder(out)
        tasks: queue.SimpleQueue[Numbered] = queue.SimpleQueue()
        threading.Thread(target=_listen, args=(connection, tasks), daemon=True).start()
        while True:
            number, task = tasks.get()
            connection.send((number, call(task)))
    except MmscaleError as e:
        connection.send(e)
    except ConnectionError:  # the parent is gone
        os._exit(1)
    finally:
        if held is not None:
            os.close(held)


def _listen(connection: Connection[Any, Any], tasks: queue.SimpleQueue[Numbered]) -> None:
    try:
        while True:
            tasks.put(connection.recv())
    except (EOFError, OSError, pickle.UnpicklingError):
        os._exit(1)


if __name__ == "__main__":
    _work(int(sys.argv[1]))
