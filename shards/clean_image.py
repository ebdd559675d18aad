"""Images: refuse what cannot be used, turn upright, convert to 8-bit RGB, resize, re-encode; or keep the bytes."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from shards.config import ImageConfig
from shards.errors import SampleError

EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
# What Pillow's decoders are seen to raise on damaged files.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    EOFError,
    NotImplementedError,
    struct.error,
    zlib.error,
)
_PLAIN_MODES = {"RGB", "L"}
_ALPHA_MODES = {"RGBA", "RGBa", "LA", "La", "PA"}
_WIDE_MODES = {"I;16", "I;16B", "I;16L", "I;16N", "I"}
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*")
_ORIENTATION_TAG = 0x0112


@dataclass(frozen=True, slots=True)
class CleanImage:
    """An image that every decoder shows as upright 8-bit RGB or grey."""

    extension: str
    data: bytes
    width: int
    height: int


def clean_image(key: str, data: bytes, config: ImageConfig) -> CleanImage:
    """Check, convert and encode one image; the bytes are kept when nothing needs to change.

    Raises:
        SampleError: `empty_file`, `not_an_image`, `too_many_pixels`, `image_too_small`, `truncated`, `damaged_image` or
            `unsupported_image`.
    """
    if not data:
        raise SampleError(key, "empty_file", "The image has no bytes.")
    with _pillow_settings():
        with _opened(key, data) as image:
            _check_header(key, image, config)
            changed = _needs_conversion(image, data)
            target = _target_format(image, config)
            image.draft(image.mode, _draft_size(image, config))
            pixels = _decoded(key, image)
            if changed:
                pixels = _to_rgb(key, pixels)
        resized = _resize(pixels, config)
        if not changed and resized is pixels and image.format == target:
            return CleanImage(EXTENSIONS[target], data, *pixels.size)
        return CleanImage(EXTENSIONS[target], _encode(resized, target, config), *resized.size)


def image_size(key: str, data: bytes, config: ImageConfig) -> tuple[int, int]:
    """Width and height of an image as it comes, turned upright; only its header is read.

    Raises:
        SampleError: as `clean_image`, as far as the header tells.
    """
    if not data:
        raise SampleError(key, "empty_file", "The image has no bytes.")
    with _pillow_settings(), _opened(key, data) as image:
        _check_header(key, image, config)
        width, height = image.size
        return (height, width) if _orientation(image) >= 5 else (width, height)


@contextmanager
def _pillow_settings() -> Iterator[None]:
    """Silence Pillow's warnings about odd files and its own pixel limit: ours is checked right after the header is read."""
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _opened(key: str, data: bytes) -> Image.Image:
    """Read the header only."""
    try:
        return Image.open(io.BytesIO(data))
    except DECODE_ERRORS as e:
        if data.startswith(_SIGNATURES):
            raise SampleError(key, "damaged_image", f"The header of the image ({len(data)} bytes) is cut short or damaged.") from e
        raise SampleError(key, "not_an_image", f"No decoder knows these {len(data)} bytes as an image.") from e


def _check_header(key: str, image: Image.Image, config: ImageConfig) -> None:
    width, height = image.size
    if width * height > config.max_pixels:
        raise SampleError(key, "too_many_pixels", f"The image is {width}x{height}; image.max_pixels is {config.max_pixels}.")
    if min(width, height) < config.min_side:
        raise SampleError(key, "image_too_small", f"The image is {width}x{height}; image.min_side is {config.min_side}.")


def _needs_conversion(image: Image.Image, data: bytes) -> bool:
    """Whether some decoder might show these bytes as anything but upright 8-bit RGB or grey."""
    wide_png = image.format == "PNG" and len(data) > 24 and data[24] > 8
    moving = getattr(image, "n_frames", 1) > 1
    return image.mode not in _PLAIN_MODES or "transparency" in image.info or wide_png or moving or _orientation(image) != 1


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except DECODE_ERRORS:  # a damaged EXIF block says nothing about the pixels
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _target_format(image: Image.Image, config: ImageConfig) -> str:
    if config.format != "auto":
        return config.format.upper()
    return image.format if image.format in EXTENSIONS else "PNG"


def _draft_size(image: Image.Image, config: ImageConfig) -> tuple[int, int]:
    """Size below which a JPEG must not be decoded: twice the size wanted, so that the last step is a good filter."""
    side = config.short_side or config.size
    if side is None or config.square != "crop":
        return image.size
    scale = min(1.0, 2 * side / min(image.size))
    return max(1, round(image.width * scale)), max(1, round(image.height * scale))


def _decoded(key: str, image: Image.Image) -> Image.Image:
    try:
        image.load()
        return ImageOps.exif_transpose(image) if _orientation(image) != 1 else image
    except DECODE_ERRORS as e:
        reason = "truncated" if "truncated" in str(e).lower() else "damaged_image"
        raise SampleError(key, reason, f"The {image.format} image of {image.width}x{image.height} does not decode: {e}.") from e


def _to_rgb(key: str, image: Image.Image) -> Image.Image:
    """Convert any mode: transparency over white, 16 bits scaled to 8."""
    if image.mode in _WIDE_MODES:
        values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    try:
        return image.convert("RGB") if image.mode != "F" else _refuse_float(key)
    except ValueError as e:
        raise SampleError(key, "unsupported_image", f"Pixels of mode {image.mode} cannot be shown as RGB.") from e


def _refuse_float(key: str) -> Image.Image:
    raise SampleError(key, "unsupported_image", "The pixels are floating-point numbers without a known range.")


def _resize(image: Image.Image, config: ImageConfig) -> Image.Image:
    filter_ = Image.Resampling.LANCZOS
    if config.size is not None:
        side = (config.size, config.size)
        if image.size == side:
            return image
        if config.square == "pad":
            return ImageOps.pad(image, side, filter_, color="white")
        if config.square == "stretch":
            return image.resize(side, filter_)
        return ImageOps.fit(image, side, filter_)
    if config.short_side is None or min(image.size) <= config.short_side:
        return image
    scale = config.short_side / min(image.size)
    width, height = (max(config.short_side, round(side * scale)) for side in image.size)
    return image.resize((width, height), filter_)


def _encode(image: Image.Image, target: str, config: ImageConfig) -> bytes:
    buffer = io.BytesIO()
    plain = image if image.mode in _PLAIN_MODES else image.convert("RGB")
    if target == "PNG":
        plain.save(buffer, "PNG", compress_level=6)
    else:
        plain.save(buffer, target, quality=config.quality)
    return buffer.getvalue()
