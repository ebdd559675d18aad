"""The data set as a whole: `manifest.parquet`, a row a shard; its digest is the data set's version.

A manifest may name tars that lie in another folder (`location`) and leave out rows of a tar (`mask`): that is how a version of a data
set is made without writing a tar again. It is kept as the table it is, so that a million shards stay cheap.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shards.commit import commit_bytes
from shards.digest import buffer_sha256
from shards.errors import ShardError
from shards.mask import Mask
from shards.store import open_store
from shards.store.base import Store
from shards.store.place import is_url

MANIFEST_NAME = "manifest.parquet"
SIDECAR_SUFFIX = ".index.arrow"
ORIGIN_NAME = "origin.json"
"""Says of a version of a data set which command made it, and of what."""
MANIFEST_VERSION = 2
_HASH = pa.binary(32)
_IDENTITY = ("shard", "rows", "sha256", "index_sha256", "mask")
_BATCH = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardInfo:
    """One shard: a tar and its sidecar. Statistics are of the kept samples, and None where none of them has the value."""

    shard: str
    """File name of the tar."""
    rows: int
    """Samples in it that belong to the data set."""
    bytes: int
    """Size of the tar."""
    sha256: str
    """Of the tar."""
    index_sha256: str
    """Of its sidecar."""
    location: str | None = None
    """Folder of the tar and its sidecar, relative to the manifest's; None is the manifest's own."""
    mask: Mask | None = None
    """Which samples of the tar are kept (`shards.mask`); None is all of them."""
    image_count: int = 0
    """Samples whose image or video has a readable header."""
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
    duration_s_min: float | None = None
    duration_s_mean: float | None = None
    duration_s_max: float | None = None
    """Seconds of audio or video."""
    sample_rate_min: int | None = None
    sample_rate_mean: float | None = None
    sample_rate_max: int | None = None
    """Of audio, in Hz."""
    frames_min: int | None = None
    frames_mean: float | None = None
    frames_max: int | None = None
    """Pictures of a video."""

    def tar(self, folder: Path) -> Path:
        """Return the path of the tar, given the manifest's folder."""
        return folder / self.shard if self.location is None else folder / self.location / self.shard


_TYPES = {
    "str": pa.string(),
    "str | None": pa.string(),
    "Mask | None": pa.large_binary(),
    "int": pa.int64(),
    "int | None": pa.int32(),
    "float | None": pa.float64(),
}
_FIELDS = tuple(f.name for f in fields(ShardInfo))
SCHEMA = pa.schema(
    pa.field(f.name, _HASH if f.name.endswith("sha256") else _TYPES[str(f.type)], nullable="None" in str(f.type)) for f in fields(ShardInfo)
)
"""Columns of a manifest, a row a shard, sorted by name."""


class ShardList(Sequence[ShardInfo]):
    """The rows of a manifest, each made when it is asked for."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def __len__(self) -> int:
        """Shards in the data set."""
        return int(self._table.num_rows)

    @overload
    def __getitem__(self, place: int) -> ShardInfo: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[ShardInfo]: ...
    def __getitem__(self, place: int | slice) -> ShardInfo | Sequence[ShardInfo]:
        """Return one shard, or a list of several."""
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        number = place + len(self) if place < 0 else place
        if not 0 <= number < len(self):
            raise IndexError(f"There is no shard {place}: the data set has {len(self)}.")
        return _info(self._table.slice(number, 1).to_pylist()[0])

    def __iter__(self) -> Iterator[ShardInfo]:
        """Yield shard after shard."""
        for start in range(0, len(self), _BATCH):
            yield from map(_info, self._table.slice(start, _BATCH).to_pylist())


class Manifest:
    """All shards of a data set, in the order that positions count them in.

    Attributes:
        root: where the manifest lies: a folder or a URL, as it is printed.
        file_sha256: of the file it was read from; empty for one that was not.
        table: columns of `SCHEMA`, one chunk each, sorted by file name.
        shards: the same row by row.
        rows_per_shard: (shards,) int64, samples in each; not to be written to.
        rows: samples in the data set.
        bytes: size of all tars.
    """

    def __init__(self, root: str | Path, table: pa.Table, file_sha256: str = "") -> None:
        self.root = str(root)
        self.file_sha256 = file_sha256
        self.table = table
        self.shards = ShardList(table)
        self.rows_per_shard: npt.NDArray[np.int64] = table["rows"].to_numpy().copy()
        self.rows_per_shard.flags.writeable = False
        self.rows = int(self.rows_per_shard.sum())
        self.bytes = int(pc.sum(table["bytes"]).as_py() or 0)
        self._digest: str | None = None

    @property
    def folder(self) -> Path:
        """Where the manifest lies, for what works on files.

        Raises:
            ShardError: it lies behind a URL.
        """
        if is_url(self.root):
            raise ShardError(f"This needs the data set's files in a folder; they are at {self.root!r}. Copy them first.")
        return Path(self.root)

    @property
    def digest(self) -> str:
        """The data set's version: sha256 over name, rows, both digests and row mask of every shard."""
        if self._digest is None:
            self._digest = _hash_columns(self.table, _IDENTITY)
        return self._digest

    def __eq__(self, other: object) -> bool:
        """Tell whether both list the same shards with the same statistics in the same folder."""
        return isinstance(other, Manifest) and self.root == other.root and bool(self.table.equals(other.table))

    def __hash__(self) -> int:
        """Hash what `__eq__` compares."""
        return hash((self.root, self.digest))


