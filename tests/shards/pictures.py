"""Small image files of every awkward kind, made on the fly."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ORIENTATION = 0x0112


def gradient(width: int = 48, height: int = 32) -> Image.Image:
    """Red grows to the right, green downwards."""
    red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([red, green, np.full_like(red, 128)], axis=-1).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rotated_photo() -> bytes:
    """Stored lying on its side with the EXIF note to turn it: upright it is 32 wide and 48 high."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    return encoded(gradient(), exif=exif, quality=95)


def wide_png() -> bytes:
    """16 bits a pixel: a grey ramp over the whole range."""
    return encoded(Image.fromarray(np.linspace(0, 65535, 48 * 32).reshape(32, 48).astype(np.uint16)), "PNG")


def palette_png() -> bytes:
    """A palette with one transparent colour: left half see-through, right half blue."""
    image = Image.new("P", (40, 30), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (20, 0, 40, 30))
    return encoded(image, "PNG", transparency=0)


def bomb(side: int = 20_000) -> bytes:
    """A tiny PNG of side x side one-bit pixels."""
    packer = zlib.compressobj(9)
    row = bytes(1 + (side + 7) // 8)
    data = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    parts = ((b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)), (b"IDAT", data), (b"IEND", b""))
    chunks = (struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def decoded(data: bytes) -> np.ndarray:
    """HWC uint8 RGB."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def photo_folder(folder: Path, count: int = 6) -> Path:
    """A folder of good pairs, each picture another."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"photo{number}.jpg").write_bytes(encoded(gradient(40 + number, 30)))
        (folder / f"photo{number}.txt").write_text(f"photo number {number}")
    return folder
