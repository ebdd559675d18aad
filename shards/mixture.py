"""Several data sets in one order: a pure function from a position to a row of one of them. The state of a reader stays one integer.

Positions come in blocks. Every block holds a fixed number of rows of each source, its weight times the size of the block, in a keyed
random arrangement; within a source, rows come in the order that the source has alone, each of its epochs holding every row exactly once.
Weights may change at a position: from there on blocks are laid anew, and every source goes on where it stands.

Shape letters: n positions, k sources, b positions of a block.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from shards.errors import ConfigError
from shards.order import GlobalOrder, Ints, hashed

BLOCK = 65536
"""Positions of a block: weights are kept to this part exactly."""
_LAYOUTS_HELD = 4


@dataclass(frozen=True, slots=True)
class Phase:
    """Weights that hold from a position on."""

    first: int
    """The position."""
    weights: tuple[float, ...]
    """Of each source; any scale, none below 0, not all 0."""


class MixedOrder:
    """The order of a mixture. Its shards are those of all sources, numbered one source after the other.

    Args:
        orders: of each source.
        phases: by rising `first`, the first of them 0.
        seed: another seed is another arrangement of the sources.
        block: positions of a block.

    Raises:
        ConfigError: weights that do not fit the sources or are all 0, or phases that do not rise from 0.
    """

    def __init__(self, orders: Sequence[GlobalOrder], phases: Sequence[Phase], seed: int = 0, *, block: int = BLOCK) -> None:
        _check(len(orders), phases, block)
        self.orders = tuple(orders)
        self.phases = tuple(phases)
        self.seed = seed
        self.block = block
        self.rows = sum(order.rows for order in orders)
        """Rows of all sources."""
        self.rows_k = np.array([order.rows for order in orders], dtype=np.int64)
        self._first_shards_k = np.cumsum([0, *(order.shards for order in orders[:-1])])
        self._firsts = np.array([phase.first for phase in phases], dtype=np.int64)
        self._counts = [block_counts(phase.weights, block) for phase in phases]
        self._layouts: dict[tuple[int, int], tuple[Ints, Ints]] = {}
        self._starts = [np.zeros(len(orders), dtype=np.int64)]
        for number, (phase, following) in enumerate(pairwise(phases)):
            self._starts.append(self._starts[-1] + self._consumed(number, following.first - phase.first))

    @property
    def shards(self) -> int:
        """Shards of all sources."""
        return sum(order.shards for order in self.orders)

    def locate(self, positions: npt.ArrayLike) -> tuple[Ints, Ints, Ints]:
        """Find the rows of some positions.

        Returns:
            (n,) int64 arrays: epochs of the row's own source, shards (numbered over all sources), rows within the shard.

        Raises:
            ValueError: a negative position.
        """
        sources_n, within_n = self.sources(positions)
        epochs_n, shards_n, rows_n = (np.empty_like(within_n) for _ in range(3))
        for source, order in enumerate(self.orders):
            here_n = sources_n == source
            epochs_n[here_n], shards_n[here_n], rows_n[here_n] = order.locate(within_n[here_n])
            shards_n[here_n] += self._first_shards_k[source]
        return epochs_n, shards_n, rows_n

    def sources(self, positions: npt.ArrayLike) -> tuple[Ints, Ints]:
        """Tell which source each position takes from, and its position within that source's own order: (n,) int64 both."""
        positions_n = np.atleast_1d(np.asarray(positions, dtype=np.int64))
        if positions_n.size and positions_n.min() < 0:
            raise ValueError(f"A position must be at least 0; got {positions_n.min()}.")
        phases_n = np.searchsorted(self._firsts, positions_n, side="right") - 1
        blocks_n, slots_n = np.divmod(positions_n - self._firsts[phases_n], self.block)
        sources_n, within_n = np.empty_like(positions_n), np.empty_like(positions_n)
        for phase, block in np.unique(np.stack([phases_n, blocks_n]), axis=1).T.tolist():
            here_n = (phases_n == phase) & (blocks_n == block)
            source_b, rank_b = self._layout(phase, block)
            sources_n[here_n] = source_b[slots_n[here_n]]
            start_k = self._starts[phase] + block * self._counts[phase]
            within_n[here_n] = start_k[sources_n[here_n]] + rank_b[slots_n[here_n]]
        return sources_n, within_n

    def consumed(self, position: int) -> Ints:
        """Count the rows of each source before a position, (k,) int64."""
        phase = int(np.searchsorted(self._firsts, position, side="right")) - 1
        return self._starts[phase] + self._consumed(phase, position - self.phases[phase].first)

    def by_lane(self, first: int, count: int) -> Ints:
        """Return the positions [first, first + count) source by source and lane by lane, as `GlobalOrder.by_lane`."""
        positions_n = np.arange(first, first + count, dtype=np.int64)
        sources_n, within_n = self.sources(positions_n)
        lanes_n = np.empty_like(within_n)
        for source, order in enumerate(self.orders):
            here_n = sources_n == source
            lanes_n[here_n] = order.lane(within_n[here_n])
        return positions_n[np.lexsort((lanes_n, sources_n))]

    def fingerprint(self, seen: int | None = None) -> str:
        """Return the sha256 of everything that the order of the first `seen` positions depends on; None takes all.

        Phases that begin later may be changed: what was read stays what it was.
        """
        past = [[phase.first, *phase.weights] for phase in self.phases if seen is None or phase.first < max(1, seen)]
        identity = [self.block, self.seed, [order.fingerprint() for order in self.orders], past]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def _consumed(self, phase: int, count: int) -> Ints:
        """Count the rows of each source in the first positions of a phase."""
        blocks, rest = divmod(count, self.block)
        source_b, _ = self._layout(phase, blocks)
        consumed_k: Ints = blocks * self._counts[phase] + np.bincount(source_b[:rest], minlength=len(self.orders))
        return consumed_k

    def _layout(self, phase: int, block: int) -> tuple[Ints, Ints]:
        """Return the source of each position of a block, and how many of that source come before it in the block: (b,) both."""
        layout = self._layouts.get((phase, block))
        if layout is None:
            base_b = np.repeat(np.arange(len(self.orders)), self._counts[phase])
            source_b = base_b[np.argsort(hashed(self.seed, 3, (phase, block), self.block), kind="stable")]
            rank_b = np.empty_like(source_b)
            rank_b[np.argsort(source_b, kind="stable")] = np.concatenate([np.arange(count) for count in self._counts[phase]])
            layout = (source_b, rank_b)
            # Replaced, not changed: threads may be reading the old one.
            self._layouts = {**dict(list(self._layouts.items())[1 - _LAYOUTS_HELD :]), (phase, block): layout}
        return layout