def sidecar_path(tar: Path) -> Path:
    """Return the path of a tar's sidecar: `NAME.tar` has `NAME.index.arrow` beside it."""
    return tar.with_name(sidecar_name(tar.name))


def sidecar_name(tar: str) -> str:
    """Return the file name of a tar's sidecar."""
    return tar.removesuffix(".tar") + SIDECAR_SUFFIX


def make_manifest(folder: Path, shards: Iterable[ShardInfo]) -> Manifest:
    """Put shards in order and into a table; nothing is written.

    Raises:
        ShardError: two shards have the same name.
    """
    ordered = sorted(shards, key=lambda s: s.shard)
    for one, next_one in pairwise(ordered):
        if one.shard == next_one.shard:
            raise ShardError(f"Two shards of one data set are named {one.shard!r}. Rename one of the tars with its sidecar.")
    columns = {name: [getattr(shard, name) for shard in ordered] for name in _FIELDS}
    for name in ("sha256", "index_sha256"):
        columns[name] = [bytes.fromhex(value) for value in columns[name]]
    return Manifest(folder, pa.table(columns, schema=SCHEMA))


def write_manifest(folder: Path, shards: Iterable[ShardInfo]) -> Manifest:
    """Commit the manifest of a folder; `shards.index.build_manifest` gathers the shards from their sidecars."""
    manifest = make_manifest(folder, shards)
    checksum = _hash_columns(manifest.table, _FIELDS)
    metadata = {"mmscale.manifest": str(MANIFEST_VERSION), "mmscale.digest": manifest.digest, "mmscale.checksum": checksum}
    buffer = io.BytesIO()
    pq.write_table(manifest.table.replace_schema_metadata(metadata), buffer, compression="zstd", use_dictionary=["location"])
    commit_bytes(folder / MANIFEST_NAME, buffer.getvalue())
    return manifest


def read_manifest(folder: str | Path, *, check_files: bool = True) -> Manifest:
    """Read the manifest of a data set; `load_manifest` reads it from a store that is open.

    Args:
        folder: folder or URL where the manifest lies.
        check_files: also check that every shard and every sidecar is there (one listing of each folder; not of a URL).

    Raises:
        ShardError: no such folder, no manifest, a malformed or edited one, or a shard or sidecar that is not there.
    """
    return load_manifest(open_store(folder), check_files=check_files)


def load_manifest(store: Store, *, check_files: bool = True, expected: str | None = None) -> Manifest:
    """Read the manifest from a store.

    Args:
        store: where the data set lies.
        check_files: as in `read_manifest`.
        expected: sha256 that the file has elsewhere in this run, if it is being opened again behind a URL.

    Raises:
        ShardError: as in `read_manifest`; or another data set lies there by now.
    """
    data = _whole(store, expected)
    found = buffer_sha256(data)
    if is_url(store.root) and expected not in (None, found):
        raise ShardError(
            f"{store.root!r} holds another {MANIFEST_NAME} than when this run opened it. Give each version of a data set a URL of its own."
        )
    manifest = parse_manifest(store.root, data, found)
    if check_files and not is_url(store.root):
        _check_files(manifest)
    return manifest


def _whole(store: Store, expected: str | None) -> pa.Buffer:
    path = f"{store.root}/{MANIFEST_NAME}"
    try:
        if not is_url(store.root) and not Path(store.root).is_dir():
            raise ShardError(f"There is no data set folder {store.root!r}. Write one with `mmscale shards write out={store.root}`.")
        return store.whole(MANIFEST_NAME, expected)
    except FileNotFoundError as e:
        raise ShardError(_no_manifest(store.root)) from e
    except OSError as e:
        raise ShardError(f"{path!r} cannot be read: {e.strerror}. Give this user the right to read it, or mend the disk.") from e


def _no_manifest(root: str) -> str:
    if is_url(root):
        return f"There is no {MANIFEST_NAME} at {root!r}. Check the URL; upload the manifest after everything else of a data set."
    return (
        f"The folder {root!r} has no {MANIFEST_NAME}: it was not written to its end, or it holds tars that are not indexed yet. "
        f"Run the interrupted `mmscale shards write` again, or `mmscale shards index {root}` for tars that others wrote."
    )


