"""The `model` section of a stage file: the shape of the network and where its first weights come from. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from shards.configfile import need


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Shape of the multiway fusion Transformer."""

    hidden_size: int = 128
    """Width d of the residual stream."""
    num_heads: int = 4
    """Attention heads; must divide hidden_size."""
    unimodal_layers: int = 4
    """Lower layers, which attend within a modality."""
    fusion_layers: int = 2
    """Upper layers, which attend across modalities. 0 with only the contrastive objective is CLIP-like; unimodal 0 is ViLT-like."""
    mlp_ratio: float = 4.0
    """Hidden width of the feed-forward layers over hidden_size."""
    image_size: int = 32
    """Side in pixels of the square model input; images are resized to it."""
    patch_size: int = 8
    """Side in pixels of a patch; must divide image_size."""
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Mean of red, green and blue in [0, 1] that pixels are centred by. For pictures on a plain ground the data set's own can be better."""
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Standard deviation of red, green and blue that pixels are then divided by."""
    max_text_tokens: int = 64
    """Rows of the text position table; at least data.max_text_tokens."""
    projection_size: int = 128
    """Width of the contrastive embedding."""
    qk_norm: bool = True
    """RMS-normalise queries and keys (Henry et al. 2020; ViT-22B)."""
    activation: Literal["gelu", "gelu_tanh"] = "gelu"
    """Activation of the feed-forward layers; BERT and ViT use gelu."""
    dropout: float = 0.0
    """Dropout after attention and feed-forward layers."""
    layer_norm_eps: float = 1e-6
    """Epsilon of layer normalisation; 1e-12 for BERT- and ViT-initialised models."""
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    """What of a block backward computes again. full: all, the memory of a block's input against about a third more time. selective: all
    but matrix products and attention, about half the memory of none against a few percent."""
    init_text_from: str | None = None
    """A local BERT-shaped transformers folder whose weights start the text expert."""
    init_image_from: str | None = None
    """A local ViT-shaped transformers folder whose weights start the perception expert."""

    def check(self) -> None:
        """Raise ConfigError for a shape that cannot be built."""
        need(
            self.hidden_size % self.num_heads == 0,
            f"`model.num_heads` must divide model.hidden_size = {self.hidden_size}; got {self.num_heads}.",
        )
        need(
            self.image_size % self.patch_size == 0,
            f"`model.patch_size` must divide model.image_size = {self.image_size}; got {self.patch_size}.",
        )
        need(min(self.image_std) > 0, f"`model.image_std` must be above 0; got {list(self.image_std)}.")


def modernize(section: Mapping[str, Any]) -> dict[str, Any]:
    """Bring a `model` section that an older version saved up to date: activation checkpointing was true or false."""
    old = section.get("activation_checkpointing")
    return dict(section) | ({"activation_checkpointing": "full" if old else "none"} if isinstance(old, bool) else {})
