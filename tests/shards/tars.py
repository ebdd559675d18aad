"""Tiny data sets in the WebDataset layout, written by webdataset itself."""

import gc
import io
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from PIL import Image

from shards.index import adopt
from shards.sample import Sample


def jpeg(number: int, width: int = 24, height: int = 16) -> bytes:
    """Encode a picture whose content depends on its number."""
    pixels = np.random.default_rng(number).integers(0, 255, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def pair(number: int) -> Sample:
    """Make sample `k0000`, `k0001`, ... with a picture, a caption and fields."""
    fields = json.dumps({"number": number}).encode()
    return Sample(f"k{number:04d}", {"jpg": jpeg(number), "json": fields, "txt": f"caption {number}".encode()})


def write_tar(path: Path, samples: list[Sample]) -> Path:
    """Write one tar with fixed metadata."""
    with path.open("wb") as stream, webdataset.TarWriter(stream, encoder=False, mtime=0) as writer:
        for sample in samples:
            writer.write({"__key__": sample.key, **sample.parts})
    return path


def make_data_set(folder: Path, rows_per_shard: tuple[int, ...] = (5, 3, 4)) -> Path:
    """Write and index a data set of numbered pairs."""
    folder.mkdir(parents=True, exist_ok=True)
    first = 0
    for shard, rows in enumerate(rows_per_shard):
        write_tar(folder / f"s-{shard:03d}.tar", [pair(number) for number in range(first, first + rows)])
        first += rows
    adopt(folder)
    return folder


def read_with_webdataset(tars: list[Path]) -> list[dict[str, Any]]:
    """Read whole tars with webdataset; it leaves its files to the garbage collector, which is made to warn here and not in another test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        samples = list(webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False, empty_check=False))
        gc.collect()
    return samples


def flip_bit(path: Path, offset: int) -> None:
    """Flip the lowest bit of one byte of a file, keeping its size."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
