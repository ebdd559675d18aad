import hashlib
import io
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from shards import jpeg
from tests.shards.pictures import decoded, encoded, gradient

ODD_SIZES = [(29, 20), (20, 29), (43, 31), (64, 48), (17, 16)]


def picture(width: int, height: int) -> jpeg.Pixels:
    """Smooth colours and edges."""
    pixels = np.asarray(gradient(width, height)).copy()
    pixels[height // 3 : height // 2, width // 4 : width // 2] = (250, 20, 30)
    return pixels


def psnr(left: np.ndarray, right: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((left.astype(float) - right.astype(float)) ** 2)))


def digests() -> list[str]:
    made = (jpeg.encode_resized(picture(97, 71), *size, quality=90, subsampling="420") for size in ODD_SIZES)
    return [hashlib.sha256(data).hexdigest() for data in made]


@pytest.mark.parametrize("subsampling", ["420", "444"])
@pytest.mark.parametrize("size", ODD_SIZES)
def test_as_good_as_pillow(size: tuple[int, int], subsampling: str) -> None:
    pixels = picture(97, 71)
    data = jpeg.encode_resized(pixels, *size, quality=90, subsampling=subsampling)
    wanted = Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)
    theirs = encoded(wanted, quality=90, subsampling={"420": 2, "444": 0}[subsampling])
    ours = psnr(decoded(data), np.asarray(wanted))
    assert Image.open(io.BytesIO(data)).size == size
    # full chroma of so smooth a picture hardly loses anything: there the rounding of one conversion more can be seen
    assert ours > psnr(decoded(theirs), np.asarray(wanted)) - (0.6 if subsampling == "420" else 1.6)
    assert len(data) < 1.05 * len(theirs)


def test_grey_and_full_range_stay_what_they_are() -> None:
    for level in (0, 16, 128, 235, 255):
        data = jpeg.encode_resized(np.full((40, 50, 3), level, np.uint8), 25, 20, quality=95, subsampling="420")
        assert np.abs(decoded(data).astype(int) - level).max() <= 1


def test_bytes_do_not_depend_on_what_lies_in_memory() -> None:
    """The allocator fills fresh memory with another pattern in each process."""
    program = "from tests.shards.test_jpeg import digests; print(digests())"
    patterns = ("0", "85", "170")
    runs = [
        subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, "MALLOC_PERTURB_": fill}, check=True, capture_output=True, text=True
        ).stdout
        for fill in patterns
    ]
    assert runs == [f"{digests()}\n"] * len(patterns)


@pytest.mark.parametrize(
    ("least", "expected"), [(None, (600, 900)), (250, (300, 450)), (75, (75, 113)), (74, (75, 113)), (301, (600, 900))]
)
def test_scaled_decoding(least: int | None, expected: tuple[int, int]) -> None:
    pixels = jpeg.decode(encoded(gradient(900, 600)), (900, 600), least)
    assert pixels is not None
    assert pixels.shape[:2] == expected


def test_a_file_in_doubt_is_left_to_pillow() -> None:
    assert jpeg.decode(encoded(gradient(200, 200))[:-500], (200, 200), None) is None


def test_progressive_files() -> None:
    plain, progressive = (jpeg.decode(encoded(gradient(90, 60), progressive=p), (90, 60), None) for p in (False, True))
    assert plain is not None
    assert np.array_equal(plain, progressive)
