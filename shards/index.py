"""From tars to sidecars and a manifest: index, adopt, sum up."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from shards import img2dataset
from shards.commit import remove_leftovers
from shards.digest import file_sha256
from shards.errors import SampleError, ShardError
from shards.manifest import MANIFEST_NAME, ORIGIN_NAME, Manifest, ShardInfo, read_manifest, sidecar_path, write_manifest
from shards.mask import Mask, kept_rows
from shards.media import media_facts
from shards.sample import Sample
from shards.sidecar import (
    IndexEntry,
    PartEntry,
    read_index,
    sidecar_fits,
    write_index,
)
from shards.store.local import LocalTar
from shards.tar_scan import scan_tar

Progress = Callable[[int, int, str], None]
"""Called with (shards done, shards in all, name of the shard just done)."""


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
        ShardError: not a plain tar, cut short, damaged, not to be read; a member named outside of its folder; a key that occurs twice,
            or whose parts are not neighbours.
    """
    tar = Path(tar)
    entries: list[IndexEntry] = []
    for sample, offsets in scan_tar(tar):
        entries.append(describe(sample, offsets))
    return entries


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
    remove_leftovers(folder)
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


def _statistics(table: pa.Table) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("width", "height", "caption_length", "duration_s", "sample_rate", "frames"):
        extremes = pc.min_max(table[name]).as_py()
        found |= {f"{name}_min": extremes["min"], f"{name}_mean": pc.mean(table[name]).as_py(), f"{name}_max": extremes["max"]}
    return found
