"""`mmscale shards filter`: a version of a data set without the samples that some rules drop."""

from __future__ import annotations

import functools
import hashlib
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shards.configfile import to_plain
from shards.errors import ConfigError, SampleError
from shards.filter import FilterConfig, Judge
from shards.manifest import ShardInfo, read_manifest, write_manifest
from shards.pool import run
from shards.progress import Progress
from shards.versions.drops import parquet_table
from shards.versions.rows import ShardRows, is_text
from shards.versions.version import copy_tokenizer, derived_info, new_version

DROPPED_NAME = "dropped.parquet"
_DROPPED = pa.schema([pa.field(name, pa.string(), nullable=False) for name in ("shard", "key", "reason")])


@dataclass(frozen=True, kw_only=True, slots=True)
class FilterVersionConfig(FilterConfig):
    """What `mmscale shards filter` is told: the rules of `FilterConfig`, and these."""

    out: str = "???"
    """Folder that receives the version: a manifest that points at the tars where they lie, and dropped.parquet."""
    keep_keys: str | None = None
    """File of keys; samples that are not in it are dropped. Lines `KEY` or `SHARD.tar:KEY`, or parquet with a column key (and shard)."""
    drop_keys: str | None = None
    """File of keys; samples that are in it are dropped."""
    fraction: float | None = None
    """Part of the samples that stays, drawn by a hash of their keys: the same ones in any order and whatever else there is, and a smaller
    part lies within a larger one."""
    seed: int = 0
    """Another one draws another part."""
    processes: int | None = None
    """Processes that read captions; 1 works in this one, null takes the CPUs this process may use."""

    def check(self) -> None:
        """Check the rules of FilterConfig and the part.

        Raises:
            ConfigError: a value out of range.
        """
        FilterConfig.check(self)  # a dataclass with slots is made anew, so that super() does not find it
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ConfigError(f"`fraction` is a part of the samples, over 0 and at most 1; got {self.fraction:g}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class FilterSummary:
    """What a filter left."""

    kept: int
    rows: int
    """Samples before."""
    dropped: Counter[str]
    """Dropped samples by the first rule that dropped them."""
    out: Path
    digest: str
    seconds: float

    def __str__(self) -> str:
        """Give a line a rule and a line of totals."""
        rules = [
            f"  {reason:<20} dropped {count:,}" for reason, count in sorted(self.dropped.items(), key=lambda item: (-item[1], item[0]))
        ]
        total = f"{self.kept:,} of {self.rows:,} samples kept; {str(self.out)!r}, version {self.digest[:12]}, {self.seconds:.1f} s"
        return "\n".join([*rules, total])


def filter_data_set(folder: str | Path, config: FilterVersionConfig, *, progress: bool = True) -> FilterSummary:
    """Make a version of a data set that leaves out what the rules drop. No tar is written.

    Args:
        folder: the data set.
        config: the rules, and where the version goes.
        progress: report on stderr.

    Raises:
        ConfigError: settings that cannot be, or an `out` that holds something else.
        ShardError, IntegrityError: the data set cannot be read.
    """
    started = time.monotonic()
    config.check()
    base, out = read_manifest(folder), Path(config.out)
    judge = _ShardFilter(base.folder, config)
    settings = {name: value for name, value in to_plain(config).items() if name not in ("out", "processes")}
    dropped: Counter[str] = Counter()
    infos: list[ShardInfo] = []
    with new_version(out, "filter", [base], settings), Progress(base.rows, 0, shown=progress, doing="judging") as bar:
        with parquet_table(out / DROPPED_NAME, _DROPPED) as table:
            for info, drops in _in_order(judge, list(base.shards), out, process_count(config.processes), bar):
                table.add(drops)
                dropped.update(drop["reason"] for drop in drops)
                if info.rows:
                    infos.append(info)
        copy_tokenizer(base.folder, out)
        version = write_manifest(out, infos)
    return FilterSummary(
        kept=version.rows, rows=base.rows, dropped=dropped, out=out, digest=version.digest, seconds=time.monotonic() - started
    )


def process_count(processes: int | None) -> int:
    """Return the number of processes to start.

    Raises:
        ConfigError: below 1.
    """
    if processes is not None and processes < 1:
        raise ConfigError(f"`processes` must be at least 1; got {processes}.")
    return processes if processes is not None else len(os.sched_getaffinity(0))


Judged = tuple[ShardInfo, list[dict[str, str]]]


class _ShardFilter:
    """Judges one shard; travels to the worker processes."""

    def __init__(self, base: Path, config: FilterVersionConfig) -> None:
        self._base = base
        self._config = config
        for key in ("keep_keys", "drop_keys"):
            path = getattr(config, key)
            if path is not None and not Path(path).is_file():
                raise ConfigError(f"`{key}`: there is no file {path!r}. Give a file of keys, a line each, or parquet with a column key.")

    @functools.cached_property
    def _judge(self) -> Judge:
        return Judge(self._config)

    @functools.cached_property
    def _keep(self) -> frozenset[str] | None:
        return None if self._config.keep_keys is None else read_keys("keep_keys", self._config.keep_keys)

    @functools.cached_property
    def _drop(self) -> frozenset[str]:
        return frozenset() if self._config.drop_keys is None else read_keys("drop_keys", self._config.drop_keys)

    def __getstate__(self) -> tuple[Path, FilterVersionConfig]:
        """Send what it is made from; word lists and keys are read where they are used."""
        return self._base, self._config

    def __setstate__(self, state: tuple[Path, FilterVersionConfig]) -> None:
        """Take it up in another process."""
        self._base, self._config = state

    def __call__(self, info: ShardInfo) -> Judged:
        """Judge every sample of a shard; returns the shard of the version, and (shard, key, reason) of each dropped sample."""
        with ShardRows(self._base, info) as rows:
            reasons = self._reasons(rows)
            mask = rows.narrowed(np.array([reason is None for reason in reasons], dtype=np.bool_))
            drops = [{"shard": info.shard, "key": key, "reason": r} for key, r in zip(rows.keys, reasons, strict=True) if r is not None]
        return derived_info(self._base, info, Path(self._config.out), mask), drops

    def _reasons(self, rows: ShardRows) -> list[str | None]:
        widths, heights = rows.table["width"].to_pylist(), rows.table["height"].to_pylist()
        return [self._reason(rows, row, widths[row], heights[row]) for row in range(len(rows))]

    def _reason(self, rows: ShardRows, row: int, width: int | None, height: int | None) -> str | None:
        names = {rows.keys[row], f"{rows.name}:{rows.keys[row]}"}
        if self._keep is not None and not names & self._keep:
            return "keep_keys"
        if names & self._drop:
            return "drop_keys"
        if self._config.fraction is not None and drawn(rows.keys[row], self._config.seed) >= self._config.fraction:
            return "fraction"
        if not self._judge.reads_text:
            return self._judge(width, height, (), {})
        sample = rows.read(row, is_text)
        try:
            return self._judge(width, height, sample.captions(), sample.fields())
        except SampleError as e:
            return e.reason


def drawn(key: str, seed: int) -> float:
    """Return a number in [0, 1) that belongs to a key and a seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "big") / 2**64


def read_keys(name: str, path: str) -> frozenset[str]:
    """Read a file of keys: lines, or a parquet table with a column key and, where keys alone would be ambiguous, shard.

    Raises:
        ConfigError: it cannot be read, or has no such column.
    """
    try:
        if not path.endswith(".parquet"):
            return frozenset(line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip())
        columns = pq.read_schema(path).names
        table = pq.read_table(path, columns=[column for column in ("shard", "key") if column in columns]).to_pydict()
        keys = table["key"]
    except (OSError, UnicodeDecodeError, pa.ArrowException, KeyError) as e:
        raise ConfigError(
            f"`{name}`: {path!r} cannot be read as keys: {e}. Give a file of keys, a line each, or parquet with a column key."
        ) from e
    return frozenset(map("{}:{}".format, table["shard"], keys)) if "shard" in table else frozenset(keys)


def _in_order(judge: _ShardFilter, infos: list[ShardInfo], out: Path, processes: int, bar: Progress) -> Iterator[Judged]:
    """Yield results in the order of the shards, however they come in."""
    waiting: dict[int, Judged] = {}
    upcoming = 0
    with closing(run(judge, infos, processes, out=out)) as results:
        for number, result in results:
            waiting[number] = result
            bar.advance(infos[number].rows)
            while upcoming in waiting:
                yield waiting.pop(upcoming)
                upcoming += 1
