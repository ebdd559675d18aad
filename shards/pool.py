"""Work on many shards with several processes, started as plain commands: a caller's script needs no `__main__` guard.

A worker reads its tasks in a thread of its own; when the parent is gone, however it went, that thread sees the end of the stream and
ends the process.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

from shards.errors import MmscaleError, ShardError
from shards.versions.sole import hold_folder

Task = TypeVar("Task")
Result = TypeVar("Result")


def run(
    function: Callable[[Task], Result], tasks: Sequence[Task], processes: int, *, out: Path
) -> Generator[tuple[int, Result], None, None]:
    """Call a function on every task.

    Args:
        function: of a module of this package, or a `functools.partial` of one; it travels by name.
        tasks: plain values.
        processes: how many; 1 works in this one.
        out: a folder that the tasks write into. `sole_writer` waits there for workers that a killed command has left to end.

    Yields:
        (number of the task, result), in the order in which they are done.

    Raises:
        MmscaleError: raised by a task, or a worker has died.
    """
    count = min(processes, len(tasks))
    if count <= 1:
        for number, task in enumerate(tasks):
            yield number, function(task)
        return
    workers: list[_Worker] = []
    try:
        workers += [_Worker(function, out) for _ in range(count)]
        yield from _share(workers, list(enumerate(tasks))[::-1])
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    """The parent's side of one worker process."""

    def __init__(self, function: Callable[[Any], Any], out: Path) -> None:
        self.connection, far_end = multiprocessing.Pipe()
        with far_end:
            # A session of its own: Ctrl-C reaches the parent alone, which then stops its workers.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "shards.pool", str(far_end.fileno())],
                pass_fds=[far_end.fileno()],
                stdin=subprocess.DEVNULL,
                env=_environment(),
                start_new_session=True,
            )
        self.connection.send((function, out))

    def give(self, task: tuple[int, Any]) -> None:
        try:
            self.connection.send(task)
        except OSError as e:
            raise self.died() from e

    def receive(self) -> Any:
        try:
            return self.connection.recv()
        except (EOFError, OSError) as e:
            raise self.died() from e

    def died(self) -> ShardError:
        code = self._process.wait()
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        cause = " (out of memory? then use fewer `processes`)" if code == -9 else ""
        return ShardError(f"A worker process ended {how}{cause}. Repeat the command; what is finished is kept.")

    def stop(self) -> None:
        self.connection.close()
        self._process.kill()
        self._process.wait()


def _share(workers: list[_Worker], waiting: list[tuple[int, Any]]) -> Generator[tuple[int, Any], None, None]:
    """Hand out the tasks (from the end of the list) as workers become free."""
    busy: dict[Any, _Worker] = {}
    for worker in workers:
        worker.give(waiting.pop())
        busy[worker.connection] = worker
    while busy:
        for connection in wait(list(busy)):
            worker = busy[connection]
            message = worker.receive()
            if waiting and not isinstance(message, MmscaleError):
                worker.give(waiting.pop())
            else:
                del busy[connection]
            if isinstance(message, MmscaleError):
                raise message
            yield message


def _environment() -> dict[str, str]:
    """The parent's environment, in which the worker finds this very package and starts no threads of numeric libraries."""
    path = [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(part for part in path if part)}


def _work(descriptor: int) -> None:
    """The whole life of a worker process."""
    connection: Connection[Any, Any] = Connection(descriptor)
    function, out = connection.recv()
    held = hold_folder(out)
    tasks: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, tasks), daemon=True).start()
    try:
        while True:
            number, task = tasks.get()
            connection.send((number, function(task)))
    except MmscaleError as e:
        connection.send(e)
    except BrokenPipeError:  # the parent is gone
        os._exit(1)
    finally:
        os.close(held)


def _listen(connection: Connection[Any, Any], tasks: queue.SimpleQueue[tuple[int, Any]]) -> None:
    try:
        while True:
            tasks.put(connection.recv())
    except (EOFError, OSError, pickle.UnpicklingError):
        os._exit(1)


if __name__ == "__main__":
    _work(int(sys.argv[1]))
