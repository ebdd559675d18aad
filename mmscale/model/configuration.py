"""The architecture as transformers sees it: what config.json of a saved model holds. No run settings here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from mmscale.model_config import ModelConfig

SHAPE_KEYS = (
    "hidden_size",
    "num_heads",
    "unimodal_layers",
    "fusion_layers",
    "mlp_ratio",
    "image_size",
    "patch_size",
    "image_mean",
    "image_std",
    "max_text_tokens",
    "projection_size",
    "qk_norm",
    "activation",
    "dropout",
    "layer_norm_eps",
    "activation_checkpointing",
    "positions",
    "rotary_base",
    "modalities",
)
"""Keys taken over from the `model` section of a stage file."""


class MMScaleConfig(PreTrainedConfig):  # type: ignore[misc]
    """Shape of an `MMScaleModel`, its vocabulary and its task heads."""

    model_type = "mmscale"

    hidden_size: int = 128
    num_heads: int = 4
    unimodal_layers: int = 4
    fusion_layers: int = 2
    mlp_ratio: float = 4.0
    image_size: int = 32
    patch_size: int = 8
    image_mean: list[float] | tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: list[float] | tuple[float, ...] = (0.5, 0.5, 0.5)
    max_text_tokens: int = 64
    projection_size: int = 128
    qk_norm: bool = True
    activation: str = "gelu"
    dropout: float = 0.0
    layer_norm_eps: float = 1e-6
    activation_checkpointing: bool = False
    positions: str = "learned"
    rotary_base: float = 10000.0
    modalities: dict[str, dict[str, Any]] | None = None
    vocab_size: int = 1000
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    mask_token_id: int | None = 3
    heads: dict[str, int] | None = None
    initializer_range: float = 0.02
    contrastive_candidates: int = 32768

    @property
    def head_size(self) -> int:
        """Width of an attention head."""
        return self.hidden_size // self.num_heads

    @property
    def mlp_size(self) -> int:
        """Hidden width of a feed-forward layer."""
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return int((self.image_size // self.patch_size) ** 2)

    @property
    def image_tokens(self) -> int:
        """Tokens of an image: its [CLS] and its patches."""
        return self.patches + 1

    @property
    def patch_values(self) -> int:
        """Numbers in a patch: three colours of a square."""
        return int(3 * self.patch_size**2)


def mmscale_config(
    model: ModelConfig,
    vocab_size: int,
    special_ids: Mapping[str, int | None],
    heads: Mapping[str, int] | None = None,
    *,
    candidates: int = 32768,
) -> MMScaleConfig:
    """Turn the `model` section of a stage file into the configuration of a model.

    Args:
        model: the section.
        vocab_size: rows of the word table.
        special_ids: ids of the tokenizer's special tokens under `pad`, `begin`, `end`, `mask`; absent ones are null.
        heads: outputs of each task head by its name, such as `{"label": 12}`.
        candidates: samples that a contrastive loss compares one with; starts its bias.
    """
    shape: dict[str, Any] = {key: getattr(model, key) for key in SHAPE_KEYS}
    return MMScaleConfig(
        **shape,
        vocab_size=vocab_size,
        pad_token_id=special_ids.get("pad"),
        bos_token_id=special_ids.get("begin"),
        eos_token_id=special_ids.get("end"),
        mask_token_id=special_ids.get("mask"),
        heads=dict(heads or {}),
        contrastive_candidates=candidates,
        architectures=["MMScaleModel"],
    )
