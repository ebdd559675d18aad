"""`mmscale shards dedup`: a version of a data set without pictures that are there before, or that another data set holds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from shards.configfile import to_plain
from shards.errors import ConfigError
from shards.manifest import Manifest, ShardInfo, read_manifest, sidecar_path, write_manifest
from shards.mask import kept_rows, narrow
from shards.pool import run
from shards.progress import Progress
from shards.sidecar import read_index
from shards.versions.drops import parquet_table
from shards.versions.features import FeatureTask, read_features, write_features
from shards.versions.filter import process_count
from shards.versions.near import EXACT, MOST_BITS, find_duplicates
from shards.versions.sole import sole_writer
from shards.versions.version import copy_tokenizer, derived_info, new_version

DUPLICATES_NAME = "duplicates.parquet"
SHEET_NAME = "near-duplicates.png"
FEATURES_FOLDER = "features"
_DUPLICATES = pa.schema(
    [
        pa.field("shard", pa.string(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("of_data_set", pa.string()),
        pa.field("of_shard", pa.string(), nullable=False),
        pa.field("of_key", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("distance", pa.int32(), nullable=False),
    ]
)
_GROUPS, _MEMBERS = 24, 9

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class DedupConfig:
    """What `mmscale shards dedup` is told."""

    out: str = "???"
    """Folder that receives the version: a manifest pointing at the tars where they lie, duplicates.parquet and near-duplicates.png."""
    near: int | None = None
    """Bits of 64 in which the looks of near duplicates differ at most, 0 to 12, such as 4; null drops only the very same pictures."""
    by: Literal["image", "pair"] = "image"
    """image: equal pictures are duplicates whatever their captions; pair: only if the captions are equal too, or without captions
    the fields of their json."""
    against: list[str] = field(default_factory=list)
    """Data sets whose pictures are dropped from this one, such as the test sets; they themselves stay as they are."""
    features: str | None = None
    """Folder of what has been computed of each shard, to be shared by several runs; null is OUT/features."""
    processes: int | None = None
    """Processes that decode pictures; 1 works in this one, null takes the CPUs this process may use."""

    def check(self) -> None:
        """Check what types alone cannot say.

        Raises:
            ConfigError: a value out of range.
        """
        if self.near is not None and not 0 <= self.near <= MOST_BITS:
            raise ConfigError(f"`near` must be 0 to {MOST_BITS} bits; got {self.near}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class DedupSummary:
    """What was found."""

    kept: int
    rows: int
    """Samples before."""
    exact: int
    """Dropped as the very same picture as another."""
    near: int
    """Dropped as nearly the same."""
    out: Path
    digest: str
    seconds: float

    def __str__(self) -> str:
        """Give one line for people."""
        dropped = f"{self.exact:,} exact and {self.near:,} near duplicates dropped"
        return (
            f"{self.kept:,} of {self.rows:,} samples kept, {dropped}; {str(self.out)!r}, version {self.digest[:12]}, {self.seconds:.1f} s"
        )


def dedup_data_set(folder: str | Path, config: DedupConfig, *, progress: bool = True) -> DedupSummary:
    """Make a version of a data set without duplicates: of each kind the first in the order of the manifest stays. No tar is written.

    Args:
        folder: the data set.
        config: what counts as a duplicate, and where the version goes.
        progress: report on stderr.

    Raises:
        ConfigError: settings that cannot be, or an `out` that holds something else.
        ShardError, IntegrityError: a data set cannot be read.
    """
    started = time.monotonic()
    config.check()
    base, out = read_manifest(folder), Path(config.out)
    references = [read_manifest(path) for path in config.against]
    for path, reference in zip(config.against, references, strict=True):
        if reference.digest == base.digest:
            raise ConfigError(f"`against`: {path!r} is the data set itself: nothing would stay. Name other ones.")
    settings = {name: to_plain(config)[name] for name in ("near", "by")}
    with new_version(out, "dedup", [base, *references], settings):
        folder = Path(config.features) if config.features is not None else out / FEATURES_FOLDER
        tasks = [
            FeatureTask(base=manifest.folder, info=info, folder=folder, looks=config.near is not None)
            for manifest in (*references, base)
            for info in manifest.shards
        ]
        with sole_writer(folder):
            for leftover in folder.glob(".*.tmp"):
                leftover.unlink()
            _compute(tasks, folder, process_count(config.processes), shown=progress)
        features = read_features(tasks, labels=config.by == "pair")
        of_n, distance_n = find_duplicates(features, config.near, sum(reference.rows for reference in references))
        places = _Places([*references, base])
        _report(places, of_n, distance_n, out)
        copy_tokenizer(base.folder, out)
        version = write_manifest(out, _masked(base, of_n[len(of_n) - base.rows :] < 0, out))
    exact = int(((of_n >= 0) & (distance_n == EXACT)).sum())
    return DedupSummary(
        kept=version.rows,
        rows=base.rows,
        exact=exact,
        near=int((of_n >= 0).sum()) - exact,
        out=out,
        digest=version.digest,
        seconds=time.monotonic() - started,
    )


def _compute(tasks: Sequence[FeatureTask], folder: Path, processes: int, *, shown: bool) -> None:
    """Go through the shards that no earlier command has gone through."""
    missing = [task for task in tasks if not task.path.exists()]
    rows = sum(task.info.rows for task in tasks)
    with (
        Progress(rows, rows - sum(task.info.rows for task in missing), shown=shown, doing="hashing") as bar,
        closing(run(write_features, missing, processes, out=folder)) as results,
    ):
        for number, _ in results:
            bar.advance(missing[number].info.rows)


def _masked(base: Manifest, stays: npt.NDArray[np.bool_], out: Path) -> list[ShardInfo]:
    """Return the shards of the version, without those of which nothing stays."""
    ends = np.cumsum(base.rows_per_shard)
    infos = []
    for info, end in zip(base.shards, ends.tolist(), strict=True):
        stay = stays[end - info.rows : end]
        if stay.any():
            tar_rows = read_index(sidecar_path(info.tar(base.folder))).num_rows
            infos.append(derived_info(base.folder, info, out, narrow(info.mask, tar_rows, info.shard, stay)))
    return infos


class _Places:
    """Where the samples of several data sets lie that are counted one after another."""

    def __init__(self, manifests: Sequence[Manifest]) -> None:
        self._manifests = manifests
        self._of_shard = [(number, shard) for number, manifest in enumerate(manifests) for shard in range(len(manifest.shards))]
        self._ends = np.cumsum(np.concatenate([manifest.rows_per_shard for manifest in manifests]))

    def locate(self, row: int) -> tuple[Manifest, ShardInfo, int]:
        """Return data set, shard and kept row of a sample."""
        number = int(np.searchsorted(self._ends, row, side="right"))
        manifest, info = self.shard(number)
        return manifest, info, row - int(self._ends[number]) + info.rows

    def shard(self, number: int) -> tuple[Manifest, ShardInfo]:
        """Return a shard by its number over all data sets."""
        of, shard = self._of_shard[number]
        return self._manifests[of], self._manifests[of].shards[shard]

    def names(self, rows_d: Ints) -> list[tuple[str | None, str, str]]:
        """Return (data set, shard, key) of (d,) sorted samples; the data set is None for the last one, which is looked through."""
        names: list[tuple[str | None, str, str]] = []
        numbers_d = np.searchsorted(self._ends, rows_d, side="right")
        for number in np.unique(numbers_d).tolist():
            manifest, info = self.shard(number)
            keys = read_index(sidecar_path(info.tar(manifest.folder)))["key"]
            kept = kept_rows(info.mask, len(keys), info.shard)
            here = kept[rows_d[numbers_d == number] - int(self._ends[number]) + info.rows]
            data_set = None if manifest is self._manifests[-1] else str(manifest.folder)
            names += [(data_set, info.shard, key) for key in pc.take(keys, pa.array(here)).to_pylist()]
        return names


def _report(places: _Places, of_n: Ints, distance_n: npt.NDArray[np.int8], out: Path) -> None:
    """Write which sample was dropped in favour of which, and draw the largest groups of near ones."""
    dropped = np.flatnonzero(of_n >= 0)
    wanted = np.unique(np.concatenate([dropped, of_n[dropped]]))
    names = places.names(wanted)
    with parquet_table(out / DUPLICATES_NAME, _DUPLICATES) as table:
        for row in dropped.tolist():
            _, shard, key = names[int(np.searchsorted(wanted, row))]
            of_data_set, of_shard, of_key = names[int(np.searchsorted(wanted, of_n[row]))]
            kind = {"kind": "exact" if distance_n[row] == EXACT else "near", "distance": max(0, int(distance_n[row]))}
            table.add([{"shard": shard, "key": key, "of_data_set": of_data_set, "of_shard": of_shard, "of_key": of_key, **kind}])
    from shards.versions.contact_sheet import Group, draw_groups  # matplotlib, by way of the report: a second that only this needs

    groups = [
        Group([(places.locate(leader), 0), *((places.locate(row), int(distance_n[row])) for row in members)], count)
        for leader, members, count in _largest_groups(of_n, distance_n)
    ]
    if groups:
        draw_groups(groups, out / SHEET_NAME)


def _largest_groups(of_n: Ints, distance_n: npt.NDArray[np.int8]) -> list[tuple[int, list[int], int]]:
    """Return (sample that stays, its farthest near duplicates, how many there are) of the largest groups."""
    near = np.flatnonzero((of_n >= 0) & (distance_n != EXACT))
    leaders, group, counts = np.unique(of_n[near], return_inverse=True, return_counts=True)
    farthest = np.zeros(len(leaders), dtype=np.int64)
    np.maximum.at(farthest, group, distance_n[near])
    chosen = np.lexsort((leaders, -farthest, -counts))[:_GROUPS]
    found = []
    for leader, count in zip(leaders[chosen].tolist(), counts[chosen].tolist(), strict=True):
        members = near[of_n[near] == leader]
        order = np.lexsort((members, -distance_n[members].astype(np.int64)))[:_MEMBERS]
        found.append((leader, members[order].tolist(), count))
    return found
