"""What one micro-batch of one rank holds. Ragged text is concatenated, never padded; image-free and text-free rows are normal.

Shape letters: M samples, N images, S sequences of a text stream, T tokens of a text stream, P patches an image, G group size.
Of a patch stream: S items, T patches, C numbers in a patch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

IGNORE = -100
"""Label of a position that takes no part in a loss."""


@dataclass(slots=True)
class TextStream:
    """Ragged token sequences, concatenated."""

    ids_T: Tensor
    """int64 token ids."""
    cu_seqlens_S1: Tensor
    """int32 offsets, S + 1 of them, from 0 to T."""
    rows_S: Tensor
    """int64 row in [0, M) of the sample each sequence belongs to; strictly increasing."""
    labels_T: Tensor
    """int64 target of each token, IGNORE where there is none. Causal stream: the next token. Bidirectional stream: the token that a mask hides."""
    fuse_S: Tensor
    """bool: whether the sequence enters the fusion layers."""


@dataclass(slots=True)
class PatchStream:
    """Ragged patches of one modality, concatenated item after item; an item is what a sample has of the modality."""

    values_TC: Tensor
    """uint8 RGB laid out (colour, ...), or float32."""
    cu_seqlens_S1: Tensor
    """int32 offsets, S + 1 of them, from 0 to T."""
    rows_S: Tensor
    """int64 row in [0, M) of the sample each item belongs to; strictly increasing."""
    coordinates_T3: Tensor
    """int64 place (time, height, width) of each patch in its item's grid."""
    grids_S3: Tensor
    """int64 patches of each item along time, height and width, before any were dropped."""
    mask_T: Tensor
    """bool: True where masked modelling hides a patch."""


@dataclass(slots=True)
class Mixing:
    """Which samples were mixed with which."""

    rows_M: Tensor
    """int64 row of each sample's partner; its own where it has none."""
    shares_M: Tensor
    """float32 share of a sample itself in what is seen of it, from 0.5 to 1; the rest is its partner's."""


@dataclass(slots=True)
class Batch:
    """One micro-batch of one rank."""

    positions_M: Tensor
    """int64 global positions."""
    weights_M: Tensor
    """float32: 1, or 0 for a quarantined sample (which then has no image and no text here)."""
    keys: list[str]
    """The samples' keys, in order."""
    pixels_NCHW: Tensor
    """uint8 images, RGB, of the model's input size."""
    image_rows_N: Tensor
    """int64 row in [0, M) of the sample each image belongs to; strictly increasing."""
    patch_mask_NP: Tensor
    """bool: True where masked-image modelling hides a patch; all False where it is off."""
    caption: TextStream
    """The causal stream."""
    text: TextStream
    """The bidirectional stream: masked captions in pretraining, questions in fine-tuning."""
    gumbel_MG: Tensor
    """float32 Gumbel noise, keyed by (seed, position), for drawing hard negatives; G is the matching group (M when it is null)."""
    targets: dict[str, Tensor] = field(default_factory=dict)
    """Task targets by the name of their head, a row a sample (mmscale/data/targets.py): `label` int64 (M,), IGNORE where the sample has none;
    `tags` float32 (M, C), rows of IGNORE; `number` float32 (M,), NaN."""
    fields: list[dict[str, Any]] = field(default_factory=list)
    """The samples' json fields plus `captions`, for evaluation; empty in training."""
    streams: dict[str, PatchStream] = field(default_factory=dict)
    """What samples have of the modalities in `model.modalities`, in the order in which a sample's items follow one another."""
    kept_NK: Tensor | None = None
    """int64 patches of each image that the model sees, ascending; None for all. With it `patch_mask_NP` is about these, K of them."""
    mixing: Mixing | None = None
    """Samples that are mixtures; None where none are."""

    host: Batch | None = None
    """Of a batch on a device the one it was copied from: what sizes follow from, without waiting for the device."""

    @property
    def on_host(self) -> Batch:
        """The batch in the host's memory where there is one, else itself."""
        return self if self.host is None else self.host

    @property
    def size(self) -> int:
        """M, the number of samples."""
        return len(self.keys)

    @property
    def perception_rows_N(self) -> Tensor:
        """int64 rows of the samples that have an image or an item of another modality; strictly increasing."""
        if not self.streams:
            return self.image_rows_N
        has_M = torch.zeros(self.size, dtype=torch.bool, device=self.image_rows_N.device)
        has_M[torch.cat([self.image_rows_N, *(stream.rows_S for stream in self.streams.values())])] = True
        return has_M.nonzero().squeeze(1)

    @property
    def tokens(self) -> int:
        """Tokens of the texts and patches that the model sees."""
        patches = sum(stream.mask_T.numel() for stream in self.streams.values())
        return self.caption.ids_T.numel() + self.text.ids_T.numel() + self.patch_mask_NP.numel() + patches

    def to(self, device: torch.device, non_blocking: bool = True) -> Batch:
        """Copy every tensor to a device."""
        moved = self._map(lambda t: t.to(device, non_blocking=non_blocking))
        return replace(moved, host=self.on_host) if device.type != "cpu" else moved

    def pin_memory(self) -> Batch:
        """Copy every tensor to page-locked memory (DataLoader calls this by name)."""
        return self._map(lambda t: t.pin_memory())

    def each(self, function: Callable[[Tensor], Any]) -> None:
        """Call a function with every tensor."""

        def visit(tensor: Tensor) -> Tensor:
            function(tensor)
            return tensor

        self._map(visit)

    def _map(self, function: Any) -> Batch:
        def convert(value: Any) -> Any:
            if isinstance(value, Tensor):
                return function(value)
            if isinstance(value, (TextStream, PatchStream, Mixing)):
                return type(value)(**{f.name: function(getattr(value, f.name)) for f in fields(value)})
            if isinstance(value, dict):
                return {k: convert(v) for k, v in value.items()}
            return value

        return replace(self, **{f.name: convert(getattr(self, f.name)) for f in fields(self) if f.name != "keys"})
