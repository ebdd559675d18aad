"""`mmscale shards merge`: several data sets as one, by hard links; or written densely anew, without the rows that masks leave out."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shards.commit import commit_file, temporary
from shards.configfile import to_plain
from shards.digest import file_sha256
from shards.errors import ConfigError, ShardError
from shards.manifest import Manifest, ShardInfo, read_manifest, sidecar_path, write_manifest
from shards.mask import kept_rows
from shards.progress import Progress
from shards.sidecar import read_index
from shards.versions.filter import process_count
from shards.versions.rewrite import rewrite_shards
from shards.versions.version import copy_tokenizer, new_version

# The file system has no hard links, not for these two folders, or not that many of one file.
_NO_LINK = frozenset({errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS})


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeConfig:
    """What `mmscale shards merge` is told."""

    out: str = "???"
    """Folder that receives the data set: hard links to the tars and sidecars, or copies on another file system."""
    rewrite: bool = False
    """Write new tars that hold the kept samples alone, instead of links with row masks."""
    rows_per_shard: int = 2048
    """Samples of a new tar (rewrite=true)."""
    processes: int | None = None
    """Processes that write new tars; 1 works in this one, null takes the CPUs this process may use. Any number writes the same bytes."""

    def check(self) -> None:
        """Check what types alone cannot say.

        Raises:
            ConfigError: a value out of range.
        """
        if self.rows_per_shard < 1:
            raise ConfigError(f"`rows_per_shard` must be at least 1; got {self.rows_per_shard}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeSummary:
    """What was merged, and what about it a person may want to know."""

    rows: int
    shards: int
    out: Path
    digest: str
    notes: tuple[str, ...]
    """Kinds of parts that not all have, keys that several have, keys that were changed."""
    seconds: float

    def __str__(self) -> str:
        """Give a line a note and a line of totals."""
        total = f"{self.rows:,} samples in {self.shards:,} shards; {str(self.out)!r}, version {self.digest[:12]}, {self.seconds:.1f} s"
        return "\n".join([*(f"  note: {note}" for note in self.notes), total])


def merge_data_sets(folders: Sequence[str | Path], config: MergeConfig, *, progress: bool = True) -> MergeSummary:
    """Make one data set of several; every kept sample of each is in it.

    Args:
        folders: the data sets.
        config: where it goes, and whether tars are written anew.
        progress: report on stderr.

    Raises:
        ConfigError: no data sets, one given twice, or an `out` that holds something else.
        ShardError, IntegrityError: a data set cannot be read, or the new one not written.
    """
    started = time.monotonic()
    config.check()
    if not folders:
        raise ConfigError("There is nothing to merge. Give the folders of data sets before `out=...`.")
    manifests, out = [read_manifest(folder) for folder in folders], Path(config.out)
    for name, count in Counter(manifest.digest for manifest in manifests).items():
        if count > 1:
            given = [str(manifest.folder) for manifest in manifests if manifest.digest == name]
            raise ConfigError(f"The same data set is given {count} times: {', '.join(given)}. Every sample would be there as often.")
    settings = {name: to_plain(config)[name] for name in (("rewrite", "rows_per_shard") if config.rewrite else ("rewrite",))}
    with new_version(out, "merge", manifests, settings):
        notes = [*_part_notes(manifests), *_key_notes(manifests)]
        with Progress(sum(manifest.rows for manifest in manifests), 0, shown=progress, doing="merging") as bar:
            if config.rewrite:
                infos, renamed = rewrite_shards(manifests, out, config.rows_per_shard, process_count(config.processes), bar)
                notes += [f"{renamed:,} keys got a number behind them, as their shard had them already"] if renamed else []
            else:
                infos = list(_linked(manifests, out, bar))
        for manifest in manifests[:1]:
            copy_tokenizer(manifest.folder, out)
        merged = write_manifest(out, infos)
    return MergeSummary(
        rows=merged.rows,
        shards=len(merged.shards),
        out=out,
        digest=merged.digest,
        notes=tuple(notes),
        seconds=time.monotonic() - started,
    )


def _linked(manifests: Sequence[Manifest], out: Path, bar: Progress) -> Iterator[ShardInfo]:
    """Link or copy tar and sidecar of every shard."""
    prefixes = _prefixes(manifests)
    for manifest, prefix in zip(manifests, prefixes, strict=True):
        for info in manifest.shards:
            tar = info.tar(manifest.folder)
            if tar.stat().st_size != info.bytes or file_sha256(sidecar_path(tar)) != info.index_sha256:
                raise ShardError(f"The shard {str(tar)!r} is not the one in its manifest. Run `mmscale shards verify {manifest.folder}`.")
            target = out / f"{prefix}{info.shard}"
            _place(tar, target)
            _place(sidecar_path(tar), sidecar_path(target))
            bar.advance(info.rows)
            yield replace(info, shard=target.name, location=None)


def _prefixes(manifests: Sequence[Manifest]) -> list[str]:
    """Return what goes before the names of each data set's shards: its folder's name where names would collide, else nothing."""
    names = Counter(name for manifest in manifests for name in manifest.table["shard"].to_pylist())
    if max(names.values(), default=0) <= 1:
        return ["" for _ in manifests]
    labels = [manifest.folder.resolve().name for manifest in manifests]
    return [f"{label}-" if labels.count(label) == 1 else f"{label}-{number}-" for number, label in enumerate(labels, 1)]


def _place(source: Path, target: Path) -> None:
    if target.exists():  # of an interrupted command: links and copies have their names only when they are whole
        return
    try:
        os.link(source.resolve(), target)
    except OSError as e:
        if e.errno not in _NO_LINK:
            raise ShardError(f"{str(source)!r} cannot be linked as {str(target)!r}: {e.strerror}. Mend that and repeat the command.") from e
        _copy(source, target)


def _copy(source: Path, target: Path) -> None:
    try:
        shutil.copyfile(source, temporary(target))
        commit_file(temporary(target), target)
    except OSError as e:
        raise ShardError(f"{str(source)!r} cannot be copied to {str(target)!r}: {e.strerror}. Mend that and repeat the command.") from e


def _part_notes(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Say where data sets hold different kinds of parts."""
    kinds = [sorted({ext for table in _tables(manifest) for ext in _extensions(table)}) for manifest in manifests]
    if any(kind != kinds[0] for kind in kinds):
        each = "; ".join(f"{manifest.folder} has {', '.join(kind) or 'none'}" for manifest, kind in zip(manifests, kinds, strict=True))
        yield f"the parts of samples differ: {each}"


