"""The images of the read benchmark: shards of JPEGs about as large as photos of their size, from smooth colour and noise."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from shards.tar import TarStream

QUALITY, NOISE = 90, 12


def write_images(folder: Path, shards: int, rows: int, width: int, height: int) -> None:
    """Write tars of JPEGs with a caption each, unless the folder is there already: 256 x 256 take about 30 KB, 640 x 480 about 120."""
    if folder.exists():
        return
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        generator = np.random.default_rng(shard)
        with (partial / f"{shard:05d}.tar").open("wb") as file:
            tar = TarStream(file)
            for row in range(rows):
                key = f"{shard:05d}-{row:05d}"
                tar.add(f"{key}.jpg", jpeg(generator, width, height))
                tar.add(f"{key}.txt", b"a picture")
            tar.close()
    partial.rename(folder)


def jpeg(generator: np.random.Generator, width: int, height: int) -> bytes:
    """Draw one image."""
    colours = Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    smooth = np.asarray(colours.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    noisy = smooth + NOISE * generator.standard_normal((height, width, 3), dtype=np.float32)
    stream = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=QUALITY)
    return stream.getvalue()
