"""The data set as a whole: `manifest.parquet`, a row a shard; its digest is the data set's version."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from shards.commit import commit_bytes
from shards.errors import ShardError

MANIFEST_NAME = "manifest.parquet"
SIDECAR_SUFFIX = ".index.arrow"
MANIFEST_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardInfo:
    """One shard: a tar and its sidecar. Statistics are None where no sample of the shard has the value."""

    shard: str
    """File name of the tar."""
    rows: int
    """Samples in it."""
    bytes: int
    """Size of the tar."""
    sha256: str
    """Of the tar."""
    index_sha256: str
    """Of its sidecar."""
    image_count: int = 0
    """Samples whose image has a readable header."""
    width_min: int | None = None
    width_mean: float | None = None
    width_max: int | None = None
    """Pixels."""
    height_min: int | None = None
    height_mean: float | None = None
    height_max: int | None = None
    """Pixels."""
    caption_count: int = 0
    """Samples with a caption."""
    caption_length_min: int | None = None
    caption_length_mean: float | None = None
    caption_length_max: int | None = None
    """Characters."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """All shards of a data set, in the order that positions count them in."""

    folder: Path
    """Where the shards lie."""
    shards: tuple[ShardInfo, ...]
    """Sorted by file name."""

    @property
    def rows_per_shard(self) -> tuple[int, ...]:
        """Samples in each shard."""
        return tuple(shard.rows for shard in self.shards)

    @property
    def rows(self) -> int:
        """Samples in the data set."""
        return sum(shard.rows for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Size of all tars."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def digest(self) -> str:
        """The data set's version: sha256 over name, rows and both digests of every shard."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(f"{shard.shard}\t{shard.rows}\t{shard.sha256}\t{shard.index_sha256}\n".encode())
        return digest.hexdigest()


def sidecar_path(tar: Path) -> Path:
    """Return the path of a tar's sidecar: `NAME.tar` has `NAME.index.arrow` beside it."""
    return tar.with_name(tar.name.removesuffix(".tar") + SIDECAR_SUFFIX)


def write_manifest(folder: Path, shards: Sequence[ShardInfo]) -> Manifest:
    """Commit the manifest of a folder; `shards.index.build_manifest` gathers the shards from their sidecars."""
    manifest = Manifest(folder=folder, shards=tuple(sorted(shards, key=lambda s: s.shard)))
    table = pa.Table.from_pylist([asdict(shard) for shard in manifest.shards], schema=_schema(manifest.digest))
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    commit_bytes(folder / MANIFEST_NAME, buffer.getvalue())
    return manifest


def read_manifest(folder: str | Path, *, check_files: bool = True) -> Manifest:
    """Read the manifest of a data set.

    Args:
        folder: where the shards lie.
        check_files: also check that every shard and every sidecar is there (one listing of the folder).

    Raises:
        ShardError: no such folder, no manifest, a malformed one, or a shard or sidecar that is not there.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ShardError(f"There is no data set folder {str(folder)!r}. Write one with `mmscale shards write out={folder}`.")
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise ShardError(
            f"The folder {str(folder)!r} has no {MANIFEST_NAME}: it was not written to its end, or it holds tars that are not indexed yet. "
            f"Run the interrupted `mmscale shards write` again, or `mmscale shards index {folder}` for tars that others wrote."
        )
    manifest = _parse(folder, path)
    if check_files:
        _check_files(manifest)
    return manifest


def _parse(folder: Path, path: Path) -> Manifest:
    try:
        table = pq.read_table(path, memory_map=False)
        metadata = table.schema.metadata or {}
        shards = tuple(ShardInfo(**row) for row in table.select([f.name for f in fields(ShardInfo)]).to_pylist())
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as e:
        raise ShardError(f"{str(path)!r} is not a manifest: {e}. Rebuild it with `mmscale shards index {folder}`.") from e
    manifest = Manifest(folder=folder, shards=shards)
    if metadata.get(b"mmscale.digest") != manifest.digest.encode():
        raise ShardError(
            f"{str(path)!r} does not match its own digest: it was edited or damaged. Rebuild it with `mmscale shards index {folder}`."
        )
    return manifest


def _check_files(manifest: Manifest) -> None:
    present = set(os.listdir(manifest.folder))  # noqa: PTH208  (names alone: a data set may have a million entries)
    for shard in manifest.shards:
        if shard.shard not in present:
            raise ShardError(
                f"The shard {shard.shard!r} of {str(manifest.folder)!r} is in the manifest but not in the folder. Copy it there again."
            )
        if sidecar_path(Path(shard.shard)).name not in present:
            raise ShardError(
                f"The shard {shard.shard!r} of {str(manifest.folder)!r} lacks its sidecar {sidecar_path(Path(shard.shard)).name!r}. "
                f"Run `mmscale shards index {manifest.folder}`."
            )


def _schema(digest: str) -> pa.Schema:
    types = {"str": pa.string(), "int": pa.int64(), "int | None": pa.int64(), "float | None": pa.float64()}
    columns = [pa.field(f.name, types[str(f.type)], nullable="None" in str(f.type)) for f in fields(ShardInfo)]
    return pa.schema(columns, metadata={"mmscale.manifest": str(MANIFEST_VERSION), "mmscale.digest": digest})
