"""A tar's sidecar `NAME.index.arrow`: where each part of each sample lies, its checksum, and what statistics need.

The sidecar is the commit mark of a shard: a tar without one is unfinished or not yet adopted. It records the tar's size and sha256
in its metadata, so that a manifest is built from sidecars alone.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from shards import img2dataset
from shards.checksum import content_checksum, is_sound
from shards.commit import commit_bytes
from shards.digest import file_sha256
from shards.errors import SampleError, ShardError
from shards.manifest import MANIFEST_NAME, ORIGIN_NAME, SIDECAR_SUFFIX, Manifest, ShardInfo, read_manifest, sidecar_path, write_manifest
from shards.mask import Mask, kept_rows
from shards.sample import Sample, split_name
from shards.store.local import LocalTar, map_file
from shards.tar_scan import scan_tar

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
    """Pixels, from the image's header; None without a readable one."""
    caption_length: int | None = None
    """Characters of the longest caption; None without one."""


def describe(sample: Sample, offsets: Mapping[str, int]) -> IndexEntry:
    """Build the index row of a sample from its bytes and the offset of each of its parts in the tar."""
    parts = [PartEntry(ext, offsets[ext], len(data), google_crc32c.value(data)) for ext, data in sample.parts.items()]
    width, height = _image_size(sample)
    return IndexEntry(sample.key, parts, width, height, _caption_length(sample))


def index_tar(tar: str | Path) -> list[IndexEntry]:
    """Scan a plain WebDataset tar, ours or anyone's: consecutive members of one key are one sample, as webdataset groups them.

    Raises:
        ShardError: not a plain tar, cut short, damaged, not to be read; a member named outside of its folder; a key that occurs twice,
            or whose parts are not neighbours.
    """
    tar = Path(tar)
    entries: list[IndexEntry] = []
    for sample, offsets in scan_tar(tar):
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


def shard_info(tar: Path, *, location: str | None = None, mask: Mask | None = None) -> ShardInfo:
    """Summarise a committed shard from its sidecar alone.

    Args:
        tar: the shard.
        location: its folder relative to the manifest's, where that is another.
        mask: of the rows that are kept.

    Raises:
        ShardError: its sidecar is missing or malformed, or belongs to a tar of another size.
    """
    path = sidecar_path(tar)
    table = read_index(path, check=True)
    recorded = int(table.schema.metadata[b"mmscale.tar_bytes"])
    size = tar.stat().st_size
    if size != recorded:
        raise ShardError(
            f"The shard {tar.name!r} has {size} bytes but its sidecar was made for {recorded}: one of them was replaced. "
            f"Copy the shard again, or delete {path.name!r} and run `mmscale shards index {tar.parent}`."
        )
    kept = table if mask is None else table.take(kept_rows(mask, table.num_rows, tar.name))
    return ShardInfo(
        shard=tar.name,
        rows=kept.num_rows,
        bytes=size,
        sha256=table.schema.metadata[b"mmscale.tar_sha256"].decode(),
        index_sha256=file_sha256(path),
        location=location,
        mask=mask,
        image_count=kept.num_rows - kept["width"].null_count,
        caption_count=kept.num_rows - kept["caption_length"].null_count,
        **_statistics(kept),
    )


def build_manifest(folder: str | Path) -> Manifest:
    """Commit the manifest of a folder whose tars all have their sidecars.

    Row masks, and tars that lie elsewhere, stay as the present manifest has them.

    Raises:
        ShardError: there is no tar, one without a valid sidecar, or one that is another than its row mask was made for.
    """
    folder = Path(folder)
    before = _special_shards(folder)
    elsewhere = [info for info in before.values() if info.location is not None]
    found = [_with_mask(shard_info(tar), tar, before.get(tar.name)) for tar in _tars(folder, required=not elsewhere)]
    return write_manifest(folder, [*elsewhere, *found])


