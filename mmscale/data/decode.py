"""Bytes of an image part to RGB pixels. simplejpeg releases the GIL and decodes at a reduced scale; Pillow takes what it does not."""

from __future__ import annotations

import io
import struct
import threading
import zlib
from contextlib import suppress
from collections.abc import Callable

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps

from shards.errors import SampleError

MAX_PIXELS = 89_478_485
"""Larger images are refused from their header, before any memory is taken (Pillow's own limit)."""

Fit = Callable[[int, int], tuple[int, int]]
"""(height, width) to (height, width), in pixels."""

SCRATCH_BYTES = 1 << 22
"""Largest image that a thread decodes into memory it uses again. New memory for each image would cost 7 % of the decode of one of
256 x 256: the system clears every page of it first."""

_JPEG = frozenset({"jpg", "jpeg"})
_ORIENTATION = 0x0112
_EXIF_WITHIN = 4096
_PILLOW_FAULTS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


class Scratch(threading.local):
    """Memory of a thread for the decoded pixels of one image at a time, until they are copied to where they belong."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    def take(self, size: int) -> NDArray[np.uint8] | None:
        """At least so many bytes, with what the last image left in them; None for more than `SCRATCH_BYTES`."""
        if size > SCRATCH_BYTES:
            return None
        if size > len(self._bytes):
            self._bytes = np.empty(size, np.uint8)
        return self._bytes


_scratch = Scratch()


def decode_image(
    extension: str,
    data: bytes,
    size: int | None = None,
    *,
    short_side: int | None = None,
    key: str = "",
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """Decode an image to RGB and make a square of it: the whole image squeezed, or its middle.

    EXIF orientation is applied, transparency is laid over white, 16-bit greys are scaled to 8 bits.

    Args:
        extension: of the part, without the leading dot; `000.jpg` counts as `jpg`.
        data: the encoded bytes.
        size: side of the result in pixels; None keeps the image's own height and width.
        short_side: at least `size`: the result is the middle of the image scaled to this short side. None squeezes the whole image.
        key: the sample's key, for the error.
        out: (size, size, 3) C-contiguous uint8 to write into; None allocates.

    Returns:
        (size, size, 3) uint8; `out` where it was given.

    Raises:
        SampleError: the bytes are no image, or a truncated or huge one.
    """
    if extension.rpartition(".")[2].lower() in _JPEG:
        pixels = _decode_jpeg(data, size, short_side, key, out)
        if pixels is not None:
            return pixels
    return _decode_pillow(data, size, short_side, key, out)


def decode_fitted(extension: str, data: bytes, fit: Fit, *, key: str = "") -> NDArray[np.uint8]:
    """Decode an image to RGB in the size that is chosen from its own; otherwise as `decode_image`.

    Args:
        extension: of the part, without the leading dot.
        data: the encoded bytes.
        fit: (height, width) of the upright image to those of the result, in pixels.
        key: the sample's key, for the error.

    Returns:
        (height, width, 3) uint8.

    Raises:
        SampleError: the bytes are no image, or a truncated or huge one.
    """
    if extension.rpartition(".")[2].lower() in _JPEG:
        with suppress(ValueError):  # of a damaged file, at which Pillow has a look
            plain = _plain_size(data, key)
            if plain is not None:
                rows, columns = fit(*plain)
                pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=rows, min_width=columns)
                return _scaled(Image.fromarray(pixels), rows, columns)
    try:
        with Image.open(io.BytesIO(data)) as image:
            _check_size(image.width, image.height, key)
            upright = _to_rgb(ImageOps.exif_transpose(image))
            return _scaled(upright, *fit(upright.height, upright.width))
    except _PILLOW_FAULTS as e:
        raise SampleError(key, "undecodable", f"the image does not decode ({' '.join(str(e).split())})") from e


def _scaled(image: Image.Image, height: int, width: int) -> NDArray[np.uint8]:
    return np.array(image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC))


def _decode_jpeg(
    data: bytes, size: int | None, short_side: int | None, key: str, out: NDArray[np.uint8] | None
) -> NDArray[np.uint8] | None:
    """The fast way; None where Pillow must have a look (not a plain JPEG, rotated by EXIF, CMYK, damaged)."""
    try:
        plain = _plain_size(data, key)
        if plain is None:
            return None
        height, width = plain
        if size is None:
            return np.asarray(simplejpeg.decode_jpeg(data, "RGB"))
        if height == width == size and short_side in (None, size):
            target = np.empty((size, size, 3), np.uint8) if out is None else out
            simplejpeg.decode_jpeg(data, "RGB", buffer=target)
            return target
        least = short_side or size
        room = _scratch.take(3 * height * width)  # a smaller scale of the format takes less
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB", min_height=least, min_width=least, buffer=room)
        if short_side is not None and min(pixels.shape[:2]) == short_side:
            return _middle(pixels, size, out)
        return _resize(Image.fromarray(pixels), size, short_side, out)
    except ValueError:
        return None


def _plain_size(data: bytes, key: str) -> tuple[int, int] | None:
    """Height and width of a JPEG that the fast decoder shows as it is meant; None of one that is rotated by EXIF, or CMYK."""
    height, width, colour, _ = simplejpeg.decode_jpeg_header(data)
    _check_size(width, height, key)
    return None if colour in ("CMYK", "YCCK") or _is_rotated(data) else (height, width)


def _decode_pillow(
    data: bytes, size: int | None, short_side: int | None, key: str, out: NDArray[np.uint8] | None
) -> NDArray[np.uint8]:
    try:
        with Image.open(io.BytesIO(data)) as image:
            _check_size(image.width, image.height, key)
            if size is not None:
                image.draft("RGB", (short_side or size,) * 2)
            upright = _to_rgb(ImageOps.exif_transpose(image))
            return np.array(upright) if size is None else _resize(upright, size, short_side, out)
    except _PILLOW_FAULTS as e:
        raise SampleError(key, "undecodable", f"the image does not decode ({' '.join(str(e).split())})") from e


def _middle(pixels: NDArray[np.uint8], size: int, out: NDArray[np.uint8] | None) -> NDArray[np.uint8]:
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    middle = pixels[top : top + size, left : left + size]
    if out is None:
        return np.array(middle)
    out[...] = middle
    return out


def _resize(image: Image.Image, size: int, short_side: int | None, out: NDArray[np.uint8] | None) -> NDArray[np.uint8]:
    if short_side is None:
        resized = image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BICUBIC)
    elif min(image.size) == short_side:
        return _middle(np.asarray(image), size, out)
    else:
        side = min(image.size) * size / short_side
        left, top = ((length - side) / 2 for length in image.size)
        resized = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    if out is None:
        return np.array(resized)
    out[...] = np.asarray(resized)
    return out


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64)
        return Image.fromarray((grey // 257).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, (255, 255, 255, 255)), layer).convert("RGB")
    return image.convert("RGB")


def _check_size(width: int, height: int, key: str) -> None:
    if width * height > MAX_PIXELS:
        raise SampleError(key, "too_large", f"the image is {width} x {height} pixels, more than the limit of {MAX_PIXELS}")


def _is_rotated(data: bytes) -> bool:
    if data.find(b"Exif\0\0", 0, _EXIF_WITHIN) < 0:
        return False
    with Image.open(io.BytesIO(data)) as image:
        return image.getexif().get(_ORIENTATION, 1) not in (0, 1)
