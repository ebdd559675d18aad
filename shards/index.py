"""A tar's sidecar `NAME.index.arrow`: where each part of each sample lies, its checksum, and what statistics need.

The sidecar is the commit mark of a shard: a tar without one is unfinished or not yet adopted. It records the tar's size and sha256
in its metadata, so that a manifest is built from sidecars alone.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from shards.commit import commit_bytes
from shards.errors import SampleError, ShardError
from shards.manifest import SIDECAR_SUFFIX, Manifest, ShardInfo, sidecar_path, write_manifest
from shards.media import media_facts
from shards.sample import Sample, split_name

INDEX_VERSION = 2
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

Progress = Callable[[int, int, str], None]
"""Called with (shards done, shards in all, name of the shard just done)."""


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


def describe(sample: Sample, offsets: Mapping[str, int]) -> IndexEntry:
    """Build the index row of a sample from its bytes and the offset of each of its parts in the tar."""
    parts = [PartEntry(ext, offsets[ext], len(data), google_crc32c.value(data)) for ext, data in sample.parts.items()]
    width, height = _image_size(sample)
    facts = media_facts(sample)
    if width is None:
        width, height = facts.width, facts.height
    return IndexEntry(sample.key, parts, width, height, _caption_length(sample), facts.duration_s, facts.sample_rate, facts.frames)


def index_tar(tar: str | Path) -> list[IndexEntry]:
    """Scan a plain WebDataset tar, ours or anyone's: consecutive members of one key are one sample, as webdataset groups them.

    Raises:
        ShardError: not a plain tar, cut short, damaged, or a sample that holds one extension twice.
    """
    tar = Path(tar)
    entries: list[IndexEntry] = []
    for sample, offsets in _samples(tar):
        entries.append(describe(sample, offsets))
    return entries


def write_index(path: str | Path, entries: Sequence[IndexEntry], *, tar_sha256: str | None = None) -> None:
    """Commit the sidecar of a tar that is already in place. The same entries and tar give the same bytes.

    Args:
        path: of the sidecar.
        entries: a row a sample, in the order of the tar.
        tar_sha256: of the tar, if known; else the tar is read.
    """
    path = Path(path)
    tar = path.with_name(path.name.removesuffix(SIDECAR_SUFFIX) + ".tar")
    metadata = {
        "mmscale.index": str(INDEX_VERSION),
        "mmscale.tar_bytes": str(tar.stat().st_size),
        "mmscale.tar_sha256": tar_sha256 or file_sha256(tar),
    }
    buffer = io.BytesIO()
    table = _to_table(entries).replace_schema_metadata(metadata)
    with pa.ipc.new_file(buffer, table.schema) as writer:
        writer.write_table(table)
    commit_bytes(path, buffer.getvalue())


def read_index(path: str | Path) -> pa.Table:
    """Map a sidecar into memory; the columns are those of `SCHEMA`, one chunk each.

    Raises:
        ShardError: it is missing or malformed.
    """
    path = Path(path)
    try:
        with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as file:
            table = file.read_all()
    except FileNotFoundError as e:
        raise ShardError(f"There is no sidecar {str(path)!r}. Run `mmscale shards index {path.parent}`.") from e
    except (pa.ArrowException, OSError) as e:
        raise ShardError(f"{str(path)!r} is not a sidecar: {e}. Delete it and run `mmscale shards index {path.parent}`.") from e
    metadata = table.schema.metadata or {}
    if not table.schema.equals(SCHEMA, check_metadata=False) or metadata.get(b"mmscale.index") != str(INDEX_VERSION).encode():
        raise ShardError(
            f"{str(path)!r} is a sidecar of another format than version {INDEX_VERSION}. "
            f"Delete it and run `mmscale shards index {path.parent}`."
        )
    return table.combine_chunks()


def shard_info(tar: Path) -> ShardInfo:
    """Summarise a committed shard from its sidecar alone.

    Raises:
        ShardError: its sidecar is missing or malformed, or belongs to a tar of another size.
    """
    path = sidecar_path(tar)
    table = read_index(path)
    recorded = int(table.schema.metadata[b"mmscale.tar_bytes"])
    size = tar.stat().st_size
    if size != recorded:
        raise ShardError(
            f"The shard {tar.name!r} has {size} bytes but its sidecar was made for {recorded}: one of them was replaced. "
            f"Copy the shard again, or delete {path.name!r} and run `mmscale shards index {tar.parent}`."
        )
    return ShardInfo(
        shard=tar.name,
        rows=table.num_rows,
        bytes=size,
        sha256=table.schema.metadata[b"mmscale.tar_sha256"].decode(),
        index_sha256=file_sha256(path),
        image_count=table.num_rows - table["width"].null_count,
        caption_count=table.num_rows - table["caption_length"].null_count,
        **_statistics(table),
    )


def build_manifest(folder: str | Path) -> Manifest:
    """Commit the manifest of a folder whose tars all have their sidecars.

    Raises:
        ShardError: there is no tar, or one without a valid sidecar.
    """
    folder = Path(folder)
    return write_manifest(folder, [shard_info(tar) for tar in _tars(folder)])


def adopt(folder: str | Path, *, progress: Progress | None = None) -> Manifest:
    """Index every tar of a folder that lacks a valid sidecar, then write the manifest.

    Raises:
        ShardError: there is no tar, or some cannot be indexed; the sound ones are indexed all the same.
    """
    folder = Path(folder)
    tars = _tars(folder)
    faults: list[str] = []
    for done, tar in enumerate(tars, 1):
        try:
            if not _is_indexed(tar):
                write_index(sidecar_path(tar), index_tar(tar))
        except ShardError as e:
            faults.append(str(e))
        if progress:
            progress(done, len(tars), tar.name)
    if faults:
        more = f" (and {len(faults) - 5} more)" if len(faults) > 5 else ""
        raise ShardError(f"{len(faults)} of {len(tars)} tars cannot be indexed. {' '.join(faults[:5])}{more}")
    return build_manifest(folder)


def file_sha256(path: Path) -> str:
    """Hash a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _tars(folder: Path) -> list[Path]:
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise ShardError(f"There are no .tar files in {str(folder)!r}. Give the folder that holds the shards themselves.")
    return tars


