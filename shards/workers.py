"""Writer processes: started as plain commands, so that a caller's script needs no `__main__` guard and none outlives its parent.

Each worker has a socket to its parent. It reads tasks from it in a thread of its own: when the parent is gone, however it went,
that thread sees the end of the stream and ends the process. A shard that was being written then simply is not there.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from shards.commit import remove_leftovers
from shards.config import WriteConfig
from shards.errors import MmscaleError, ShardError
from shards.plan import ShardTask
from shards.shard_writer import ShardResult, ShardWriter


def run_tasks(
    config: WriteConfig, tasks: Iterator[ShardTask], processes: int, report: Callable[[int], None]
) -> Generator[ShardResult, None, None]:
    """Write shards with so many processes; 1 works in this one.

    Args:
        config: of all of them.
        tasks: the shards to write; each is asked for when a process is free to write it.
        processes: how many; not more than there are tasks.
        report: called with numbers of samples done.

    Yields:
        The results, in the order in which the shards get finished.

    Raises:
        ShardError: a shard cannot be written, or a worker has died.
        SourceError: the source cannot be read any more.
    """
    if processes <= 1:
        writer = ShardWriter(config)
        for task in tasks:
            yield writer.write(task, report)
        return
    workers: list[_Worker] = []
    try:
        first = list(itertools.islice(tasks, processes))
        workers += [_Worker(config) for _ in first]
        for worker, task in zip(workers, first, strict=True):  # a task is larger than a pipe's buffer: giving waits for the worker's start
            worker.give(task)
        yield from _share(workers, tasks, report)
    finally:
        for worker in workers:
            worker.stop()
        remove_leftovers(Path(config.out))  # of those that were in the middle of a shard


class _Worker:
    """The parent's side of one worker process."""

    def __init__(self, config: WriteConfig) -> None:
        self.task: ShardTask | None = None
        self.connection, far_end = multiprocessing.Pipe()
        with far_end:
            # A session of its own: Ctrl-C reaches the parent alone, which then stops its workers.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "shards.workers", str(far_end.fileno())],
                pass_fds=[far_end.fileno()],
                stdin=subprocess.DEVNULL,
                env=_environment(),
                start_new_session=True,
            )
        self.connection.send(config)

    def give(self, task: ShardTask) -> None:
        self.task = task
        try:
            self.connection.send(task)
        except OSError as e:
            raise self.died() from e

    def died(self) -> ShardError:
        code = self._process.wait()
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        cause = " (out of memory? then use fewer `processes`)" if code == -9 else ""
        name = self.task.name if self.task else "none"
        return ShardError(f"A writer process ended {how}{cause} at the shard {name!r}. Repeat the command; finished shards are kept.")

    def stop(self) -> None:
        self.connection.close()
        self._process.kill()
        self._process.wait()


def _share(workers: list[_Worker], waiting: Iterator[ShardTask], report: Callable[[int], None]) -> Iterator[ShardResult]:
    """Hand out the tasks as workers become free."""
    busy: dict[Connection[Any, Any], _Worker] = {worker.connection: worker for worker in workers}
    while busy:
        for connection in wait(list(busy)):
            worker = busy[connection]  # type: ignore[index]
            message = _receive(worker)
            if isinstance(message, int):
                report(message)
                continue
            if isinstance(message, MmscaleError):
                raise message
            yield message
            following = next(waiting, None)
            if following is None:
                del busy[worker.connection]
            else:
                worker.give(following)


def _receive(worker: _Worker) -> Any:
    try:
        return worker.connection.recv()
    except (EOFError, OSError) as e:
        raise worker.died() from e


def _environment() -> dict[str, str]:
    """The parent's environment, in which the worker finds this very package, starts no threads and keeps the memory of decoded images.

    Given back to the system after each image and taken again, page by page, that memory costs 7 % of the time of a photo of 640 x 480.
    """
    path = [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
    memory = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(256 << 20), "MALLOC_TOP_PAD_": str(64 << 20)}
    return {**memory, **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(part for part in path if part)}


def _work(descriptor: int) -> None:
    """The whole life of a worker process."""
    connection: Connection[Any, Any] = Connection(descriptor)
    config: WriteConfig = connection.recv()
    tasks: queue.SimpleQueue[ShardTask] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, tasks), daemon=True).start()
    try:
        writer = ShardWriter(config)
        while True:
            connection.send(writer.write(tasks.get(), connection.send))
    except MmscaleError as e:
        connection.send(e)
    except OSError:  # the parent is gone
        os._exit(1)


def _listen(connection: Connection[Any, Any], tasks: queue.SimpleQueue[ShardTask]) -> None:
    try:
        while True:
            tasks.put(connection.recv())
    except (EOFError, OSError, pickle.UnpicklingError):
        os._exit(1)


if __name__ == "__main__":
    _work(int(sys.argv[1]))
