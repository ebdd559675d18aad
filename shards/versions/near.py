"""Which samples are duplicates: of equal keys all but the first, and of similar looks each that is near an earlier one that stays.

Samples are judged in the order of the manifest. One that is near a sample that stays goes; one that is only near a sample that went
stays. So every sample that goes has one that stays within the distance, and no chain of small steps joins what is far apart.

Shape letters: n samples, u distinct looks, p pairs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from shards.errors import ConfigError
from shards.perceptual import THUMBNAIL_BYTES, thumbnails_differ

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
Flags = npt.NDArray[np.bool_]

MOST_BITS = 12
"""Largest distance that is searched for: beyond it half of all pictures would be alike."""
_MOST_TABLES = 500
_MOST_PAIRS = 1 << 27
_BATCH = 1 << 16
EXACT = -1
"""In place of a distance: the very same picture."""


@dataclass(frozen=True, slots=True)
class Features:
    """What is compared, a row a sample, references first."""

    exact_n2: Words
    """(n, 2) first 16 bytes of a digest of the picture."""
    has_picture_n: Flags
    structure_n: Words
    """`shards.perceptual.Look.structure`."""
    thumbnail_n: pa.ChunkedArray
    """Its thumbnails, which may lie in mapped files: only those of pairs that are sought are touched."""
    thumbnail_digest_n: Words
    """8 bytes of a digest of the thumbnail."""
    has_look_n: Flags
    label_n: Words
    """Only samples of equal labels are compared: a digest of the captions, or zeros."""


def find_duplicates(features: Features, near_bits: int | None, references: int) -> tuple[Ints, npt.NDArray[np.int8]]:
    """Find for each sample the one whose duplicate it is.

    Args:
        features: of all samples.
        near_bits: most bits in which the structure of near duplicates differs; None finds equal pictures only.
        references: so many samples in front are never dropped.

    Returns:
        (n,) the sample that stays in its place, -1 for one that stays itself; (n,) bits that differ, `EXACT` for equal pictures.
    """
    of_n = _first_equal(np.column_stack([features.exact_n2, features.label_n]), features.has_picture_n)
    of_n[:references] = -1
    distance_n = np.full(len(of_n), EXACT, dtype=np.int8)
    if near_bits is not None:
        _add_near(features, near_bits, references, of_n, distance_n)
    return of_n, distance_n


def _add_near(features: Features, near_bits: int, references: int, of_n: Ints, distance_n: npt.NDArray[np.int8]) -> None:
    rows = np.flatnonzero((of_n < 0) & features.has_look_n)
    columns = np.column_stack([features.structure_n[rows], features.thumbnail_digest_n[rows], features.label_n[rows]])
    leader = _first_equal(columns, np.ones(len(rows), dtype=np.bool_))
    # Equal looks are gathered first: a million copies of one picture make one entry here, not 10**12 pairs.
    first_u = np.flatnonzero(leader < 0)
    i_p, j_p, distance_p = _near_pairs(columns[first_u, 0], columns[first_u, 2], near_bits)
    alike_p = _alike(features.thumbnail_n, rows[first_u[i_p]], rows[first_u[j_p]])
    fixed = int(np.searchsorted(rows[first_u], references))
    of_u, distance_u = _first_stays(len(first_u), i_p[alike_p], j_p[alike_p], distance_p[alike_p], fixed=fixed)
    place_u = np.searchsorted(first_u, np.where(leader < 0, np.arange(len(rows)), leader))
    went = of_u[place_u] >= 0
    target = np.where(went, first_u[of_u[place_u]] if len(first_u) else 0, leader)
    found = (target >= 0) & (rows >= references)
    of_n[rows[found]] = rows[target[found]]
    distance_n[rows[found]] = np.where(went, distance_u[place_u], 0)[found]
    # The picture that stands for equal ones may have gone in favour of a near one.
    moved = np.flatnonzero(of_n >= 0)
    moved = moved[of_n[of_n[moved]] >= 0]
    distance_n[moved] = distance_n[of_n[moved]]
    of_n[moved] = of_n[of_n[moved]]


def _first_equal(columns: Words, valid_n: Flags) -> Ints:
    """Return for each valid row the first row that equals it, -1 for that row itself and for those that are not valid."""
    of_n = np.full(len(columns), -1, dtype=np.int64)
    rows = np.flatnonzero(valid_n)
    if not len(rows):
        return of_n
    order = rows[np.lexsort(columns[rows].T)]  # stable: the first of a group of equals comes first
    begins = np.ones(len(order), dtype=np.bool_)
    begins[1:] = (columns[order[1:]] != columns[order[:-1]]).any(axis=1)
    firsts = order[begins][np.cumsum(begins) - 1]
    of_n[order] = np.where(firsts == order, -1, firsts)
    return of_n


def _alike(thumbnail_n: pa.ChunkedArray, i_p: Ints, j_p: Ints) -> Flags:
    """Compare the thumbnails of pairs of samples."""
    alike_p = np.empty(len(i_p), dtype=np.bool_)
    for start in range(0, len(i_p), _BATCH):
        part = slice(start, start + _BATCH)
        alike_p[part] = ~thumbnails_differ(_thumbnails(thumbnail_n, i_p[part]), _thumbnails(thumbnail_n, j_p[part]))
    return alike_p


def _thumbnails(thumbnail_n: pa.ChunkedArray, rows_p: Ints) -> npt.NDArray[np.uint8]:
    taken = pa.concat_arrays(pc.take(thumbnail_n, pa.array(rows_p)).chunks)
    start = taken.offset * THUMBNAIL_BYTES
    return np.frombuffer(taken.buffers()[1], np.uint8)[start : start + len(rows_p) * THUMBNAIL_BYTES].reshape(-1, THUMBNAIL_BYTES)


def _near_pairs(structure_u: Words, label_u: Words, bits: int) -> tuple[Ints, Ints, npt.NDArray[np.int8]]:
    """Find all pairs of entries with equal labels whose structures differ in few bits.

    Words that differ in at most k bits are equal in at least m of k + m bands. So for each choice of m bands the words are sorted by
    these, and only neighbours that are equal in them are compared: nearly linear, and no pair is missed.

    Source: Manku, Jain and Das Sarma 2007, "Detecting near-duplicates for web crawling", for the tables of permuted bands.
    """
    found: list[Words] = []
    total = 0
    for mask in _band_masks(bits, len(structure_u)):
        for i, j in _neighbours(structure_u & np.uint64(mask), label_u):
            close = np.bitwise_count(structure_u[i] ^ structure_u[j]) <= bits
            found.append(np.minimum(i, j)[close].astype(np.uint64) << np.uint64(32) | np.maximum(i, j)[close].astype(np.uint64))
            total += int(close.sum())
        if total > _MOST_PAIRS:
            raise ConfigError(f"`near`={bits} makes more than {_MOST_PAIRS:,} pairs of pictures alike. Give a smaller number.")
    joined = np.unique(np.concatenate([*found, np.empty(0, np.uint64)]))
    i, j = (joined >> np.uint64(32)).astype(np.int64), (joined & np.uint64(0xFFFFFFFF)).astype(np.int64)
    return i, j, np.bitwise_count(structure_u[i] ^ structure_u[j]).astype(np.int8)


def _band_masks(bits: int, count: int) -> Iterator[int]:
    """Yield the bits that are sorted by: as many bands as keep the groups of equal ones small, within a bound on the number of tables."""
    equal = 1
    while 64 * equal // (bits + equal) < math.log2(count + 2) + 1 and math.comb(bits + equal + 1, bits) <= _MOST_TABLES:
        equal += 1
    bands = bits + equal
    edges = [64 * band // bands for band in range(bands + 1)]
    words = [(1 << high) - (1 << low) for low, high in itertools.pairwise(edges)]
    return (sum(words[band] for band in chosen) for chosen in itertools.combinations(range(bands), equal))


def _neighbours(keys_u: Words, label_u: Words) -> Iterator[tuple[Ints, Ints]]:
    """Yield the pairs of entries with equal keys and labels, all those that are d apart in sorted order at once."""
    order = np.lexsort((keys_u, label_u))
    keys, labels = keys_u[order], label_u[order]
    places = np.arange(len(order))
    for apart in itertools.count(1):
        places = places[places + apart < len(order)]
        places = places[(keys[places] == keys[places + apart]) & (labels[places] == labels[places + apart])]
        if not len(places):
            return
        yield order[places], order[places + apart]


def _first_stays(count: int, i_p: Ints, j_p: Ints, distance_p: npt.NDArray[np.int8], *, fixed: int) -> tuple[Ints, npt.NDArray[np.int8]]:
    """Go through the entries in order and drop each that is near one that stays; it counts as a duplicate of the nearest such."""
    of_u, distance_u = np.full(count, -1, dtype=np.int64), np.zeros(count, dtype=np.int8)
    order = np.lexsort((i_p, distance_p, j_p))
    for i, j, distance in zip(i_p[order].tolist(), j_p[order].tolist(), distance_p[order].tolist(), strict=True):
        if j >= fixed and of_u[j] < 0 and of_u[i] < 0:
            of_u[j], distance_u[j] = i, distance
    return of_u, distance_u
