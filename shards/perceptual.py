"""A picture's look in 200 bytes: pictures that a person calls the same have nearly the same, whatever their size, format and quality."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from shards.clean_image import DECODE_ERRORS

LOOK_VERSION = 1
"""Raised whenever the same picture would get another look."""
THUMBNAIL_BYTES = 192
TOLERANCE = 24
"""Largest difference of any value of two thumbnails that look the same, of 255; what JPEG of quality 20 and halving change stays below."""

_SIDE, _KEPT = 32, 8
_SCALE = 1 << 10
_WAVES = np.rint(_SCALE * np.cos(np.pi * np.outer(np.arange(_KEPT), 2 * np.arange(_SIDE) + 1) / (2 * _SIDE))).astype(np.int64)
_LEAST_DEVIATION = 1.0  # of 255: a blank page has no look of its own


@dataclass(frozen=True, slots=True)
class Look:
    """What is compared of a picture."""

    structure: int
    """64 bits: which of the 8 x 8 slowest waves of its brightness are strong. Pictures are sought by the number of bits that differ."""
    thumbnail: bytes
    """8 x 8 pixels of YCbCr. Those found are compared by it: the structure alone takes a red heart for a blue one."""


def look_of(data: bytes) -> Look | None:
    """Decode an image and return its look; None where it does not decode, or is as good as blank.

    The structure is a DCT hash in which a bit says that a coefficient is above 0.2 times the root mean square of all, instead of above
    their median: on drawings and symmetric pictures many coefficients are zero, and their bits would be noise. Whole numbers
    throughout, so that every machine gets the same.

    Source: Zauner 2010, "Implementation and benchmarking of perceptual image hash functions", for the DCT hash.
    """
    pixels = _small(data)
    if pixels is None:
        return None
    luma = pixels[..., 0].astype(np.int64)
    if luma.std() < _LEAST_DEVIATION:
        return None
    waves = (_WAVES @ luma @ _WAVES.T) >> 20
    waves[0, 0] = 0
    strong = (waves > 0) & (25 * waves.size * waves**2 > np.square(waves).sum())
    cells = pixels.reshape(_KEPT, _SIDE // _KEPT, _KEPT, _SIDE // _KEPT, 3).mean(axis=(1, 3))
    return Look(int(np.packbits(strong).view(">u8")[0]), np.rint(cells).astype(np.uint8).tobytes())


def thumbnails_differ(one: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Tell of pairs of (p, 192) thumbnails whether any value differs by more than the tolerance."""
    differ: npt.NDArray[np.bool_] = np.abs(one.astype(np.int16) - other.astype(np.int16)).max(axis=1, initial=0) > TOLERANCE
    return differ


def _small(data: bytes) -> npt.NDArray[np.uint8] | None:
    """Decode to 32 x 32 YCbCr, upright, transparency over white."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, about odd files
            with Image.open(io.BytesIO(data)) as image:
                image.draft("RGB", (2 * _SIDE, 2 * _SIDE))
                opaque = _opaque(ImageOps.exif_transpose(image))
            way = Image.Resampling.BOX if min(opaque.size) >= 2 * _SIDE else Image.Resampling.LANCZOS
            return np.asarray(opaque.resize((_SIDE, _SIDE), way).convert("YCbCr"))
    except (*DECODE_ERRORS, Image.DecompressionBombError):
        return None


def _opaque(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