def parse_manifest(root: str | Path, data: bytes | pa.Buffer, file_sha256: str = "") -> Manifest:
    """Make a manifest of the bytes of its file.

    Raises:
        ShardError: they are damaged, edited, or of another version.
    """
    path = f"{root}/{MANIFEST_NAME}"
    advice = "Upload it again." if is_url(root) else f"Rebuild it with `mmscale shards verify {root} --full --repair`."
    try:
        # not pq.read_table: it imports all of pyarrow.dataset, 20 ms before the first sample
        with pq.ParquetFile(pa.BufferReader(data)) as file:
            table = file.read().combine_chunks()
    except (pa.ArrowException, OSError, ValueError) as e:
        raise ShardError(f"{path!r} is not a manifest: {e}. {advice}") from e
    metadata = table.schema.metadata or {}
    if metadata.get(b"mmscale.manifest", b"") not in (b"", str(MANIFEST_VERSION).encode()):
        raise ShardError(f"{path!r} is a manifest of another format than version {MANIFEST_VERSION}. {advice}")
    if not table.schema.equals(SCHEMA, check_metadata=False):
        raise ShardError(f"{path!r} is not a manifest: its columns are not those of version {MANIFEST_VERSION}. {advice}")
    if metadata.get(b"mmscale.checksum", b"") != _hash_columns(table, _FIELDS).encode():
        raise ShardError(f"{path!r} does not match its own checksum: it was edited or damaged. {advice}")
    return Manifest(root, table.replace_schema_metadata(None), file_sha256)


def _info(row: dict[str, Any]) -> ShardInfo:
    return ShardInfo(**{**row, "sha256": row["sha256"].hex(), "index_sha256": row["index_sha256"].hex()})


def _check_files(manifest: Manifest) -> None:
    """Check that all tars and sidecars are there, by names alone: a data set may have a million shards."""
    locations = manifest.table["location"]
    for location in locations.unique().to_pylist():
        folder = manifest.folder / (location or "")
        here = pc.is_null(locations) if location is None else pc.equal(locations, location)
        names = manifest.table["shard"].filter(here).to_pylist()
        present = _listed(folder, names[0])
        for name in names:
            if name not in present:
                raise ShardError(f"The shard {name!r} of {str(folder)!r} is in the manifest but not in the folder. Copy it there again.")
            if sidecar_name(name) not in present:
                raise ShardError(
                    f"The shard {name!r} of {str(folder)!r} lacks its sidecar {sidecar_name(name)!r}. Run `mmscale shards index {folder}`."
                )


def _listed(folder: Path, first: str) -> set[str]:
    try:
        return set(os.listdir(folder))  # noqa: PTH208  (names alone)
    except FileNotFoundError as e:
        raise ShardError(
            f"The manifest names tars in {str(folder)!r}, such as {first!r}, and there is no such folder. A version of a data set "
            "needs the one it was made from at the same place relative to it: move both together."
        ) from e
    except OSError as e:
        raise ShardError(f"The folder {str(folder)!r} cannot be listed: {e.strerror}. Give this user the right to read it.") from e


def _hash_columns(table: pa.Table, names: Sequence[str]) -> str:
    """Hash columns by their values: name, which are null, lengths and bytes. How Arrow cuts or pads its buffers plays no part."""
    digest = hashlib.sha256(str(table.num_rows).encode())
    for name in names:
        column = pa.concat_arrays(table[name].chunks) if table[name].num_chunks else pa.array([], table[name].type)
        digest.update(f"\n{name}\n".encode())
        digest.update(column.is_null().to_numpy(zero_copy_only=False).astype(np.uint8))
        for values in _values(column):
            digest.update(values)
    return digest.hexdigest()


def _values(column: pa.Array) -> Iterator[memoryview]:
    """Yield the bytes of a column, nulls as zeros or nothing."""
    if pa.types.is_fixed_size_binary(column.type):
        width = column.type.byte_width
        yield memoryview(column.buffers()[1] or b"")[column.offset * width : (column.offset + len(column)) * width]
    elif pa.types.is_primitive(column.type):
        yield np.ascontiguousarray(pc.fill_null(column, 0).to_numpy(zero_copy_only=False)).data.cast("B")
    else:
        filled = pc.fill_null(column, "" if pa.types.is_string(column.type) else b"")
        lengths = pc.binary_length(filled).to_numpy(zero_copy_only=False).astype(np.int64)
        ends = np.concatenate([[0], np.cumsum(lengths)])
        _, offsets, text = filled.buffers()
        first = np.frombuffer(offsets, np.int64 if pa.types.is_large_binary(column.type) else np.int32)[filled.offset] if len(filled) else 0
        yield lengths.data.cast("B")
        yield memoryview(text or b"")[int(first) : int(first + ends[-1])]
