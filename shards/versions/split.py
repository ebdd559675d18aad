"""`mmscale shards split`: several versions of a data set that share no sample and together hold them all."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shards.errors import ConfigError, SampleError, ShardError
from shards.manifest import ShardInfo, read_manifest, write_manifest
from shards.pool import run
from shards.progress import Progress
from shards.versions.filter import process_count
from shards.versions.rows import ShardRows, is_text
from shards.versions.version import copy_tokenizer, derived_info, new_version

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitConfig:
    """What `mmscale shards split` is told."""

    out: str = "???"
    """Folder that receives a version a part, named after it."""
    parts: dict[str, float] = field(default_factory=dict)
    """Fraction of each part; they add up to 1. On the command line `train=0.9 val=0.1` says the same as `parts.train=0.9 parts.val=0.1`."""
    by: str | None = None
    """Field of KEY.json whose equal values stay together, such as the picture of several questions; null takes the key."""
    seed: int = 0
    """Another seed is another division."""
    processes: int | None = None
    """Processes that read fields; 1 works in this one, null takes the CPUs this process may use."""

    def check(self) -> None:
        """Check what types alone cannot say.

        Raises:
            ConfigError: fewer than two parts, a name that is no folder name, or fractions that do not add up to 1.
        """
        given = ", ".join(f"{name}={fraction:g}" for name, fraction in self.parts.items())
        for name, fraction in self.parts.items():
            if not _NAME.fullmatch(name):
                raise ConfigError(f"`parts`: {name!r} cannot be the name of a folder. Use letters, digits, '.', '_' and '-'.")
            if not 0.0 < fraction <= 1.0:
                raise ConfigError(f"`parts.{name}` must be over 0 and at most 1; got {fraction:g}.")
        if len(self.parts) < 2 or abs(sum(self.parts.values()) - 1.0) > 1e-9:
            raise ConfigError(
                f"`parts`: at least two fractions must add up to 1; got {given or 'none'}. Give for example train=0.9 val=0.1."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class PartSummary:
    """One part of a split."""

    name: str
    rows: int
    out: Path
    digest: str

    def __str__(self) -> str:
        """Give one line for people."""
        return f"{self.name}: {self.rows:,} samples; {str(self.out)!r}, version {self.digest[:12]}"


def split_data_set(folder: str | Path, config: SplitConfig, *, progress: bool = True) -> list[PartSummary]:
    """Divide a data set by a hash of each sample's key or of one of its fields. No tar is written.

    A sample's part depends on that value, the seed and the fractions alone: more data, other shards or another order change nothing.

    Args:
        folder: the data set.
        config: the parts, and where they go.
        progress: report on stderr.

    Raises:
        ConfigError: settings that cannot be, or a folder that holds something else.
        ShardError, IntegrityError: the data set cannot be read, or a sample lacks the field.
    """
    config.check()
    base, out = read_manifest(folder), Path(config.out)
    folders = [out / name for name in config.parts]
    infos: list[list[tuple[int, ShardInfo]]] = [[] for _ in folders]
    settings = {"parts": dict(config.parts), "by": config.by, "seed": config.seed}
    with ExitStack() as held, Progress(base.rows, 0, shown=progress, doing="splitting") as bar:
        for path in folders:
            held.enter_context(new_version(path, "split", [base], {**settings, "part": path.name}))
        shards = list(base.shards)
        results = held.enter_context(closing(run(_ShardSplit(base.folder, config), shards, process_count(config.processes), out=out)))
        for number, found in results:
            for part, info in enumerate(found):
                if info.rows:
                    infos[part].append((number, info))
            bar.advance(shards[number].rows)
        for path in folders:
            copy_tokenizer(base.folder, path)
        versions = [write_manifest(path, [info for _, info in sorted(found)]) for path, found in zip(folders, infos, strict=True)]
    return [PartSummary(name=v.folder.name, rows=v.rows, out=v.folder, digest=v.digest) for v in versions]


class _ShardSplit:
    """Divides one shard; travels to the worker processes."""

    def __init__(self, base: Path, config: SplitConfig) -> None:
        self._base = base
        self._config = config
        self._path = config.by.split(".") if config.by is not None else None
        self._folders = [Path(config.out) / name for name in config.parts]
        ends = list(itertools.accumulate(config.parts.values()))
        self._limits = np.array([min(round(end * 2.0**64), 2**64 - 1) for end in ends[:-1]], dtype=np.uint64)

    def __call__(self, info: ShardInfo) -> list[ShardInfo]:
        """Return the shard as one of each part."""
        with ShardRows(self._base, info) as rows:
            words = np.array([self._word(rows, row) for row in range(len(rows))], dtype=np.uint64)
            part_of = np.searchsorted(self._limits, words, side="right")
            masks = [rows.narrowed(part_of == part) for part in range(len(self._folders))]
        return [derived_info(self._base, info, out, mask) for out, mask in zip(self._folders, masks, strict=True)]

    def _word(self, rows: ShardRows, row: int) -> int:
        value = rows.keys[row] if self._path is None else json.dumps(self._value(rows, row), sort_keys=True)
        return int.from_bytes(hashlib.sha256(f"{self._config.seed}\t{value}".encode()).digest()[:8], "big")

    def _value(self, rows: ShardRows, row: int) -> Any:
        try:
            value: Any = rows.read(row, is_text).fields()
        except SampleError as e:
            raise ShardError(f"{rows.name}:{e.key}: {e.detail} A split by a field needs the fields of every sample.") from e
        for name in self._path or ():
            if not isinstance(value, dict) or name not in value:
                raise ShardError(
                    f"{rows.name}:{rows.keys[row]} has no field {self._config.by!r}, which `by` names. Name one that all have, or leave "
                    "others out first with `mmscale shards filter`."
                )
            value = value[name]
        return value
