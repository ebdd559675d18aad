"""Check a data set against its manifest: files, sizes, digests, every part's checksum, and a trial decode; each fault by name."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shards import trial
from shards.errors import IntegrityError, ShardError
from shards.manifest import SIDECAR_SUFFIX, Manifest, ShardInfo, sidecar_name
from shards.mask import kept_rows
from shards.open_shard import stored
from shards.order import GlobalOrder
from shards.read import ShardReader
from shards.sidecar import parse_index, sidecar_fits
from shards.store.base import Store

MISSING = "the tar is missing."

Progress = Callable[[int, int], None]
"""Called with (shards done, shards in all)."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong."""

    shard: str
    """File name of the tar."""
    key: str | None
    """The sample; None where the whole shard is concerned."""
    problem: str
    """One sentence."""

    def __str__(self) -> str:
        """Name the place as `shard:key`."""
        return f"{self.shard}:{self.key}: {self.problem}" if self.key is not None else f"{self.shard}: {self.problem}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What was checked, and what was found."""

    shards: int
    """Shards in the manifest."""
    rows: int
    """Samples in the manifest."""
    checked: int
    """Samples that were read, compared with their checksums and decoded."""
    faults: tuple[Fault, ...]
    """In the order of the manifest."""

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults

    def __str__(self) -> str:
        """Give a line a fault and a line of totals."""
        verdict = f"{len(self.faults)} faults" if self.faults else "no fault"
        return "\n".join(
            [*map(str, self.faults), f"{self.shards} shards, {self.rows} samples, {self.checked} read and decoded: {verdict}."]
        )


def verify(folder: str | Path, *, sample: int | None = None, full: bool = False, progress: Progress | None = None) -> Report:
    """Check a data set.

    Always: the files of the manifest and, where they can be listed, no others; their sizes, the sidecars' digests, keys that occur twice
    in a shard.

    Args:
        folder: the data set, or its URL.
        sample: also read and decode so many samples, drawn at random but the same at each call.
        full: also re-hash every tar, and read and decode every sample.
        progress: called after each shard.

    Raises:
        ShardError: there is no data set, or its manifest is malformed.
    """
    reader = ShardReader(folder, check_files=False)
    manifest = reader.manifest
    rows = _drawn(manifest, sample or 0)
    faults: list[Fault] = []
    checked = 0
    with ThreadPoolExecutor(max(1, os.cpu_count() or 1)) as threads:  # hashing and decoding release the interpreter's lock
        check = partial(_check_shard, reader, rows=rows, full=full)
        for done, (found, count) in enumerate(threads.map(check, range(len(manifest.shards))), 1):
            faults += found
            checked += count
            if progress:
                progress(done, len(manifest.shards))
    faults += strangers(manifest, reader.store)
    return Report(shards=len(manifest.shards), rows=manifest.rows, checked=checked, faults=tuple(faults))


def _drawn(manifest: Manifest, count: int) -> dict[int, list[int]]:
    """Draw rows by shard."""
    drawn: dict[int, list[int]] = {}
    if count and manifest.rows:
        _, shards, rows = GlobalOrder(manifest.rows_per_shard, seed=0).locate(np.arange(min(count, manifest.rows)))
        for shard, row in sorted(zip(shards.tolist(), rows.tolist(), strict=True)):
            drawn.setdefault(shard, []).append(row)
    return drawn


def _check_shard(reader: ShardReader, shard: int, *, rows: dict[int, list[int]], full: bool) -> tuple[list[Fault], int]:
    info = reader.manifest.shards[shard]
    store = reader.store_at(info.location)
    try:
        of_tar, of_sidecar = _tar_problem(store, info, full), _sidecar_problem(store, info)
    except OSError as e:
        return [Fault(info.shard, None, f"it cannot be read: {e.strerror}. Give this user the right to read it, or mend the disk.")], 0
    faults = [Fault(info.shard, None, problem) for problem in (of_tar, of_sidecar) if problem]
    if of_sidecar or of_tar == MISSING:
        return faults, 0
    faults += [Fault(info.shard, key, "this key occurs more than once in the shard.") for key in _repeated(reader.index(shard))]
    chosen = range(info.rows) if full else rows.get(shard, [])
    for row in chosen:
        faults += [Fault(info.shard, reader.key(shard, row), problem) for problem in _row_problems(reader, shard, row)]
    return faults, len(chosen)