def _extensions(table: pa.Table) -> list[str]:
    unique: list[str] = pc.unique(pc.struct_field(pc.list_flatten(table["parts"]), "ext")).to_pylist()
    return unique


def _key_notes(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Say how many keys are in several data sets. Keys are compared by 8 bytes of a digest: a billion of them fit into memory."""
    seen = np.empty(0, np.uint64)
    shared = 0
    examples: list[str] = []
    for manifest in manifests:
        here = []
        for table in _tables(manifest):
            keys = table["key"].to_pylist()
            words = np.array([_word(key) for key in keys], dtype=np.uint64)
            if seen.size:
                found = np.flatnonzero(seen[np.minimum(np.searchsorted(seen, words), seen.size - 1)] == words)
                shared += len(found)
                examples += [keys[row] for row in found[: 3 - len(examples)].tolist()]
            here.append(words)
        seen = np.union1d(seen, np.concatenate([*here, np.empty(0, np.uint64)]))
    if shared:
        yield f"{shared:,} samples have a key that an earlier data set has too, such as {', '.join(map(repr, examples))}"


def _tables(manifest: Manifest) -> Iterator[pa.Table]:
    for info in manifest.shards:
        table = read_index(sidecar_path(info.tar(manifest.folder)))
        yield table if info.mask is None else table.take(kept_rows(info.mask, table.num_rows, info.shard))


def _word(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
