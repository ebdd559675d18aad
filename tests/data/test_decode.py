import io

import numpy as np
import pytest
from PIL import Image

from mmscale.data import decode
from mmscale.data.decode import decode_image
from shards.errors import SampleError


def picture(width: int = 40, height: int = 24) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 255 // width, y * 255 // height, np.full_like(x, 60)], axis=-1).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def test_png_of_the_right_size_is_exact():
    image = picture(16, 16)
    assert np.array_equal(decode_image("png", encoded(image, "PNG"), 16), np.asarray(image))


def test_jpeg_is_decoded_straight_into_the_buffer():
    data = encoded(picture(32, 32), "JPEG", quality=95)
    batch = np.zeros((3, 32, 32, 3), np.uint8)
    result = decode_image("jpg", data, 32, out=batch[1])
    assert np.shares_memory(result, batch)
    assert not batch[0].any()
    assert abs(batch[1].astype(int) - np.asarray(picture(32, 32)).astype(int)).mean() < 4


@pytest.mark.parametrize("extension", ["jpg", "JPEG", "000.jpg", "png", "webp"])
def test_other_sizes_are_squeezed_to_the_square(extension):
    kind = {"png": "PNG", "webp": "WEBP"}.get(extension, "JPEG")
    result = decode_image(extension, encoded(picture(200, 120), kind, quality=95), 20)
    expected = np.asarray(picture(200, 120).resize((20, 20), Image.Resampling.BICUBIC)).astype(int)
    assert result.shape == (20, 20, 3)
    assert abs(result.astype(int) - expected).mean() < 5


def test_without_a_size_the_image_keeps_its_own():
    assert decode_image("jpg", encoded(picture(), "JPEG")).shape == (24, 40, 3)
    assert decode_image("png", encoded(picture(), "PNG")).shape == (24, 40, 3)


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decode_image("jpg", encoded(picture(48, 48), "JPEG", exif=exif, quality=95), 48)
    assert abs(turned.astype(int) - np.rot90(np.asarray(picture(48, 48)), -1).astype(int)).mean() < 4


def test_exif_that_turns_nothing_keeps_the_fast_way():
    exif = Image.Exif()
    exif[0x0112] = 1
    with_exif, without = (encoded(picture(48, 48), "JPEG", quality=95, **options) for options in ({"exif": exif}, {}))
    assert np.array_equal(decode_image("jpg", with_exif, 48), decode_image("jpg", without, 48))


def test_modes_become_rgb():
    size = 16
    half = Image.new("RGBA", (size, size), (255, 0, 0, 0))
    assert (decode_image("png", encoded(half, "PNG"), size) == 255).all()
    deep = Image.fromarray(np.full((size, size), 65535, np.uint16))
    assert (decode_image("png", encoded(deep, "PNG"), size) == 255).all()
    cmyk = Image.new("RGB", (size, size), (200, 30, 30)).convert("CMYK")
    assert abs(decode_image("jpg", encoded(cmyk, "JPEG", quality=95), size).astype(int) - [200, 30, 30]).max() < 30
    palette = Image.new("RGB", (size, size), (10, 200, 30)).convert("P")
    assert abs(decode_image("png", encoded(palette, "PNG"), size).astype(int) - [10, 200, 30]).max() < 60
    grey = Image.new("L", (size, size), 77)
    assert abs(decode_image("jpg", encoded(grey, "JPEG"), size).astype(int) - 77).max() < 3


def test_a_png_named_jpg_is_decoded_all_the_same():
    assert np.array_equal(decode_image("jpg", encoded(picture(16, 16), "PNG"), 16), np.asarray(picture(16, 16)))


@pytest.mark.parametrize(("extension", "kind"), [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")])
@pytest.mark.parametrize("part", [0.0, 0.01, 0.5])
def test_what_does_not_decode_is_a_sample_error_that_names_the_key(extension, kind, part):
    data = encoded(picture(64, 64), kind)
    with pytest.raises(SampleError, match=r"cat-17: undecodable: the image does not decode"):
        decode_image(extension, data[: int(len(data) * part)], 64, key="cat-17")


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_huge_images_are_refused_from_their_header(kind, monkeypatch):
    monkeypatch.setattr(decode, "MAX_PIXELS", 500)
    with pytest.raises(SampleError, match=r"too_large: the image is 40 x 24 pixels, more than the limit of 500"):
        decode_image("jpg", encoded(picture(), kind), 8, key="big")


def test_a_bomb_is_a_sample_error():
    bomb = encoded(Image.new("1", (15000, 15000)), "PNG")
    with pytest.raises(SampleError, match="undecodable"):
        decode_image("png", bomb, 8)


def test_the_middle_of_an_image_of_the_right_short_side_is_cut_out_exactly():
    data = encoded(picture(40, 24), "JPEG", quality=95)
    whole = decode_image("jpg", data)
    for extension in ("jpg", "unknown"):  # simplejpeg's way, Pillow's way
        assert np.array_equal(decode_image(extension, data, 16, short_side=24), whole[4:20, 12:28])
    out = np.empty((16, 16, 3), np.uint8)
    assert decode_image("jpg", data, 16, short_side=24, out=out) is out
    assert np.array_equal(out, whole[4:20, 12:28])


@pytest.mark.parametrize(("width", "height"), [(400, 200), (150, 300), (20, 10), (64, 64)])
def test_the_middle_is_that_of_resizing_first(width, height):
    data = encoded(picture(width, height), "PNG")
    found = decode_image("png", data, 32, short_side=48).astype(int)
    scale = 48 / min(width, height)
    resized = Image.open(io.BytesIO(data)).resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
    left, top = (resized.width - 32) // 2, (resized.height - 32) // 2
    expected = np.asarray(resized).astype(int)[top : top + 32, left : left + 32]
    assert np.abs(found - expected).mean() < 2


def test_an_image_of_the_result_size_is_still_scaled_to_its_short_side():
    data = encoded(picture(32, 32), "PNG")
    assert not np.array_equal(decode_image("png", data, 32, short_side=48), decode_image("png", data, 32))
    data = encoded(picture(32, 32), "JPEG")
    assert not np.array_equal(decode_image("jpg", data, 32, short_side=48), decode_image("jpg", data, 32))


@pytest.mark.parametrize(("size", "short_side"), [(64, 64), (48, 64), (64, None), (40, 50)])
def test_an_image_stays_as_it_is_while_its_thread_decodes_others(size, short_side):
    turned = [picture(128, 128), picture(128, 128).transpose(Image.Transpose.ROTATE_90)]
    data = [encoded(image, "JPEG", quality=95) for image in turned]
    first = decode_image("jpg", data[0], size, short_side=short_side)
    kept = first.copy()
    second = decode_image("jpg", data[1], size, short_side=short_side)
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(first, kept)
