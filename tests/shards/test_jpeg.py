import numpy as np
import pytest

from shards import jpeg


@pytest.mark.parametrize("subsampling", ["420", "444"])
@pytest.mark.parametrize(("width", "height"), [(31, 31), (30, 31), (31, 30), (30, 30), (43, 29)])
def test_the_same_pixels_give_the_same_bytes_whatever_lies_beside_them(width: int, height: int, subsampling: str) -> None:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (64, 80, 3), dtype=np.uint8)
    found = set()
    for _ in range(30):
        junk = [np.full(generator.integers(500, 5000), generator.integers(0, 256), np.uint8) for _ in range(20)]
        del junk  # memory that is used again, with another content each time
        found.add(jpeg.encode_resized(pixels.copy(), width, height, quality=90, subsampling=subsampling))
    assert len(found) == 1
    decoded = jpeg.decode(found.pop(), (width, height), None)
    assert decoded is not None
    assert decoded.shape == (height, width, 3)
