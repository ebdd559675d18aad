"""Images in their own aspect ratio under a token budget (NaFlex-like), instead of squares of `model.image_size`.

Source: Dehghani et al. 2023 (NaViT); Tschannen et al. 2025 (SigLIP 2), section 2.4.2.
"""

from __future__ import annotations

from dataclasses import dataclass

from mmscale.data.decode import decode_fitted
from mmscale.modalities.modality import Change, Grid, Modality
from mmscale.modalities.pixels import Bytes, cut, fitted_size
from shards.configfile import need
from shards.sample import Sample


@dataclass(frozen=True, kw_only=True)
class NativeImage(Modality):
    """The sample's picture, scaled down until its patches fit the budget."""

    kind: str = "image"
    max_tokens: int = 256
    """Most patches of an image; its [CLS] comes on top."""
    patch_size: int | None = None
    """Side of a patch in pixels."""
    image_size: int | None = None
    """Side in pixels of the square whose patches the learned position table has; other shapes interpolate it."""
    image_mean: tuple[float, float, float] | None = None
    """Mean of red, green and blue in [0, 1]."""
    image_std: tuple[float, float, float] | None = None
    """Standard deviation of red, green and blue."""

    @property
    def values(self) -> int:
        """Three colours of a square."""
        return 3 * self._patch**2

    @property
    def dtype(self) -> str:
        """Bytes."""
        return "uint8"

    @property
    def grid(self) -> Grid:
        """The square of the position table."""
        side = (self.image_size or 0) // self._patch
        return 1, side, side

    @property
    def max_patches(self) -> int:
        """The budget."""
        return self.max_tokens

    @property
    def interpolated(self) -> bool:
        """Every shape stretches the square."""
        return True

    def check(self, where: str) -> None:
        """At least one patch, patches as the model's heads have them."""
        need(self.max_tokens > 0, f"`{where}.max_tokens` must be at least 1; got {self.max_tokens}.")
        need(
            (self.image_size or 0) % self._patch == 0,
            f"`{where}.patch_size` must divide image_size = {self.image_size}; got {self._patch}.",
        )

    def read(self, sample: Sample, out_PC: Bytes, change: Change) -> Grid | None:
        """Decode, scale, augment, cut."""
        part = sample.image()
        if part is None:
            return None
        pixels = decode_fitted(*part, lambda h, w: fitted_size(h, w, self._patch, self.max_tokens), key=sample.key)
        return cut(change(pixels)[None], 1, self._patch, out_PC)

    @property
    def _patch(self) -> int:
        return self.patch_size or 16
