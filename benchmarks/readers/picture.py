"""The one decoder of all readers: simplejpeg, short side 256, the middle 224 x 224 of it, as `mmscale.data.decode` does."""

from __future__ import annotations

import numpy as np
import simplejpeg
from PIL import Image

SIZE, SHORT_SIDE = 224, 256


def decode(data: bytes, room: np.ndarray | None = None) -> np.ndarray:
    """Decode a JPEG to (224, 224, 3) uint8, from the smallest scale of the format whose short side is at least 256.

    With `room`, into memory that is used again: new memory for each image costs the system's clearing of it. A reader whose decoding is
    left to its user gets none, as what it hands on must stay as it is.
    """
    pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=SHORT_SIDE, min_width=SHORT_SIDE, buffer=room)
    height, width = pixels.shape[:2]
    if min(height, width) == SHORT_SIDE:
        top, left = (height - SIZE) // 2, (width - SIZE) // 2
        return pixels[top : top + SIZE, left : left + SIZE]
    side = min(height, width) * SIZE / SHORT_SIDE
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    return np.asarray(Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box))
