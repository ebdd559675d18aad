"""What tests of versions of data sets share."""

from pathlib import Path
from typing import Any, TypeVar

from shards import configfile
from shards.read import ShardReader
from shards.sample import Sample

T = TypeVar("T")


def config(cls: type[T], out: Path, *words: str) -> T:
    """Build the settings of a command from words."""
    return configfile.load(cls, None, [f"out={out}", *words])


def samples(folder: Path) -> list[Sample]:
    """Read every sample of a data set in its order."""
    reader = ShardReader(folder)
    return [reader[shard, row] for shard, rows in enumerate(reader.rows_per_shard) for row in range(rows)]


def keys(folder: Path) -> list[str]:
    """Return the keys of a data set in its order."""
    return [sample.key for sample in samples(folder)]


def content(folder: Path) -> dict[str, Any]:
    """Return the bytes of every file below a folder, but for locks."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }
