"""Keys of many rows at once: derived without a Python object a row, and found when they repeat with a few bytes a row."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from shards.sources.record import MAX_KEY_BYTES, safe_key

Hashes = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.int64]

# Cells that need no more than these replacements to be keys; every other one goes through safe_key.
_PLAIN_PATH = r"^[A-Za-z0-9][A-Za-z0-9_~-]*(/[A-Za-z0-9_~-]+)*\.[A-Za-z0-9]+$"
_PLAIN_KEY = r"^[A-Za-z0-9][A-Za-z0-9_~-]*$"
_CHUNK_ROWS = 1 << 20
_NUMBERED = r"^(?P<base>.*)-(?P<number>[2-9]|[1-9][0-9]{1,8})$"
# A random word for each letter at each place; the hash of a key is the sum of its letters' words.
_TABLE: Hashes = np.frombuffer(hashlib.shake_256(b"keys").digest(8 * 256 * MAX_KEY_BYTES), np.uint64)


def keys_of_paths(cells: pa.Array, fallback: Sequence[str]) -> pa.Array:
    """Derive keys from image paths, as `safe_key` does from a path without its extension.

    Args:
        cells: (n,) strings.
        fallback: (n,) names of the rows whose cell names no file.

    Returns:
        (n,) strings.
    """
    plain = pc.replace_substring(pc.replace_substring_regex(cells, r"\.[A-Za-z0-9]+$", ""), "/", "__")
    return _complete(cells, plain, _PLAIN_PATH, lambda i, cell: key_of_path(cell, fallback[i]))


def keys_of_cells(cells: pa.Array) -> pa.Array:
    """Turn the cells of a key column into keys; an empty one stays null."""
    if not (pa.types.is_string(cells.type) or pa.types.is_integer(cells.type)):
        cells = pa.array([None if value is None else str(value) for value in cells.to_pylist()], pa.string())
    cells = cells.cast(pa.string())
    return _complete(cells, cells, _PLAIN_KEY, lambda _, cell: safe_key(cell) if cell else None)


def key_of_path(cell: str | None, fallback: str) -> str:
    """Derive the key of one row from its image path."""
    path = (cell or "").strip()
    named = bool(path) and bool(Path(path).name)
    return safe_key(str(Path(path).with_suffix("")).lstrip("/") if named else fallback)


def _complete(cells: pa.Array, plain: pa.Array, pattern: str, odd_key: Any) -> pa.Array:
    """Take the plain keys where the cells match the pattern and make the others one by one."""
    fits = pc.and_(pc.match_substring_regex(cells, pattern), pc.less_equal(pc.binary_length(plain), MAX_KEY_BYTES)).fill_null(False)
    odd = np.flatnonzero(~fits.to_numpy(zero_copy_only=False))
    if not len(odd):
        return plain
    made: list[str | None] = [None] * len(cells)
    for i, cell in zip(odd.tolist(), cells.take(pa.array(odd)).to_pylist(), strict=True):
        made[i] = odd_key(i, cell)
    return pc.if_else(fits, plain, pa.array(made, pa.string()))


def hash_keys(keys: pa.Array) -> Hashes:
    """Hash keys of at most 80 bytes: (n,) strings without nulls to (n,) words. Of 1e8 keys two collide with a probability of 3e-4."""
    keys = pa.concat_arrays([keys]).cast(pa.string())
    if not len(keys):
        return np.empty(0, np.uint64)
    _, offsets, text = keys.buffers()
    ends = np.frombuffer(offsets, np.int32)[keys.offset : keys.offset + len(keys) + 1].astype(np.int64)
    letters = np.frombuffer(text, np.uint8)[ends[0] : ends[-1]] if text is not None else np.empty(0, np.uint8)
    starts, lengths = ends[:-1] - ends[0], np.diff(ends)
    places = np.arange(len(letters)) - np.repeat(starts, lengths)
    words = np.concatenate([_TABLE[places * 256 + letters], np.zeros(1, np.uint64)])  # the last: a start may lie at the very end
    sums: Hashes = np.where(lengths > 0, np.add.reduceat(words, starts), np.uint64(0))
    return sums + lengths.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)


class Repeats:
    """Which rows share a key, found from the hashes of all: 16 bytes a row meanwhile, afterwards nothing of a row with a key of its own.

    Args:
        hashes_n: (n,) words, one a row, in order.
        numbered: for each key of the form `BASE-7`, hash of its base and the number; needed to number repeated keys.
    """

    def __init__(self, hashes_n: Hashes, numbered: tuple[Hashes, Rows] | None = None) -> None:
        sorted_n = np.sort(hashes_n)
        repeated = np.unique(sorted_n[1:][sorted_n[1:] == sorted_n[:-1]])
        del sorted_n
        self._rows = _rows_of(hashes_n, repeated)
        """Rows that share their key, in order."""
        values = hashes_n[self._rows]
        order = np.argsort(values, kind="stable")
        _, starts, groups, sizes = np.unique(values[order], return_index=True, return_inverse=True, return_counts=True)
        self._grouped = self._rows[order]
        """The same, key by key."""
        self._starts, self._sizes = starts, sizes
        self._group = np.empty(len(order), np.int64)
        self._group[order] = groups
        self._rank = np.empty(len(order), np.int64)
        self._rank[order] = np.arange(len(order)) - starts[groups] + 1 if len(order) else 0
        self._taken = _taken_numbers(repeated, numbered) if numbered is not None else {}

    def rank(self, row: int) -> int:
        """Which of the rows of its key a row is, from 1; 0 if it is the only one."""
        place = self._place(row)
        return 0 if place is None else int(self._rank[place])

    def sharing(self, row: int) -> Rows:
        """Return all rows of the key of a row that shares it."""
        place = self._place(row)
        if place is None:
            return np.asarray([row], dtype=np.int64)
        start = self._starts[self._group[place]]
        return self._grouped[start : start + self._sizes[self._group[place]]]

    def _place(self, row: int) -> int | None:
        place = int(np.searchsorted(self._rows, row))
        return place if place < len(self._rows) and self._rows[place] == row else None

    def number(self, row: int, key: str) -> str:
        """Give a row its own key: the second row of `cat` is `cat-2`, unless another key is that already."""
        number = self.rank(row)
        if number < 2:
            return key
        if self._taken:
            for taken in self._taken.get(int(hash_keys(pa.array([key]))[0]), ()):
                number += taken <= number
        return safe_key(f"{key}-{number}")


def numbered_keys(keys: pa.Array) -> tuple[Hashes, Rows]:
    """Hashes of the bases and the numbers of the keys that look as if they had been numbered."""
    found = pc.drop_null(pc.extract_regex(keys, _NUMBERED))
    return hash_keys(found.field("base")), found.field("number").cast(pa.int64()).to_numpy()


def _rows_of(hashes_n: Hashes, wanted: Hashes) -> Rows:
    """Numbers of the rows whose hash is among some, which are sorted."""
    if not len(wanted):
        return np.empty(0, np.int64)
    found = []
    for start in range(0, len(hashes_n), _CHUNK_ROWS):
        chunk = hashes_n[start : start + _CHUNK_ROWS]
        places = np.minimum(np.searchsorted(wanted, chunk), len(wanted) - 1)
        found.append(np.flatnonzero(wanted[places] == chunk) + start)
    return np.concatenate(found)


def _taken_numbers(repeated: Hashes, numbered: tuple[Hashes, Rows]) -> dict[int, list[int]]:
    taken: dict[int, set[int]] = defaultdict(set)
    hit = np.isin(numbered[0], repeated)
    for base, number in zip(numbered[0][hit].tolist(), numbered[1][hit].tolist(), strict=True):
        taken[base].add(number)
    return {base: sorted(numbers) for base, numbers in taken.items()}
