"""The global order of a data set: a pure function from a position to (epoch, shard, row).

Positions 0, 1, 2, ... run through epoch after epoch; each epoch holds every row exactly once. Nothing is stored but the number of rows of
each shard, so the state of any reader is one integer, whatever the number of ranks and workers.

An epoch lays its shards end to end in a random order and cuts that line into `lanes` equal parts. Position p of the epoch takes the next
row of lane p % lanes, so that a batch mixes rows from all over the data set while each lane moves slowly through few shards. Inside a
lane, blocks of `block` rows are permuted by a keyed bijection, so that finding one row costs neither memory nor a pass over the others.

Shape letters: n positions, s shards.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np
import numpy.typing as npt

from shards.errors import ConfigError, ShardError

ORDER_VERSION = 2
"""Raised whenever the same arguments would give another order."""
LANES = 1024
SHORTEST_BLOCK, LONGEST_BLOCK = 8192, 131_072
"""A block is as long as makes the rows in use, lanes x block over the whole cluster, a 64th of the data set, within these bounds: what
caches hold, and how far apart two rows of a shard may come. Data sets of up to 8.4 million rows are in use as a whole."""
WHOLE = 65536
"""Rows up to which a data set is shuffled as one block, into any permutation of it."""

Ints = npt.NDArray[np.int64]
_Words = npt.NDArray[np.uint64]

_ROUNDS = 8
_LEAST_BITS = 6  # a network over fewer bits does not reach all permutations of a handful of rows equally often
_EPOCHS_HELD = 4
_MASK_64 = (1 << 64) - 1


class GlobalOrder:
    """Where each position of the endless stream of samples lies.

    Args:
        rows_per_shard: rows of each shard, in manifest order; zeros are allowed.
        seed: another seed is another order.
        lanes: most lanes of an epoch; no lane gets less than block / 8 rows.
        block: rows that are shuffled among each other inside a lane; None is a 64th of a lane, within bounds.
        whole: data sets of at most so many rows are one lane and one block.
        shuffle: False gives manifest order, row after row, for evaluation.

    Raises:
        ShardError: there are no rows.
        ConfigError: lanes or block below 1.
    """

    def __init__(
        self,
        rows_per_shard: npt.ArrayLike,
        seed: int = 0,
        *,
        lanes: int = LANES,
        block: int | None = None,
        whole: int = WHOLE,
        shuffle: bool = True,
    ) -> None:
        if lanes < 1 or (block is not None and block < 1):
            raise ConfigError(f"`lanes` and `block` of the order must be at least 1; got {lanes} and {block}.")
        self._rows_s = np.asarray(rows_per_shard, dtype=np.int64)
        self.rows = int(self._rows_s.sum())
        """Rows of an epoch."""
        if self.rows == 0:
            raise ShardError(f"The data set holds no rows in its {len(self._rows_s)} shards: there is nothing to read.")
        self.seed = seed
        if block is None:
            block = min(max(self.rows // (64 * lanes), SHORTEST_BLOCK), LONGEST_BLOCK)
        small = self.rows <= max(block, whole)
        self.block = max(block, self.rows) if small else block
        """Rows of a block as it turned out for this many rows."""
        self.shuffle = shuffle
        self.lanes = 1 if small else min(lanes, self.rows // max(1, block // 8))
        """Lanes of an epoch as they turned out for this many rows."""
        self._lines: dict[int, tuple[Ints, Ints]] = {}

    @property
    def shards(self) -> int:
        """Shards of the data set, empty ones included."""
        return len(self._rows_s)

    def locate(self, positions: npt.ArrayLike) -> tuple[Ints, Ints, Ints]:
        """Find the rows of some positions.

        Args:
            positions: (n,) int64 from 0 to 2**62, in any order.

        Returns:
            (n,) int64 arrays: epochs, shards (an index into `rows_per_shard`), rows within the shard.

        Raises:
            ValueError: a negative position.
        """
        positions_n = np.atleast_1d(np.asarray(positions, dtype=np.int64))
        if positions_n.size and positions_n.min() < 0:
            raise ValueError(f"A position must be at least 0; got {positions_n.min()}.")
        epochs_n, within_n = np.divmod(positions_n, self.rows)
        places_n = self._shuffled(epochs_n, within_n) if self.shuffle else within_n
        shards_n, rows_n = np.empty_like(places_n), np.empty_like(places_n)
        for epoch in _distinct(epochs_n):
            here_n = epochs_n == epoch
            order_s, ends_s = self._line(int(epoch))
            slots = np.searchsorted(ends_s, places_n[here_n], side="right")
            shards_n[here_n] = order_s[slots]
            rows_n[here_n] = places_n[here_n] - (ends_s[slots] - self._rows_s[order_s[slots]])
        return epochs_n, shards_n, rows_n

    def by_lane(self, first: int, count: int) -> Ints:
        """Return the positions [first, first + count) lane by lane, so that contiguous parts of them stay within few shards.

        A step's positions are shared out in this order: a rank then meets the same lanes step after step, and a shard is needed by the
        few ranks whose parts hold its lane instead of by all. Epochs number their lanes alike.

        Returns:
            (count,) int64, a permutation of the range.
        """
        positions_n = np.arange(first, first + count, dtype=np.int64)
        return positions_n[np.argsort(self.lane(positions_n), kind="stable")]

    def lane(self, positions_n: Ints) -> Ints:
        """Return the lane of each position, (n,) int64."""
        return positions_n % self.rows % self.lanes if self.shuffle else np.zeros_like(positions_n)

    def fingerprint(self, seen: int | None = None) -> str:
        """Return the sha256 of everything that the order depends on; two orders are equal if and only if this is.

        Args:
            seen: what a mixture may leave out of account; here nothing depends on it.
        """
        identity = [ORDER_VERSION, self.seed, self.lanes, self.block, self.shuffle, len(self._rows_s)]
        return hashlib.sha256(json.dumps(identity).encode() + self._rows_s.astype("<i8").tobytes()).hexdigest()

    def _line(self, epoch: int) -> tuple[Ints, Ints]:
        """Return the shards of an epoch in the order in which they are laid end to end, and where each ends: (s,) both."""
        line = self._lines.get(epoch if self.shuffle else 0)
        if line is None:
            order_s = np.arange(len(self._rows_s))
            if self.shuffle:
                # Sorting hashes is a uniform permutation that, unlike numpy's own, stays the same in every version of numpy.
                order_s = np.argsort(hashed(self.seed, 1, (epoch,), len(order_s)), kind="stable")
            line = (order_s, np.cumsum(self._rows_s[order_s]))
            # Replaced, not changed: threads may be reading the old one.
            self._lines = {**dict(list(self._lines.items())[1 - _EPOCHS_HELD :]), epoch if self.shuffle else 0: line}
        return line

    def _shuffled(self, epochs_n: Ints, within_n: Ints) -> Ints:
        """Map positions within an epoch to places on its line of shards."""
        lane_n, step_n = within_n % self.lanes, within_n // self.lanes
        short, longer = divmod(self.rows, self.lanes)  # the first `longer` lanes have one row more
        start_n = lane_n * short + np.minimum(lane_n, longer)
        length_n = short + (lane_n < longer)
        block_n = step_n // self.block
        size_n = np.minimum(self.block, length_n - block_n * self.block)
        keys_n = _start(self.seed, len(within_n), 2)
        for coordinate_n in (epochs_n, lane_n, block_n):
            keys_n = _absorb(keys_n, coordinate_n)
        return start_n + block_n * self.block + _permute(step_n - block_n * self.block, size_n, keys_n)


def _distinct(values_n: Ints) -> Ints:
    """The values once each, ascending; np.unique imports all of numpy.ma first, 20 ms before the first sample."""
    sorted_n = np.sort(values_n)
    is_first_n = np.concatenate([np.ones(min(1, len(sorted_n)), dtype=bool), sorted_n[1:] != sorted_n[:-1]])
    distinct: Ints = sorted_n[is_first_n]
    return distinct


def _permute(values_n: Ints, sizes_n: Ints, keys_n: _Words) -> Ints:
    """Apply to each value in [0, size) the bijection of that range which its key names.

    A Feistel network permutes the next power of two; values that fall outside the range are sent through again until they are inside.

    Source: Black and Rogaway 2002, "Ciphers with arbitrary finite domains", methods "cycle-walking" and "generalized-Feistel".
    """
    bits_n = np.frexp((sizes_n - 1).astype(np.float64))[1].astype(np.uint64)  # bit length; sizes are far below 2**53
    bits_n = np.maximum(bits_n, np.uint64(_LEAST_BITS))
    x_n, limits_n = values_n.astype(np.uint64), sizes_n.astype(np.uint64)
    open_n = np.arange(len(x_n))
    while open_n.size:
        x_n[open_n] = _feistel(x_n[open_n], bits_n[open_n], keys_n[open_n])
        open_n = open_n[x_n[open_n] >= limits_n[open_n]]
    return x_n.astype(np.int64)


def _feistel(x_n: _Words, bits_n: _Words, keys_n: _Words) -> _Words:
    """Permute [0, 2**bits) by alternately adding a hash of the one half of the bits to the other."""
    right_bits_n = (bits_n + np.uint64(1)) >> np.uint64(1)
    right_mask_n = (np.uint64(1) << right_bits_n) - np.uint64(1)
    left_mask_n = (np.uint64(1) << (bits_n - right_bits_n)) - np.uint64(1)
    left_n, right_n = x_n >> right_bits_n, x_n & right_mask_n
    for number in range(_ROUNDS):
        round_keys_n = keys_n + np.uint64(0x9E3779B97F4A7C15 * (number + 1) & _MASK_64)
        if number % 2:
            right_n = right_n ^ (_mix(round_keys_n ^ left_n) & right_mask_n)
        else:
            left_n = left_n ^ (_mix(round_keys_n ^ right_n) & left_mask_n)
    joined_n: _Words = (left_n << right_bits_n) | right_n
    return joined_n


def hashed(seed: int, purpose: int, coordinates: tuple[int, ...], count: int) -> _Words:
    """Return (count,) uint64 hashes of 0, 1, ... under a seed, a purpose and coordinates: sorting by them is a random permutation."""
    keys_n = _start(seed, count, purpose)
    for coordinate in coordinates:
        keys_n = _absorb(keys_n, np.full(count, coordinate))
    return _absorb(keys_n, np.arange(count))


def _start(seed: int, count: int, purpose: int) -> _Words:
    """Return (count,) equal keys for a seed; each purpose has its own."""
    return _mix(np.full(count, (seed * 0xD1342543DE82EF95 + purpose) & _MASK_64, dtype=np.uint64))


def _absorb(keys_n: _Words, values_n: Ints) -> _Words:
    """Make the keys depend on one more value each."""
    return _mix(keys_n ^ _mix(values_n.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)))


def _mix(words_n: _Words) -> _Words:
    """Hash 64-bit words one to one.

    Source: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", with Stafford's variant 13.
    """
    words_n = (words_n ^ (words_n >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words_n = (words_n ^ (words_n >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words_n ^ (words_n >> np.uint64(31))
