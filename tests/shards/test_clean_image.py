import io

import numpy as np
import pytest
from PIL import Image

from shards.clean_image import clean_image
from shards.config import ImageConfig
from shards.errors import SampleError
from tests.shards.pictures import bomb, decoded, encoded, gradient, palette_png, rotated_photo, wide_png


@pytest.mark.parametrize(("kind", "extension"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
def test_bytes_stay_when_nothing_needs_change(kind: str, extension: str) -> None:
    data = encoded(gradient(), kind)
    clean = clean_image("k", data, ImageConfig(short_side=32))
    assert (clean.extension, clean.data, clean.width, clean.height) == (extension, data, 48, 32)


def test_grey_image_stays() -> None:
    data = encoded(gradient().convert("L"), "PNG")
    assert clean_image("k", data, ImageConfig()).data == data


def test_exif_rotation_is_applied() -> None:
    clean = clean_image("k", rotated_photo(), ImageConfig())
    assert (clean.width, clean.height) == (32, 48)
    pixels = decoded(clean.data).astype(int)
    assert pixels.shape == (48, 32, 3)
    assert pixels[-1, 16, 0] > 230 > 25 > pixels[0, 16, 0]  # red now grows downwards
    assert pixels[24, 0, 1] > 230 > 25 > pixels[24, -1, 1]
    assert Image.open(io.BytesIO(clean.data)).getexif().get(0x0112, 1) == 1


def test_cmyk_becomes_rgb() -> None:
    clean = clean_image("k", encoded(gradient().convert("CMYK"), quality=95), ImageConfig())
    assert clean.extension == "jpg"
    assert Image.open(io.BytesIO(clean.data)).mode == "RGB"
    assert np.abs(decoded(clean.data).astype(int) - np.asarray(gradient()).astype(int)).mean() < 6


def test_sixteen_bits_are_scaled() -> None:
    pixels = decoded(clean_image("k", wide_png(), ImageConfig()).data)
    expected = np.rint(np.linspace(0, 65535, 48 * 32).reshape(32, 48).astype(np.uint16) / 257)
    assert np.array_equal(pixels[..., 0], expected)


def test_transparency_goes_over_white() -> None:
    for data in (palette_png(), encoded(Image.open(io.BytesIO(palette_png())).convert("RGBA"), "PNG")):
        pixels = decoded(clean_image("k", data, ImageConfig()).data)
        assert (pixels[:, :20] == 255).all()
        assert (pixels[:, 20:] == (0, 0, 255)).all()


@pytest.mark.parametrize("mode", ["1", "P", "LA", "RGBA", "CMYK", "I", "F"])
def test_odd_modes(mode: str) -> None:
    data = encoded(gradient().convert("L" if mode in "IF" else "RGB").convert(mode), "TIFF")
    if mode == "F":
        with pytest.raises(SampleError, match="unsupported_image"):
            clean_image("k", data, ImageConfig())
    else:
        assert decoded(clean_image("k", data, ImageConfig()).data).shape == (32, 48, 3)


def test_first_frame_of_a_moving_picture() -> None:
    data = encoded(gradient(), "GIF", save_all=True, append_images=[gradient().rotate(90)])
    clean = clean_image("k", data, ImageConfig())
    assert clean.extension == "png"
    assert decoded(clean.data)[16, -1, 0] > 200


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (ImageConfig(short_side=16), (24, 16)),
        (ImageConfig(short_side=64), (48, 32)),
        (ImageConfig(size=20), (20, 20)),
        (ImageConfig(size=20, square="pad"), (20, 20)),
        (ImageConfig(size=20, square="stretch"), (20, 20)),
        (ImageConfig(size=64), (64, 64)),
    ],
)
def test_resize(config: ImageConfig, size: tuple[int, int]) -> None:
    clean = clean_image("k", encoded(gradient()), config)
    assert (clean.width, clean.height) == size
    assert decoded(clean.data).shape == (size[1], size[0], 3)


def test_scaled_decoding_keeps_the_picture() -> None:
    large = gradient(900, 600)
    pixels = decoded(clean_image("k", encoded(large, quality=95), ImageConfig(short_side=50, quality=95)).data).astype(int)
    assert pixels.shape == (50, 75, 3)
    assert np.abs(pixels - np.asarray(large.resize((75, 50), Image.Resampling.LANCZOS)).astype(int)).mean() < 2


@pytest.mark.parametrize(("kind", "extension"), [("jpeg", "jpg"), ("png", "png"), ("webp", "webp")])
def test_format(kind: str, extension: str) -> None:
    clean = clean_image("k", encoded(gradient(), "BMP"), ImageConfig(format=kind))  # type: ignore[arg-type]
    assert clean.extension == extension


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty_file"),
        (b"hello", "not_an_image"),
        (encoded(gradient(200, 200))[:-500], "truncated"),
        (encoded(gradient())[:-200], "damaged_image"),
        (encoded(gradient(200, 200), "PNG")[:-300], "truncated"),
        (bomb(), "too_many_pixels"),
    ],
)
def test_refused(data: bytes, reason: str) -> None:
    with pytest.raises(SampleError, match=f"^k: {reason}: ") as caught:
        clean_image("k", data, ImageConfig())
    assert caught.value.reason == reason


def test_too_small() -> None:
    with pytest.raises(SampleError, match=r"image_too_small: The image is 48x32; image.min_side is 40"):
        clean_image("k", encoded(gradient()), ImageConfig(min_side=40))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_any_damage_is_a_sample_error(kind: str) -> None:
    """Flip and cut bytes anywhere: an image or a SampleError, nothing else."""
    whole = encoded(gradient(), kind)
    generator = np.random.default_rng(0)
    reasons = set()
    for _ in range(60):
        data = bytearray(whole)
        for place in generator.integers(0, len(data), 4):
            data[place] = generator.integers(256)
        try:
            clean_image("k", bytes(data[: generator.integers(len(data) // 2, len(data) + 1)]), ImageConfig())
        except SampleError as e:
            reasons.add(e.reason)
    assert reasons <= {"truncated", "damaged_image", "not_an_image", "unsupported_image", "too_many_pixels", "image_too_small"}


def test_pillows_own_limit_is_left_alone() -> None:
    limit = Image.MAX_IMAGE_PIXELS
    clean_image("k", encoded(gradient()), ImageConfig())
    assert limit == Image.MAX_IMAGE_PIXELS
