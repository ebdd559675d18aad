"""What a family of checkpoints says about itself: its types, its towers' shapes, and where its tensors go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mmscale.model.pretrained.shape import ImageShape, TextShape
from mmscale.model.pretrained.source import Source

Found = dict[str, Tensor]
"""Values by the names of the model's parameters."""


def no_top(source: Source) -> Found:
    """Nothing above the layers."""
    return {}


@dataclass(frozen=True, kw_only=True, slots=True)
class TextFamily:
    """Text towers of one kind."""

    types: tuple[str, ...]
    """`model_type` of its configurations."""
    shape: Callable[[Any], TextShape]
    """From a configuration."""
    words: str
    """Tensor of the word table."""
    positions: Callable[[Source], Tensor]
    """Rows that are added to words 0, 1, ... of a text."""
    norm: str | None
    """Module of the norm after the sum of both."""
    layer: Callable[[Source, int, str], Found]
    """Weights of a layer for the expert of this name."""
    top: Callable[[Source], Found] = no_top
    """What stands on the last layer: `caption_projection.*`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageFamily:
    """Image towers of one kind."""

    types: tuple[str, ...]
    shape: Callable[[Any], ImageShape]
    patch: Callable[[Source], tuple[Tensor, Tensor | None]]
    """(D, 3 * patch * patch) weight, flattened as (colour, y, x), and bias of the patch embedding."""
    leading: Callable[[Source], Tensor | None]
    """(K, D) leading tokens."""
    positions: Callable[[Source], Tensor]
    """(K + P, D), the leading tokens' rows first."""
    layer: Callable[[Source, int, str], Found]
    norm: str | None = None
    """Module of the norm after the sum of patches and positions."""
    top: Callable[[Source], Found] = no_top
    """What stands on the last layer: `image_projection.*`."""
    interpolation: str = "bicubic"
    """How positions are brought to another grid."""
