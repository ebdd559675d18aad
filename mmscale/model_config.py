"""The `model` section of a stage file: the shape of the network and where its first weights come from. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from mmscale.modalities.modality import build_modalities
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
    activation_checkpointing: bool = False
    """Recompute each block in backward: memory of one block against about a third more time."""
    positions: Literal["learned", "rotary"] = "learned"
    """learned: tables of absolute positions. rotary: queries and keys are turned by (time, height, width) and by text positions."""
    rotary_base: float = 10000.0
    """rotary: ratio of the longest to the shortest wavelength (Su et al. 2021)."""
    modalities: dict[str, Any] = field(default_factory=dict)
    """What samples may have besides square images: name -> keys of a modality, such as {audio: {max_seconds: 5}}; `kind` says which. The
    name of a part (`audio` is configs/modality/audio.yaml) stands for its keys. `image` here means images in their own aspect ratio."""
    init_text_from: str | None = None
    """A local BERT-shaped transformers folder whose weights start the text expert."""
    init_image_from: str | None = None
    """A local ViT-shaped transformers folder whose weights start the perception expert."""

    @property
    def head_size(self) -> int:
        """Width of an attention head."""
        return self.hidden_size // self.num_heads

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
        need(
            self.positions == "learned" or (self.head_size % 2 == 0 and self.head_size >= 6),
            "`model.positions=rotary` needs heads of an even width of at least 6, a pair for each axis; "
            f"hidden_size / num_heads is {self.head_size}.",
        )
        need(self.rotary_base > 1, f"`model.rotary_base` must be above 1; got {self.rotary_base}.")
        need(
            self.positions == "learned" or (self.init_text_from is None and self.init_image_from is None),
            "`model.init_text_from` and `model.init_image_from` are checkpoints with learned positions. Set model.positions to learned.",
        )
        build_modalities(self)
        need(min(self.image_std) > 0, f"`model.image_std` must be above 0; got {list(self.image_std)}.")