def block_counts(weights: Sequence[float], block: int) -> Ints:
    """Share out the positions of a block by weight: largest remainders, and at least one for every weight above 0; (k,) int64."""
    weights_k = np.asarray(weights, dtype=np.float64)
    shares_k = weights_k / weights_k.sum() * block
    counts_k: Ints = np.maximum(np.floor(shares_k), weights_k > 0).astype(np.int64)
    while counts_k.sum() != block:
        step = 1 if counts_k.sum() < block else -1
        # the source whose count is furthest from its share; one that has a single position keeps it
        gain_k = np.where((weights_k > 0) & (counts_k + step > 0), step * (shares_k - counts_k), -np.inf)
        counts_k[np.argmax(gain_k)] += step
    return counts_k


def _check(sources: int, phases: Sequence[Phase], block: int) -> None:
    firsts = [phase.first for phase in phases]
    if not firsts or firsts[0] != 0 or sorted(set(firsts)) != firsts:
        raise ConfigError(f"The phases of a mixture must begin at 0 and rise; got {firsts}.")
    for phase in phases:
        weights = list(phase.weights)
        if len(weights) != sources:
            raise ConfigError(f"A mixture of {sources} sources needs {sources} weights; got {weights}.")
        if not all(np.isfinite(weights)) or min(weights) < 0 or sum(weights) <= 0:
            raise ConfigError(f"The weights of a mixture must be at least 0 and not all 0; got {weights}.")
        if sum(weight > 0 for weight in weights) > block:
            raise ConfigError(f"A mixture has at most {block} sources; got {sources}.")
