"""Images: refuse what cannot be used, turn upright, convert to 8-bit RGB, resize, re-encode; or keep the bytes."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageOps

from shards import jpeg
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
    smaller: Mapping[str, bytes] = field(default_factory=dict)
    """The same at smaller sizes, by the extension of their parts: `256.jpg`."""


def clean_image(key: str, data: bytes, config: ImageConfig) -> CleanImage:
    """Check, convert and encode one image; the bytes are kept when nothing needs to change.

    Raises:
        SampleError: `empty_file`, `not_an_image`, `too_many_pixels`, `image_too_small`, `truncated`, `damaged_image` or
            `unsupported_image`.
    """
    if not data:
        raise SampleError(key, "empty_file", "The image has no bytes.")
    size = jpeg.plain_size(data)
    if size is not None and config.format in ("auto", "jpeg"):
        _check_size(key, size, config)
        plain = jpeg.decode(data, size, _least_side(config))
        if plain is not None:
            return _made(plain, size, "JPEG", data, config)
    with _pillow_settings(), _opened(key, data) as image:
        _check_size(key, image.size, config)
        changed = _needs_conversion(image, data)
        target = _target_format(image, config)
        kept = data if not changed and image.format == target else None
        upright = _upright_size(image)
        return _made(_pixels(key, image, data, config, changed=changed), upright, target, kept, config)


def _made(pixels: Image.Image | jpeg.Pixels, upright: tuple[int, int], target: str, kept: bytes | None, config: ImageConfig) -> CleanImage:
    """Encode at every size asked for; the bytes to be kept serve at their own."""
    sizes = _sizes(upright, config)
    encoded = [kept if kept is not None and size == upright else encode_image(pixels, size, target, config) for size in sizes]
    extension = EXTENSIONS[target]
    smaller = {f"{side}.{extension}": part for side, part in zip(_sides(config)[1:], encoded[1:], strict=True)}
    return CleanImage(extension, encoded[0], *sizes[0], smaller)


def image_size(key: str, data: bytes, config: ImageConfig) -> tuple[int, int]:
    """Width and height of an image as it comes, turned upright; only its header is read.

    Raises:
        SampleError: as `clean_image`, as far as the header tells.
    """
    if not data:
        raise SampleError(key, "empty_file", "The image has no bytes.")
    with _pillow_settings(), _opened(key, data) as image:
        _check_size(key, image.size, config)
        return _upright_size(image)


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


def _check_size(key: str, size: tuple[int, int], config: ImageConfig) -> None:
    width, height = size
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


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    return (height, width) if _orientation(image) >= 5 else (width, height)


def _sides(config: ImageConfig) -> list[int | None]:
    """Short sides to make, the largest first; None for that of the image."""
    return [*sorted(config.sizes, reverse=True)] or [config.size or config.short_side]


def _sizes(upright: tuple[int, int], config: ImageConfig) -> list[tuple[int, int]]:
    if config.size is not None:
        return [(config.size, config.size)]
    return [shrunk(upright, side) for side in _sides(config)]


def shrunk(size: tuple[int, int], short_side: int | None) -> tuple[int, int]:
    """Width and height at that short side; a smaller image stays as it is."""
    if short_side is None or min(size) <= short_side:
        return size
    scale = short_side / min(size)
    width, height = (max(short_side, round(side * scale)) for side in size)
    return width, height


def _least_side(config: ImageConfig) -> int | None:
    """What is to become much smaller is decoded at half its size or less, but not below twice the size wanted: the filter comes last."""
    side = _sides(config)[0]
    return None if side is None else 2 * side


def _pixels(key: str, image: Image.Image, data: bytes, config: ImageConfig, *, changed: bool) -> Image.Image | jpeg.Pixels:
    """Decode, by the fast decoder if it has no doubt. An image that is to be kept is decoded too: it may be damaged."""
    least = _least_side(config)
    if image.format == "JPEG" and image.mode == "RGB" and not changed:
        pixels = jpeg.decode(data, image.size, least)
        if pixels is not None:
            return pixels
    if least is not None:
        scale = min(1.0, least / min(image.size))
        image.draft(image.mode, (max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    decoded = _decoded(key, image)
    return _to_rgb(key, decoded) if changed else decoded


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


def encode_image(pixels: Image.Image | jpeg.Pixels, size: tuple[int, int], target: str, config: ImageConfig) -> bytes:
    """Resize and encode."""
    if target == "JPEG" and not (config.size is not None and config.square == "pad"):
        array = _colour_array(pixels)
        if array is not None and config.size is not None and config.square == "crop":
            array = _centre(array)
        if array is not None and jpeg.can_resize(array, *size):
            return jpeg.encode_resized(array, *size, quality=config.quality, subsampling=config.subsampling)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    return _save(_resize(image, size, config), target, config)


def _colour_array(pixels: Image.Image | jpeg.Pixels) -> jpeg.Pixels | None:
    if not isinstance(pixels, Image.Image):
        return pixels
    return np.asarray(pixels) if pixels.mode == "RGB" else None


def _centre(pixels: jpeg.Pixels) -> jpeg.Pixels:
    """The largest square around the centre."""
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[top : top + side, left : left + side]


def _resize(image: Image.Image, size: tuple[int, int], config: ImageConfig) -> Image.Image:
    filter_ = Image.Resampling.LANCZOS
    if image.size == size:
        return image
    if config.size is not None and config.square == "pad":
        return ImageOps.pad(image, size, filter_, color="white")
    if config.size is not None and config.square == "crop":
        return ImageOps.fit(image, size, filter_)
    return image.resize(size, filter_)


def _save(image: Image.Image, target: str, config: ImageConfig) -> bytes:
    buffer = io.BytesIO()
    plain = image if image.mode in _PLAIN_MODES else image.convert("RGB")
    if target == "PNG":
        plain.save(buffer, "PNG", compress_level=6)
    elif target == "JPEG":
        plain.save(buffer, "JPEG", quality=config.quality, subsampling={"444": 0, "420": 2}[config.subsampling])
    else:
        plain.save(buffer, target, quality=config.quality)
    return buffer.getvalue()
