"""From a stream of ragged patches to the first hidden states of its expert. One module serves every modality.

Shape letters: S items and copies of them, T patches, C values of a patch, D hidden size, X tokens: each item's [CLS] and patches.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmscale.data.batch import Batch, PatchStream
from mmscale.modalities.modality import Modality
from mmscale.model.configuration import MMScaleConfig
from mmscale.model.embeddings import standardize
from mmscale.model.patch_stem import PatchStem
from mmscale.model.positions import stretched


class PatchEmbedding(nn.Module):
    """Linear patch embedding, behind convolutions where the modality has a stem, a [CLS] token, a token for hidden patches, and a table of
    positions unless they are rotary.
    """

    def __init__(self, config: MMScaleConfig, modality: Modality) -> None:
        super().__init__()
        self.modality = modality
        plane = modality.stem_plane
        self.stem = None if plane is None else PatchStem(plane)
        self.patch_weight = nn.Parameter(torch.empty(config.hidden_size, modality.values if plane is None else plane.values))
        self.patch_bias = nn.Parameter(torch.zeros(config.hidden_size))
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.mask_token = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        t, h, w = modality.grid
        shape = (t * h * w + 1, config.hidden_size)
        self.positions = nn.Parameter(torch.empty(shape)) if config.positions == "learned" else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, stream: PatchStream, patches: Tensor, items: Tensor, hidden: Tensor, order: Tensor) -> Tensor:
        """Embed the items, then once more those with hidden patches.

        Args:
            stream: the items.
            patches: patch of each patch token, copies included.
            items: item of each [CLS] token, copies included.
            hidden: bool, for each of `patches` whether a token that hides it goes in its place.
            order: tokens X by their place in [[CLS] tokens; patch tokens].
        """
        values_TC = stream.values_TC
        if values_TC.dtype == torch.uint8:
            mean, std = self.modality.image_mean, self.modality.image_std  # type: ignore[attr-defined]
            values_TC = standardize(values_TC, mean, std, self.patch_weight.dtype)
        values_TC = values_TC.to(self.patch_weight.dtype)
        if self.stem is not None:
            values_TC = self.stem(values_TC)
        x_TD = F.linear(values_TC, self.patch_weight, self.patch_bias).index_select(0, patches)
        x_TD = torch.where(hidden[:, None], self.mask_token[0], x_TD)
        cls_SD = self.cls_token[0].expand(len(items), -1)
        if self.positions is not None:
            cls_SD = cls_SD + self.positions[:1]
            x_TD = x_TD + self._places(stream).index_select(0, patches)
        embedded: Tensor = self.dropout(torch.cat([cls_SD, x_TD]).index_select(0, order))
        return embedded

    def _places(self, stream: PatchStream) -> Tensor:
        assert self.positions is not None
        table_PD, place_T3 = self.positions[1:], stream.coordinates_T3
        if not self.modality.interpolated:
            _, h, w = self.modality.grid
            return table_PD.index_select(0, (place_T3[:, 0] * h + place_T3[:, 1]) * w + place_T3[:, 2])
        sizes_T2 = stream.grids_S3[:, 1:].repeat_interleave(stream.cu_seqlens_S1.diff().long(), dim=0, output_size=len(place_T3))
        return stretched(table_PD, self.modality.grid[1], place_T3[:, 1:], sizes_T2)


def stream_of(batch: Batch, name: str, modality: Modality) -> PatchStream:
    """A modality's stream; one without an item where the batch has none."""
    if name in batch.streams:
        return batch.streams[name]
    none = batch.positions_M.new_zeros(0)
    return PatchStream(
        values_TC=torch.zeros(0, modality.values, dtype=getattr(torch, modality.dtype), device=none.device),
        cu_seqlens_S1=none.new_zeros(1, dtype=torch.int32),
        rows_S=none,
        coordinates_T3=none.new_zeros(0, 3),
        grids_S3=none.new_zeros(0, 3),
        mask_T=none.bool(),
    )