def _is_indexed(tar: Path) -> bool:
    path = sidecar_path(tar)
    try:
        recorded = int(read_index(path).schema.metadata[b"mmscale.tar_bytes"])
    except ShardError:
        return False
    status = tar.stat()
    return recorded == status.st_size and path.stat().st_mtime_ns >= status.st_mtime_ns


def _samples(tar: Path) -> Iterator[tuple[Sample, dict[str, int]]]:
    key: str | None = None
    parts: dict[str, bytes] = {}
    offsets: dict[str, int] = {}
    for name, offset, data in _members(tar):
        split = split_name(name)
        if split is None:
            continue
        if split[0] != key:
            if key is not None:
                yield Sample(key, parts), offsets
            key, parts, offsets = split[0], {}, {}
        ext = split[1]
        if ext in parts:
            raise ShardError(
                f"{tar.name}:{key}: the tar {str(tar)!r} holds the part {ext!r} of this sample twice. Write the tar again with unique keys."
            )
        parts[ext], offsets[ext] = data, offset
    if key is not None:
        yield Sample(key, parts), offsets


def _members(path: Path) -> Iterator[tuple[str, int, bytes]]:
    """Yield (name, offset, bytes) of the regular files of a plain tar.

    tarfile ends without a word at a damaged header or a cut, hence the look at what lies where it stopped.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        with os.fdopen(os.dup(fd), "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.issparse():
                    raise ShardError(f"The tar {str(path)!r} holds the sparse member {member.name!r}. Write it again without --sparse.")
                if member.isreg():
                    yield member.name, member.offset_data, os.pread(fd, member.size, member.offset_data)
            end = os.pread(fd, tarfile.BLOCKSIZE, tar.offset)
        if end != bytes(tarfile.BLOCKSIZE):
            raise ShardError(_broken(path, f"it has no end-of-archive mark at byte {tar.offset}"))
    except tarfile.ReadError as e:
        raise ShardError(_broken(path, str(e))) from e
    finally:
        os.close(fd)


def _broken(path: Path, problem: str) -> str:
    return (
        f"The tar {str(path)!r} is cut short, damaged or not a plain tar ({problem}). "
        "Fetch or write it again, or delete it, and repeat the command."
    )


def _image_size(sample: Sample) -> tuple[int, int] | tuple[None, None]:
    image = sample.image()
    if image is None:
        return None, None
    try:
        with Image.open(io.BytesIO(image[1])) as opened:
            return opened.width, opened.height
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return None, None  # an index is no judge of images: verify names those that do not decode


def _caption_length(sample: Sample) -> int | None:
    try:
        return max((len(caption) for caption in sample.captions()), default=None)
    except SampleError:
        return None


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


def _statistics(table: pa.Table) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("width", "height", "caption_length", "duration_s", "sample_rate", "frames"):
        extremes = pc.min_max(table[name]).as_py()
        found |= {f"{name}_min": extremes["min"], f"{name}_mean": pc.mean(table[name]).as_py(), f"{name}_max": extremes["max"]}
    return found
