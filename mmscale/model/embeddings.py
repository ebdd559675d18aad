"""From pixels and token ids to the first hidden states of the two experts.

Shape letters: N images, P patches, K leading tokens, L = K + P image tokens, T text tokens, D hidden size, C values of a patch,
G grid side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmscale.model.configuration import MMScaleConfig


def patchify(pixels_NCHW: Tensor, patch: int) -> Tensor:
    """Cut images into square patches, row after row.

    Returns:
        (N, P, 3 * patch * patch), each patch flattened as (colour, y, x): the layout of a convolution's weight.
    """
    n, c, h, w = pixels_NCHW.shape
    cut = pixels_NCHW.reshape(n, c, h // patch, patch, w // patch, patch)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(n, (h // patch) * (w // patch), c * patch * patch)


def kept_patches(pixels_NCHW: Tensor, patch: int, kept_NK: Tensor | None) -> Tensor:
    """Patches of images as `patchify` gives them, those of `kept_NK` alone where it is given; (N, K, C)."""
    values_NPC = patchify(pixels_NCHW, patch)
    return values_NPC if kept_NK is None else values_NPC.gather(1, kept_NK[..., None].expand(-1, -1, values_NPC.shape[-1]))


def standardize(values_NPC: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Turn the bytes of patches into (value / 255 - mean) / std, colour by colour."""
    colours = zip(values_NPC.chunk(3, dim=-1), mean, std, strict=True)
    return torch.cat([part.to(dtype) * (1 / (255 * s)) - m / s for part, m, s in colours], dim=-1)


def resize_positions(positions_LD: Tensor, patches: int, leading: int = 1, mode: str = "bicubic") -> Tensor:
    """Interpolate learned 2-D position embeddings to another number of patches.

    Args:
        positions_LD: rows of leading tokens such as [CLS], then a square grid, row after row.
        patches: patches of the new square grid.
        leading: rows before the grid; they stay as they are.
        mode: bicubic (Dosovitskiy et al. 2021, section 3.2) or bilinear (Tschannen et al. 2025, SigLIP 2, section 2.2).
    """
    if len(positions_LD) == patches + leading:
        return positions_LD
    old, new = int((len(positions_LD) - leading) ** 0.5), int(patches**0.5)
    grid_1DGG = positions_LD[leading:].T.reshape(1, -1, old, old)
    antialias = new < old or mode == "bilinear"
    grid_1DGG = F.interpolate(grid_1DGG.float(), size=(new, new), mode=mode, align_corners=False, antialias=antialias)
    return torch.cat([positions_LD[:leading], grid_1DGG.to(positions_LD.dtype).flatten(2)[0].T])


class ImageEmbedding(nn.Module):
    """Linear patch embedding, [CLS] and other leading tokens, learned 2-D positions, and a learned token for hidden patches."""

    def __init__(self, config: MMScaleConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.mean, self.std = tuple(config.image_mean), tuple(config.image_std)
        self.patch_weight = nn.Parameter(torch.empty(config.hidden_size, config.patch_values))
        self.patch_bias = nn.Parameter(torch.zeros(config.hidden_size))
        tower, shape = config.image_tower, config.expert("image")
        self.leading = tower.leading_tokens
        self.cls_token = nn.Parameter(torch.empty(1, self.leading, config.hidden_size)) if self.leading else None
        self.mask_token = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        learned = config.positions == "learned"
        self.positions = nn.Parameter(torch.empty(config.image_tokens, config.hidden_size)) if learned else None
        self.norm: nn.Module = nn.LayerNorm(config.hidden_size, eps=shape.eps) if tower.embedding_norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, pixels_NCHW: Tensor, mask_NP: Tensor, hidden: Tensor, kept_NK: Tensor | None = None) -> Tensor:
        """Embed all images, then once more those with hidden patches.

        Args:
            pixels_NCHW: uint8.
            mask_NP: bool, True where a patch is hidden.
            hidden: int64 indexes of the images that are embedded once more, with their hidden patches replaced.
            kept_NK: int64 patches of each image that are embedded; None for all. `mask_NP` is about these.

        Returns:
            (N + len(hidden), L, D).
        """
        values_NPC = standardize(kept_patches(pixels_NCHW, self.patch_size, kept_NK), self.mean, self.std, self.patch_weight.dtype)
        x_NPD = F.linear(values_NPC, self.patch_weight, self.patch_bias)
        masked = torch.where(mask_NP[hidden, :, None], self.mask_token, x_NPD.index_select(0, hidden))
        x_NPD = torch.cat([x_NPD, masked])
        cls_1KD: Tensor | None = self.cls_token
        if self.positions is not None:
            places = self.positions[self.leading :]
            x_NPD = x_NPD + (places if kept_NK is None else places[torch.cat([kept_NK, kept_NK[hidden]])])
            cls_1KD = None if cls_1KD is None else cls_1KD + self.positions[: self.leading]
        x_NLD = x_NPD if cls_1KD is None else torch.cat([cls_1KD.expand(len(x_NPD), -1, -1), x_NPD], dim=1)
        embedded: Tensor = self.dropout(self.norm(x_NLD))
        return embedded


class Table(nn.Embedding):
    """A table of vectors that knows the standard deviation it starts with."""

    def __init__(self, rows: int, width: int, std: float) -> None:
        super().__init__(rows, width)
        self.std = std


class TextEmbedding(nn.Module):
    """Word and position tables, and, unless `text.embedding_norm` is off, a norm after their sum (Devlin et al. 2019);
    words alone where positions are rotary.

    The norm lets the tables be small, so that a rare word learns fast, while the residual stream starts as large as what layers add to it.
    """

    def __init__(self, config: MMScaleConfig) -> None:
        super().__init__()
        shape = config.expert("text")
        std = config.text_tower.table_std
        self.words = Table(config.vocab_size, shape.width, std)
        self.positions = Table(config.max_text_tokens, shape.width, std) if config.positions == "learned" else None
        self.norm: nn.Module = nn.LayerNorm(shape.width, eps=shape.eps) if config.text_tower.embedding_norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, ids_T: Tensor, offsets_T: Tensor) -> Tensor:
        """Embed tokens, given each one's offset in its sequence; (T, D)."""
        x_TD: Tensor = self.words(ids_T)
        if self.positions is not None:
            x_TD = x_TD + self.positions(offsets_T)
        embedded: Tensor = self.dropout(self.norm(x_TD))
        return embedded