def _tar_problem(store: Store, info: ShardInfo, full: bool) -> str | None:
    try:
        size = store.size(info.shard)
        if size != info.bytes:
            return f"the tar has {size} bytes, the manifest says {info.bytes}."
        if full and store.sha256(info.shard) != info.sha256:
            return "the tar's sha256 differs from the manifest's."
    except FileNotFoundError:
        return MISSING
    return None


def _sidecar_problem(store: Store, info: ShardInfo) -> str | None:
    sidecar = sidecar_name(info.shard)
    try:
        found = store.sha256(sidecar)
    except FileNotFoundError:
        return f"its sidecar {sidecar} is missing; run `mmscale shards index {store.root}`."
    whose = _recorded_tar(store, sidecar)
    if found != info.index_sha256:
        other = "" if whose in (None, info.sha256) else ": it is of another tar"
        return f"the sha256 of its sidecar {sidecar} differs from the manifest's{other}."
    if whose != info.sha256 or not _fits(store, info):
        return f"its sidecar {sidecar} is of another tar; run `mmscale shards verify {store.root} --full --repair`."
    return None


def _recorded_tar(store: Store, sidecar: str) -> str | None:
    """Return the sha256 of the tar that a sidecar was made for; None where it is none."""
    try:
        recorded: bytes = parse_index(store.whole(sidecar), store.root, sidecar).schema.metadata[b"mmscale.tar_sha256"]
    except ShardError:
        return None
    return recorded.decode()


def _fits(store: Store, info: ShardInfo) -> bool:
    """Whether a sidecar seems to be of the tar beside it; a tar that is missing or of another size is told elsewhere."""
    sidecar = sidecar_name(info.shard)
    try:
        if store.size(info.shard) != info.bytes:
            return True
        table = parse_index(store.whole(sidecar), store.root, sidecar)
        if info.mask is not None:
            table = table.take(kept_rows(info.mask, table.num_rows, info.shard))
        return sidecar_fits(store.tar(stored(info)[0]).read, table)
    except FileNotFoundError:
        return True


def _repeated(table: pa.Table) -> list[str]:
    counts = pc.value_counts(table["key"])
    repeated: list[str] = counts.filter(pc.greater(counts.field("counts"), 1)).field("values").to_pylist()
    return repeated


def _row_problems(reader: ShardReader, shard: int, row: int) -> Iterator[str]:
    try:
        sample = reader[shard, row]
    except (IntegrityError, ShardError) as e:
        yield str(e).removeprefix(f"{reader.manifest.shards[shard].shard}:{reader.key(shard, row)}: ")
    else:
        yield from trial.problems(sample)


def strangers(manifest: Manifest, store: Store) -> list[Fault]:
    """Find tars and sidecars where a data set lies that its manifest does not know."""
    names = {name for name in store.names() or () if not name.startswith(".")}
    tars = {name for name in names if name.endswith(".tar")}
    owners = {name.removesuffix(SIDECAR_SUFFIX) + ".tar" for name in names if name.endswith(SIDECAR_SUFFIX)}
    known = set(manifest.table["shard"].filter(pc.is_null(manifest.table["location"])).to_pylist())
    problem = f"the tar is not in the manifest; run `mmscale shards index {manifest.root}` to take it in, or delete it."
    return [Fault(name, None, problem) for name in sorted(tars - known)] + [
        Fault(name, None, "there is a sidecar without its tar.") for name in sorted(owners - tars - known)
    ]
