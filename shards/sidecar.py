"""A tar's sidecar `NAME.index.arrow`: where each part of each sample lies, its checksum, and what statistics need.

The sidecar is the commit mark of a shard: a tar without one is unfinished or not yet adopted. It records the tar's size and sha256
in its metadata, so that a manifest is built from sidecars alone.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from shards.checksum import content_checksum, is_sound
from shards.commit import commit_bytes
from shards.digest import file_sha256
from shards.errors import ShardError
from shards.manifest import SIDECAR_SUFFIX
from shards.sample import split_name
from shards.store.local import map_file

INDEX_VERSION = 3
PART = pa.struct(
    [
        pa.field("ext", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("crc32c", pa.uint32(), nullable=False),
    ]
)
SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("parts", pa.list_(pa.field("part", PART, nullable=False)), nullable=False),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("caption_length", pa.int32()),
        pa.field("duration_s", pa.float64()),
        pa.field("sample_rate", pa.int32()),
        pa.field("frames", pa.int32()),
    ]
)
"""Columns of a sidecar, a row a sample in the order of the tar."""


@dataclass(frozen=True, slots=True)
class PartEntry:
    """Where one part lies in its tar."""

    ext: str
    """Extension without the leading dot."""
    offset: int
    """Of its first byte in the tar."""
    size: int
    """In bytes."""
    crc32c: int
    """Checksum of its bytes (Castagnoli)."""


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One row of a sidecar."""

    key: str
    parts: list[PartEntry]
    """In the order of the tar."""
    width: int | None = None
    height: int | None = None
    """Pixels, from the header of the image, or else of the video; None without a readable one."""
    caption_length: int | None = None
    """Characters of the longest caption; None without one."""
    duration_s: float | None = None
    """Seconds of the audio, or else of the video; None without a readable one."""
    sample_rate: int | None = None
    """Of the audio in Hz."""
    frames: int | None = None
    """Pictures of the video."""


def write_index(path: str | Path, entries: Sequence[IndexEntry], *, tar_sha256: str | None = None) -> None:
    """Commit the sidecar of a tar that is already in place. The same entries and tar give the same bytes.

    Args:
        path: of the sidecar.
        entries: a row a sample, in the order of the tar.
        tar_sha256: of the tar, if known; else the tar is read.
    """
    path = Path(path)
    tar = path.with_name(path.name.removesuffix(SIDECAR_SUFFIX) + ".tar")
    table = _to_table(entries)
    metadata = {
        b"mmscale.index": str(INDEX_VERSION).encode(),
        b"mmscale.tar_bytes": str(tar.stat().st_size).encode(),
        b"mmscale.tar_sha256": (tar_sha256 or file_sha256(tar)).encode(),
    }
    table = table.replace_schema_metadata(metadata | {b"mmscale.crc32c": content_checksum(table, metadata)})
    buffer = io.BytesIO()
    with pa.ipc.new_file(buffer, table.schema) as writer:
        writer.write_table(table)
    commit_bytes(path, buffer.getvalue())


def read_index(path: str | Path, *, check: bool = False) -> pa.Table:
    """Map a sidecar into memory; the columns are those of `SCHEMA`, one chunk each.

    Args:
        path: of the sidecar.
        check: compare its content with the checksum in it, where no manifest vouches for the whole file.

    Raises:
        ShardError: it is missing, malformed or damaged.
    """
    path = Path(path)
    try:
        return parse_index(map_file(path), str(path.parent), path.name, check=check)
    except FileNotFoundError as e:
        raise ShardError(f"There is no sidecar {str(path)!r}. Run `mmscale shards index {path.parent}`.") from e


def parse_index(data: pa.Buffer, root: str, name: str, *, check: bool = False) -> pa.Table:
    """Look at the bytes of a sidecar as a table, without a copy.

    Args:
        data: all of its bytes.
        root: the folder or URL it is from.
        name: its file name there.
        check: as in `read_index`.

    Raises:
        ShardError: it is malformed or damaged.
    """
    try:
        with pa.ipc.open_file(data) as file:
            table = file.read_all()
    except (pa.ArrowException, OSError) as e:
        raise ShardError(f"{f'{root}/{name}'!r} is not a sidecar: {e}. Delete it and run `mmscale shards index {root}`.") from e
    metadata = table.schema.metadata or {}
    if not table.schema.equals(SCHEMA, check_metadata=False) or metadata.get(b"mmscale.index") != str(INDEX_VERSION).encode():
        raise ShardError(
            f"{f'{root}/{name}'!r} is a sidecar of another format than version {INDEX_VERSION}. "
            f"Delete it and run `mmscale shards index {root}`."
        )
    if check and not is_sound(table):
        raise ShardError(
            f"{f'{root}/{name}'!r} is damaged: its rows do not match the checksum in it. Delete it and run `mmscale shards index {root}`."
        )
    return table.combine_chunks()


def sidecar_fits(read: Callable[[int, int], bytes], table: pa.Table) -> bool:
    """Tell whether a sidecar seems to be of a tar: whether most parts of three samples lie where it says.

    Headers alone are compared: a damaged sample is no sign of a foreign sidecar.

    Args:
        read: (first byte, size) to bytes of the tar.
        table: the sidecar.
    """
    rows = table.num_rows
    probed = [
        (table["key"][row].as_py(), part) for row in ({0, rows // 2, rows - 1} if rows else ()) for part in table["parts"][row].as_py()
    ]
    headers = [(read_header(read, part), key, part) for key, part in probed]
    return 2 * sum(header is not None and is_header_of(header, key, part) for header, key, part in headers) >= len(probed)


def read_header(read: Callable[[int, int], bytes], part: dict[str, Any]) -> tarfile.TarInfo | None:
    """Read the tar header before a part; None where there is none."""
    try:
        header = read(max(0, part["offset"] - tarfile.BLOCKSIZE), tarfile.BLOCKSIZE)
        return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return None


def is_header_of(member: tarfile.TarInfo, key: str, part: dict[str, Any]) -> bool:
    """Tell whether a header is that of a part. That of a name over 100 bytes holds only its beginning, and that of one in other letters
    than ASCII may hold question marks, with the name in a header before it (PAX): then the size alone is compared."""
    elsewhere = len(key) + len(part["ext"]) > 90 or not f"{key}{part['ext']}".isascii()
    return member.size == part["size"] and (elsewhere or split_name(member.name) == (key, part["ext"]))


def _to_table(entries: Sequence[IndexEntry]) -> pa.Table:
    starts = [0]
    for entry in entries:
        starts.append(starts[-1] + len(entry.parts))
    flat = [part for entry in entries for part in entry.parts]
    columns = [
        pa.array([getattr(part, field.name) for part in flat], field.type) for field in (PART.field(i) for i in range(PART.num_fields))
    ]
    structs = pa.StructArray.from_arrays(columns, fields=list(PART))
    parts = pa.ListArray.from_arrays(pa.array(starts, pa.int32()), structs, type=SCHEMA.field("parts").type)
    scalars = {
        name: pa.array([getattr(entry, name) for entry in entries], SCHEMA.field(name).type) for name in SCHEMA.names if name != "parts"
    }
    return pa.table([parts if name == "parts" else scalars[name] for name in SCHEMA.names], schema=SCHEMA)
