"""Fetches what a node will need next into its cache, in a thread that dies with its process."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError

from shards.errors import DataError

logger = logging.getLogger(__name__)


class Prefetcher:
    """Keeps the first of the coming objects in the cache.

    A failure is logged and no more: whoever reads that shard meets it and says so.

    Args:
        fetch: makes sure that the object at a place of the current future is cached.
    """

    def __init__(self, fetch: Callable[[int], None]) -> None:
        self._fetch = fetch
        self._changed = threading.Condition()
        self._count = self._version = 0
        self._pid = 0

    def start(self, count: int) -> None:
        """Begin anew with the first so many objects of a future that has changed."""
        if self._pid != os.getpid():  # the first call in this process
            self._pid, self._changed = os.getpid(), threading.Condition()
            threading.Thread(target=self._run, name="prefetch", daemon=True).start()
        with self._changed:
            self._count = count
            self._version += 1
            self._changed.notify()

    def _run(self) -> None:
        done = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda seen=done: self._version != seen)  # type: ignore[misc]
                done, places = self._version, range(self._count)
            self._fetch_all(places, done)

    def _fetch_all(self, places: Sequence[int], version: int) -> None:
        for place in places:
            if self._version != version:
                return
            try:
                self._fetch(place)
            except CancelledError:
                return  # the interpreter ends
            except (OSError, DataError) as e:
                logger.warning("A shard could not be fetched ahead: %s", e)
