"""One event loop a process, in a thread of its own, on which all requests run: there they can be timed, doubled and called off."""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

JOIN_S = 5.0
"""How long the end of the interpreter waits for the thread."""


class _Loop:
    def __init__(self) -> None:
        self.pid = os.getpid()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="store", daemon=True)
        self.thread.start()

    def close(self) -> None:
        """Call everything off while the interpreter is still whole: a library's thread that comes back later would crash it."""
        if self.pid != os.getpid() or not self.thread.is_alive():
            return
        self.loop.call_soon_threadsafe(self._cancel_all)
        self.thread.join(JOIN_S)

    def _cancel_all(self) -> None:
        tasks = asyncio.all_tasks(self.loop)
        for task in tasks:
            task.cancel()
        ended = asyncio.gather(*tasks, return_exceptions=True)
        ended.add_done_callback(lambda _: self.loop.stop())


_lock = threading.Lock()
_current: list[_Loop] = []


def submit(work: Coroutine[Any, Any, T]) -> Future[T]:
    """Start a coroutine on the loop."""
    return asyncio.run_coroutine_threadsafe(work, _loop())


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on the loop and wait for it; an interrupted wait calls it off."""
    future = submit(work)
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


def _loop() -> asyncio.AbstractEventLoop:
    with _lock:
        if not _current or _current[0].pid != os.getpid():  # a forked child has no thread of its parent's
            _current[:] = [_Loop()]
            atexit.register(_current[0].close)
        return _current[0].loop


def _forget() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_forget)
