"""JPEG in, resized, JPEG out: the path that most images of most data sets take, by the libraries that use the processor's vectors.

libjpeg-turbo (simplejpeg) decodes and encodes; swscale (PyAV) resizes and converts to luma and chroma in one pass. Pillow, which does
everything else, takes twice as long for the same picture. Rounding is the same on every processor (`BITEXACT`), so that hosts of
different makes write the same bytes.

Shape letters: H rows, W columns, C channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

Pixels = npt.NDArray[np.uint8]

_FLAGS = (
    Interpolation.LANCZOS
    | Interpolation.ACCURATE_RND
    | Interpolation.BITEXACT
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
)
LEAST_SIDE = 16
"""swscale is not made for smaller pictures."""
MOST_SHRINKING = 8
"""Nor for filters that reach further than this many times their width at full size."""
_reformatter = VideoReformatter()


def plain_size(data: bytes) -> tuple[int, int] | None:
    """Read width and height of a JPEG that every decoder shows alike: 8 bits, luma and chroma, no Exif or Adobe segment, no second picture.

    Returns:
        None for any other file, whatever it is.

    Source: ITU-T T.81, annex B.
    """
    if data[:3] != b"\xff\xd8\xff":
        return None
    place = 2
    while place + 10 < len(data) and data[place] == 0xFF:
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        if marker in (0xC0, 0xC2):
            bits, components = data[place + 4], data[place + 9]
            height, width = int.from_bytes(data[place + 5 : place + 7], "big"), int.from_bytes(data[place + 7 : place + 9], "big")
            numbers = data[place + 10 : place + 19 : 3]
            return (width, height) if (bits, components, numbers) == (8, 3, b"\1\2\3") and width and height else None
        if not (marker in (0xC4, 0xDB, 0xDD, 0xFE) or 0xE0 <= marker <= 0xEF) or length < 2:
            return None
        if marker == 0xEE or data[place + 4 : place + 8] in (b"Exif", b"MPF\0"):
            return None
        place += 2 + length
    return None


def decode(data: bytes, shape: tuple[int, int], least_side: int | None) -> Pixels | None:
    """Decode a colour JPEG, at half, a quarter or an eighth of its size if it is to be made much smaller.

    Args:
        data: the file.
        shape: width and height from its header.
        least_side: the shorter side needs no more than so many pixels; None for all of them.

    Returns:
        HWC RGB, or None where the decoder has the least doubt about the file: Pillow is to judge it.
    """
    scale = 1
    if least_side is not None:
        scale = max(s for s in (1, 2, 4, 8) if s == 1 or min(shape) // s >= least_side)
    width, height = (-(-side // scale) for side in shape)
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB", min_width=width if scale > 1 else 0, min_height=height if scale > 1 else 0)
    except ValueError:
        return None
    return pixels


def can_resize(pixels: Pixels, width: int, height: int) -> bool:
    """Whether `encode_resized` can make this size of these pixels."""
    sides = (*pixels.shape[:2], width, height)
    shrinking = max(pixels.shape[1] / width, pixels.shape[0] / height)
    return pixels.ndim == 3 and min(sides) >= LEAST_SIDE and shrinking <= MOST_SHRINKING


def encode_resized(pixels: Pixels, width: int, height: int, *, quality: int, subsampling: str) -> bytes:
    """Resize by a Lanczos filter and encode.

    Args:
        pixels: HWC RGB.
        width: wanted.
        height: wanted.
        quality: 1 to 100.
        subsampling: of chroma, "420" or "444".
    """
    luma, blue, red = _resized_planes(pixels, width, height)
    if subsampling == "420":
        # TurboJPEG reads luma in pairs: beyond an odd side it takes what lies behind a row, which must not be chance.
        luma = _even(luma)[:height, :width]
        blue, red = _halved(_even(blue)), _halved(_even(red))
    data: bytes = simplejpeg.encode_jpeg_yuv_planes(luma, blue, red, quality)
    return data


def _resized_planes(pixels: Pixels, width: int, height: int) -> list[Pixels]:
    """Return luma and both chroma planes, each HW at full resolution, in the full range that JPEG has."""
    frame = VideoFrame.from_numpy_buffer(np.ascontiguousarray(pixels), "rgb24")
    resized = _reformatter.reformat(
        frame,
        width,
        height,
        "yuvj444p",
        src_colorspace=Colorspace.ITU601,
        dst_colorspace=Colorspace.ITU601,
        interpolation=_FLAGS,
        src_color_range=ColorRange.JPEG,
        dst_color_range=ColorRange.JPEG,
        threads=1,
    )
    return [_plane(plane, width, height) for plane in resized.planes]


def _plane(plane: Any, width: int, height: int) -> Pixels:
    """Rows of a plane without the bytes that fill them up."""
    return np.ascontiguousarray(np.frombuffer(plane, np.uint8).reshape(height, plane.line_size)[:, :width])


def _even(plane: Pixels) -> Pixels:
    """Repeat the last row and column of odd ones."""
    height, width = plane.shape
    if height % 2 == 0 and width % 2 == 0:
        return plane
    even = np.empty((height + height % 2, width + width % 2), np.uint8)
    even[:height, :width] = plane
    even[:height, width:] = plane[:, -1:]
    even[height:] = even[height - 1]
    return even


def _halved(plane: Pixels) -> Pixels:
    """Average two by two, as JPEG places chroma: swscale's own halving is a quarter of a pixel to the left, as in MPEG-2."""
    rows = plane[0::2].astype(np.uint16) + plane[1::2]
    averages: Pixels = ((rows[:, 0::2] + rows[:, 1::2] + 2) >> 2).astype(np.uint8)
    return averages
