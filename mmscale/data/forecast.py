"""Which shards a rank will need next: the order is known for ever, so a cache can fetch ahead and evict what is needed last."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np

from shards.mixture import MixedOrder
from shards.order import GlobalOrder

STEPS_AHEAD = 1000
"""Steps looked ahead. A step costs locating one rank's share of it."""


class Forecast:
    """Follows a rank through its steps, so many steps ahead of it.

    Args:
        order: of the data set.
        steps: this rank's positions of each step that is left, a sequence a micro-step.
        ahead: steps looked ahead.
    """

    def __init__(self, order: GlobalOrder | MixedOrder, steps: Iterable[Sequence[Sequence[int]]], ahead: int = STEPS_AHEAD) -> None:
        self._order = order
        self._steps: Iterator[Sequence[Sequence[int]]] = iter(steps)
        self._window: deque[list[int]] = deque(self._located(ahead))

    def upcoming(self) -> list[int]:
        """Return the shards of the steps ahead, each once, in order of next use."""
        return list(dict.fromkeys(shard for shards in self._window for shard in shards))

    def advance(self, steps: int = 1) -> None:
        """Leave steps behind that are done."""
        for _ in range(min(steps, len(self._window))):
            self._window.popleft()
        self._window.extend(self._located(steps))

    def _located(self, steps: int) -> Iterator[list[int]]:
        """Yield the shards of further steps, in the order in which a rank meets them."""
        for micro in islice(self._steps, steps):
            positions = np.concatenate([np.asarray(part, dtype=np.int64) for part in micro])
            shards = self._order.locate(positions)[1]
            yield list(dict.fromkeys(shards.tolist()))
