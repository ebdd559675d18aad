"""Convolutions within a patch, before it is embedded: all its places are read by the same few weights, such as all bands of a spectrum.

Source: Xiao et al. 2021 (Early Convolutions Help Transformers See Better), section 4, there over the whole image; here a patch sees no
other, so that patches are packed, dropped and hidden as ever.

Shape letters: T patches, C values of a patch, D hidden size.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mmscale.modalities.modality import Plane


class PatchStem(nn.Module):
    """Three convolutions, each with a norm over channels and places and a GELU, to an eighth of the height and a quarter of the width."""

    def __init__(self, plane: Plane) -> None:
        super().__init__()
        self.plane, c = plane, plane.channels
        self.convolutions = nn.ModuleList(
            [
                nn.Conv2d(1, c, (5, 3), stride=2, padding=(2, 1)),
                nn.Conv2d(c, 2 * c, 3, stride=2, padding=1),
                nn.Conv2d(2 * c, 2 * c, 3, stride=(2, 1), padding=1),
            ]
        )
        self.norms = nn.ModuleList([nn.GroupNorm(1, channels) for channels in (c, 2 * c, 2 * c)])

    def forward(self, values_TC: Tensor) -> Tensor:
        """The values of patches, (T, C), to as many as `Plane.values` says."""
        x = values_TC.view(len(values_TC), 1, self.plane.height, self.plane.width)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.gelu(norm(convolution(x)))
        return x.flatten(1)
