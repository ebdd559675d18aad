"""Pictures and clips to patches of bytes, and the size of a picture under a token budget.

Shape letters: T frames, H height, W width, P patches, C values of a patch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mmscale.modalities.modality import Grid

Bytes = NDArray[np.uint8]


def cut(frames_THWC: Bytes, tubelet: int, patch: int, out_PC: Bytes) -> Grid:
    """Cut frames into tubelets and write them, each flattened as (colour, time, y, x): the layout of a convolution's weight.

    Args:
        frames_THWC: RGB; T divides by `tubelet`, H and W by `patch`.
        tubelet: frames of a tubelet; 1 for a picture.
        patch: side of a patch in pixels.
        out_PC: the first patches are written.

    Source: Arnab et al. 2021 (ViViT), section 3.2.
    """
    frames, height, width, colours = frames_THWC.shape
    t, h, w = frames // tubelet, height // patch, width // patch
    split = frames_THWC.reshape(t, tubelet, h, patch, w, patch, colours).transpose(0, 2, 4, 6, 1, 3, 5)
    np.copyto(out_PC[: t * h * w].reshape(split.shape), split)
    return t, h, w


def fitted_size(height: int, width: int, patch: int, max_patches: int) -> tuple[int, int]:
    """Height and width in pixels nearest to a picture's aspect ratio, multiples of the patch, with at most `max_patches` patches.

    A picture within the budget is not enlarged; its sides are rounded to patches.

    Source: Dehghani et al. 2023 (NaViT), section 2; Tschannen et al. 2025 (SigLIP 2), section 2.4.2.
    """

    def sides(scale: float) -> tuple[int, int]:
        return max(1, round(height * scale / patch)), max(1, round(width * scale / patch))

    found = sides(1.0)
    if found[0] * found[1] > max_patches:
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            rows, columns = sides(middle)
            low, high = (middle, high) if rows * columns <= max_patches else (low, middle)
        found = sides(low)
    return found[0] * patch, found[1] * patch
