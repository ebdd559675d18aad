"""The architecture as transformers sees it: what config.json of a saved model holds. No run settings here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from transformers import PreTrainedConfig

from mmscale.data.targets import Facts
from mmscale.model_config import ImageTowerConfig, ModelConfig, TextTowerConfig, modernize

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
    "head_pooling",
)
"""Keys taken over from the `model` section of a stage file, besides its `text` and `image`."""


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """Shape of one modality's weights in a layer."""

    width: int
    """D, width of the residual stream there."""
    heads: int
    mlp: int
    """Hidden width of the feed-forward layer."""
    activation: str
    eps: float
    """Epsilon of the norms."""
    post_norm: bool
    """Norms follow the residual sums."""

    @property
    def head_size(self) -> int:
        """K, width of a head."""
        return self.width // self.heads


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
    activation_checkpointing: str | bool = "none"
    text: dict[str, Any] | None = None
    image: dict[str, Any] | None = None
    positions: str = "learned"
    rotary_base: float = 10000.0
    modalities: dict[str, dict[str, Any]] | None = None
    head_pooling: str = "first"
    vocab_size: int = 1000
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    mask_token_id: int | None = 3
    heads: dict[str, int] | None = None
    target_mean: float = 0.0
    target_std: float = 1.0
    initializer_range: float = 0.02
    contrastive_candidates: int = 32768

    def __post_init__(self, **rest: Any) -> None:
        """Read what older versions wrote, too."""
        self.activation_checkpointing = modernize({"activation_checkpointing": self.activation_checkpointing})["activation_checkpointing"]
        super().__post_init__(**rest)

    def keep(self, facts: Facts) -> None:
        """Keep what the task took from its training shards: labels as transformers does, a number's mean and standard deviation."""
        if facts.labels is not None:
            self.id2label = dict(enumerate(facts.labels))
            self.label2id = {label: i for i, label in self.id2label.items()}
        self.target_mean, self.target_std = facts.mean, facts.std

    @property
    def facts(self) -> Facts:
        """What `keep` kept."""
        return Facts(labels=tuple(self.id2label[i] for i in range(len(self.id2label))), mean=self.target_mean, std=self.target_std)

    @property
    def text_tower(self) -> TextTowerConfig:
        """What the text expert has of its own."""
        return TextTowerConfig(**(self.text or {}))

    @property
    def image_tower(self) -> ImageTowerConfig:
        """What the perception expert has of its own."""
        return ImageTowerConfig(**(self.image or {}))

    def lower_layers(self, modality: Literal["text", "image"]) -> int:
        """Lower layers of a modality."""
        own = (self.text_tower if modality == "text" else self.image_tower).layers
        return self.unimodal_layers if own is None else own

    def expert(self, modality: Literal["text", "image"], fused: bool = False) -> ExpertShape:
        """Shape of a modality's weights in the lower layers, or in the fusion layers, where all have one width and as many heads."""
        tower = self.text_tower if modality == "text" else self.image_tower
        text = tower if isinstance(tower, TextTowerConfig) else TextTowerConfig()
        width = self.hidden_size if fused or text.hidden_size is None else text.hidden_size
        return ExpertShape(
            width=width,
            heads=self.num_heads if fused or text.num_heads is None else text.num_heads,
            mlp=int(width * (self.mlp_ratio if text.mlp_ratio is None else text.mlp_ratio)),
            activation=self.activation if tower.activation is None else tower.activation,
            eps=self.layer_norm_eps if tower.layer_norm_eps is None else tower.layer_norm_eps,
            post_norm=text.norm == "post",
        )

    @property
    def square_grid(self) -> tuple[int, int, int]:
        """Patches of a square image along time, height and width."""
        return 1, self.image_size // self.patch_size, self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return int((self.image_size // self.patch_size) ** 2)

    @property
    def image_tokens(self) -> int:
        """Tokens of an image: [CLS] and other leading ones, and its patches."""
        return self.patches + self.image_tower.leading_tokens

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
        text=asdict(model.text),
        image=asdict(model.image),
        vocab_size=vocab_size,
        pad_token_id=special_ids.get("pad"),
        bos_token_id=special_ids.get("begin"),
        eos_token_id=special_ids.get("end"),
        mask_token_id=special_ids.get("mask"),
        heads=dict(heads or {}),
        contrastive_candidates=candidates,
        architectures=["MMScaleModel"],
    )