def adopt(folder: str | Path, *, progress: Progress | None = None) -> Manifest:
    """Index every tar of a folder that lacks a valid sidecar, then write the manifest.

    Tars of img2dataset are compared with the tables and statistics that lie beside them.

    Raises:
        ShardError: there is no tar, or some cannot be indexed; the sound ones are indexed all the same.
    """
    folder = Path(folder)
    special = _special_shards(folder)
    tars = _tars(folder, required=not special)
    faults: list[str] = []
    downloaded = img2dataset.is_output(folder)
    for done, tar in enumerate(tars, 1):
        try:
            if not _is_indexed(tar, special.get(tar.name)):
                write_index(sidecar_path(tar), index_tar(tar))
            if downloaded:
                img2dataset.check(tar, read_index(sidecar_path(tar))["key"].to_pylist())
        except ShardError as e:
            faults.append(str(e))
        except OSError as e:
            faults.append(f"The tar {str(tar)!r} cannot be read, or its sidecar cannot be written: {e}.")
        if progress:
            progress(done, len(tars), tar.name)
    if faults:
        more = f" (and {len(faults) - 5} more)" if len(faults) > 5 else ""
        raise ShardError(f"{len(faults)} of {len(tars)} tars cannot be used. {' '.join(faults[:5])}{more}")
    try:
        return build_manifest(folder)
    except OSError as e:
        raise ShardError(
            f"The manifest of {str(folder)!r} cannot be written: {e.strerror}. Give this user the right to write there."
        ) from e


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
    """Tell whether a header is that of a part. That of a name over 100 bytes holds only its beginning: then the size alone is compared."""
    return member.size == part["size"] and (len(key) + len(part["ext"]) > 90 or split_name(member.name) == (key, part["ext"]))


def _tars(folder: Path, *, required: bool = True) -> list[Path]:
    tars = sorted(folder.glob("*.tar"))
    if not tars and required:
        raise ShardError(f"There are no .tar files in {str(folder)!r}. Give the folder that holds the shards themselves.")
    return tars


def _special_shards(folder: Path) -> dict[str, ShardInfo]:
    """Return what the tars of a folder do not say: which shards of its manifest lie elsewhere or leave out rows.

    Raises:
        ShardError: the folder is a version made of another one, and its manifest cannot be read.
    """
    try:
        manifest = read_manifest(folder, check_files=False)
    except ShardError as e:
        if (folder / ORIGIN_NAME).exists():
            raise ShardError(
                f"{e} But which rows {str(folder)!r} leaves out is in its manifest alone: run the command again that {ORIGIN_NAME} names."
            ) from e
        return {}
    special = pc.or_(pc.is_valid(manifest.table["location"]), pc.is_valid(manifest.table["mask"]))
    return {manifest.shards[number].shard: manifest.shards[number] for number in np.flatnonzero(special.to_numpy()).tolist()}


def _with_mask(info: ShardInfo, tar: Path, before: ShardInfo | None) -> ShardInfo:
    if before is None or before.mask is None or before.location is not None:
        return info
    if info.sha256 != before.sha256:
        raise ShardError(
            f"The manifest of {str(tar.parent)!r} leaves out rows of {tar.name!r}, and that tar was replaced since: which rows of the "
            f"new one are meant cannot be known. Restore the tar, or delete {MANIFEST_NAME} to take in every row."
        )
    return shard_info(tar, mask=before.mask)


def _is_indexed(tar: Path, special: ShardInfo | None) -> bool:
    """Tell whether a tar has its sidecar; one that was damaged is asked only for the samples that its row mask keeps."""
    path = sidecar_path(tar)
    try:
        table = read_index(path, check=True)
        status = tar.stat()
        recorded = int(table.schema.metadata[b"mmscale.tar_bytes"])
        if recorded != status.st_size or path.stat().st_mtime_ns < status.st_mtime_ns:
            return False
        if special is not None and special.mask is not None and special.location is None:
            table = table.take(kept_rows(special.mask, table.num_rows, tar.name))
        return sidecar_fits(LocalTar(os.open(tar, os.O_RDONLY | os.O_CLOEXEC)).read, table)
    except (ShardError, OSError):
        return False


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
    for name in ("width", "height", "caption_length"):
        extremes = pc.min_max(table[name]).as_py()
        found |= {f"{name}_min": extremes["min"], f"{name}_mean": pc.mean(table[name]).as_py(), f"{name}_max": extremes["max"]}
    return found
