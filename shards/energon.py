"""Let Megatron-Energon read a data set in place: `NAME.tar.idx` beside each tar, and the files of its `.nv-meta` folder."""

from __future__ import annotations

import json
import re
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import yaml

from shards.commit import commit_bytes
from shards.errors import ShardError
from shards.manifest import Manifest

_PART = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
_META = re.compile(r"__[^/]*__($|/)")

FORMAT_VERSION = "7.4.1"
"""Release of Energon whose format this is."""
META_FOLDER = ".nv-meta"


def write_energon(manifest: Manifest, *, progress: Callable[[int, int, str], None] | None = None) -> None:
    """Write what Energon's training reads: an index a tar, the number of samples, one split `train` of all shards, crude samples.

    Raises:
        ShardError: rows are masked; a key occurs twice in the data set, which Energon refuses; a shard has no sample; a tar cannot be read.

    Source: megatron-energon, flavors/webdataset/itar.py and prepare.py.
    """
    if not (manifest.table["mask"].null_count == manifest.table["location"].null_count == len(manifest.shards)):
        raise ShardError(
            f"{manifest.root!r} is a version that leaves out rows or whose tars lie elsewhere, and Energon would know nothing of it. Write "
            f"it densely first: `mmscale shards merge {manifest.root} out=NEW rewrite=true`."
        )
    seen: dict[str, str] = {}
    for done, info in enumerate(manifest.shards, 1):
        if not info.rows:
            raise ShardError(f"The shard {info.shard!r} has no samples, which Energon refuses. Delete it and index the folder again.")
        tar = manifest.folder / info.shard
        starts, end = _sample_starts(tar, seen)
        if len(starts) != info.rows:
            raise ShardError(
                f"The tar {str(tar)!r} has {info.rows} samples, and Energon would find {len(starts)}: it takes hidden files in folders for "
                "samples. Write the data set again: `mmscale shards write source=webdataset`."
            )
        commit_bytes(tar.with_name(tar.name + ".idx"), struct.pack(f"<{len(starts) + 1}Q", *starts, end))
        if progress:
            progress(done, len(manifest.shards), info.shard)
    _write_meta(manifest)


def _write_meta(manifest: Manifest) -> None:
    folder = manifest.folder / META_FOLDER
    folder.mkdir(exist_ok=True)
    counts = {info.shard: info.rows for info in manifest.shards}
    splits = {"split_parts": {"train": list(counts), "val": [], "test": []}, "exclude": []}
    kind = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
    commit_bytes(folder / "split.yaml", yaml.safe_dump(splits, sort_keys=False).encode())
    commit_bytes(folder / "dataset.yaml", yaml.safe_dump(kind, sort_keys=False).encode())
    info = {"energon_version": FORMAT_VERSION, "shard_counts": counts}
    commit_bytes(folder / ".info.json", json.dumps(info, indent=2).encode())  # last: it makes the folder a data set of Energon's


def _sample_starts(tar: Path, seen: dict[str, str]) -> tuple[list[int], int]:
    """Return the byte where each sample's first header begins, long names' headers included, and where the archive ends."""
    starts: list[int] = []
    last: str | None = None
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                split = _PART.match(member.name) if member.isreg() and not _META.match(member.name) else None
                if split is None or split[1] == last:
                    continue
                last = split[1]
                if last in seen:
                    raise ShardError(
                        f"{tar.name}:{last}: this key is in {seen[last]!r} too, and Energon wants each only once in a data set. "
                        "Write the data set again, which renames such keys: `mmscale shards write source=webdataset`."
                    )
                seen[last] = tar.name
                starts.append(member.offset)
            return starts, archive.offset
    except (tarfile.ReadError, OSError) as e:
        raise ShardError(f"The tar {str(tar)!r} cannot be read: {e}. Fetch or write it again.") from e
