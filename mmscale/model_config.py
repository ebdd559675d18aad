"""The `model` section of a stage file: the shape of the network and where its first weights come from. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mmscale.modalities.modality import all_keys_of, build_modalities
from mmscale.ranges import check_ranges
from shards import configfile
from shards.configfile import need

WIDEST_HEAD = 256
"""Of the attention kernels of CUDA devices."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextTowerConfig:
    """What the text expert has of its own; `mmscale model-config FOLDER` prints what a checkpoint needs."""

    layers: int | None = None
    """Lower layers of text; null: unimodal_layers."""
    hidden_size: int | None = None
    """Width of the lower layers of text; null: hidden_size. Where it differs a linear map leads into the fusion layers."""
    num_heads: int | None = None
    """Attention heads of the lower layers of text; null: num_heads."""
    mlp_ratio: float | None = None
    """Hidden width of text's feed-forward layers over their width; null: mlp_ratio."""
    norm: Literal["pre", "post"] = "pre"
    """pre: a norm before each sublayer. post: after the residual sum, as in BERT, and no norm before the caption's projection."""
    activation: Literal["gelu", "gelu_tanh", "quick_gelu"] | None = None
    """Activation of text's feed-forward layers; null: activation."""
    layer_norm_eps: float | None = None
    """Epsilon of text's norms; null: layer_norm_eps."""
    embedding_norm: bool = True
    """A norm after the sum of the word and position tables, as in BERT; CLIP and SigLIP have none."""
    table_std: float = 0.02
    """Standard deviation that the word and position tables start with. Behind the norm their size does not show, but a step turns a larger
    table by less: at 1 words such as left and right keep apart (docs/architecture.md)."""
    convolution: bool = False
    """Before every lower layer of text add to each word what a convolution of 5 words, channel by channel, finds beside it (So et al. 2021,
    Primer); causal text looks back alone. With model.image.convolution questions about relations are learned from far fewer samples."""
    captions: Literal["causal", "bidirectional"] = "causal"
    """What tokens of the caption stream see in the lower layers: their past (CLIP; captioning needs it) or all (SigLIP)."""
    projection_bias: bool = False
    """A bias in the map from captions into the contrastive space; SigLIP has one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageTowerConfig:
    """What the perception expert has of its own; its width and heads are those of the stack."""

    layers: int | None = None
    """Lower layers of images; null: unimodal_layers."""
    activation: Literal["gelu", "gelu_tanh", "quick_gelu"] | None = None
    """Activation of the perception expert's feed-forward layers; null: activation."""
    layer_norm_eps: float | None = None
    """Epsilon of the perception expert's norms; null: layer_norm_eps."""
    embedding_norm: bool = False
    """A norm after patches and positions are summed, as in CLIP."""
    leading_tokens: int = 1
    """Learned tokens before the patches: [CLS], then others that only take part (DeiT's distillation token); 0 is SigLIP-like."""
    convolution: bool = False
    """Before every layer add to each patch what a 3 x 3 (x 3 in time) convolution, channel by channel, finds around it (Chu et al. 2021,
    CPVT; Li et al. 2022, UniFormer). What stands beside what is learned from far fewer samples."""
    pooling: Literal["cls", "attention"] = "cls"
    """What the contrastive projection reads: the [CLS] token, or what a learned query gathers from all tokens (SigLIP)."""


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
    activation: Literal["gelu", "gelu_tanh", "quick_gelu"] = "gelu"
    """Activation of the feed-forward layers; BERT and ViT use gelu, SigLIP gelu_tanh, CLIP quick_gelu."""
    dropout: float = 0.0
    """Dropout after attention and feed-forward layers."""
    layer_norm_eps: float = 1e-6
    """Epsilon of layer normalisation."""
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    """What of a block backward computes again. full: all, the memory of a block's input against about a third more time. selective: all
    but matrix products and attention, about half the memory of none against a few percent."""
    positions: Literal["learned", "rotary"] = "learned"
    """learned: tables of absolute positions. rotary: queries and keys are turned by (time, height, width) and by text positions."""
    rotary_base: float = 10000.0
    """rotary: ratio of the longest to the shortest wavelength (Su et al. 2021)."""
    modalities: dict[str, Any] = field(default_factory=dict)
    """What samples may have besides square images: name -> keys of a modality, such as {audio: {max_seconds: 5}}; `kind` says which. The
    name of a part (`audio` is configs/modality/audio.yaml) stands for its keys. `image` here means images in their own aspect ratio."""
    head_pooling: Literal["first", "concat"] = "first"
    """What a task's head reads of a text, or of images and sounds alone. first: the first token, as in BERT. concat: that beside the mean
    and the largest of all tokens, feature by feature (Howard and Ruder 2018, ULMFiT, section 3.3)."""
    text: TextTowerConfig = field(default_factory=TextTowerConfig)
    image: ImageTowerConfig = field(default_factory=ImageTowerConfig)
    init_text_from: str | None = None
    """A local transformers folder (BERT, RoBERTa, DistilBERT, CLIP, SigLIP) whose weights start the text expert."""
    init_image_from: str | None = None
    """A local transformers folder (ViT, DeiT, CLIP, SigLIP, SigLIP 2) whose weights start the perception expert."""

    def check(self) -> None:
        """Raise ConfigError for a shape that cannot be built."""
        check_ranges("model", self)
        need(
            self.hidden_size % self.num_heads == 0,
            f"`model.num_heads` must divide model.hidden_size = {self.hidden_size}; got {self.num_heads}.",
        )
        need(
            self.image_size % self.patch_size == 0,
            f"`model.patch_size` must divide model.image_size = {self.image_size}; got {self.patch_size}.",
        )
        need(min(self.image_std) > 0, f"`model.image_std` must be above 0; got {list(self.image_std)}.")
        width, heads = self.text.hidden_size or self.hidden_size, self.text.num_heads or self.num_heads
        need(width % heads == 0, f"`model.text.num_heads` must divide the text's width {width}; got {heads}.")
        need(
            self.image.pooling == "attention" or self.image.leading_tokens > 0,
            "`model.image.pooling=cls` reads the first leading token, and model.image.leading_tokens is 0. "
            "Set model.image.pooling=attention or leading_tokens to 1.",
        )
        for key, size in (("model", self.hidden_size // self.num_heads), ("model.text", width // heads)):
            need(
                size <= WIDEST_HEAD,
                f"`{key}.num_heads` gives heads of width {size}, and attention kernels take at most {WIDEST_HEAD}. Take more heads.",
            )
        self._check_positions({"hidden_size / num_heads": self.hidden_size // self.num_heads, "that of model.text": width // heads})
        self._check_modalities()

    def _check_positions(self, head_sizes: Mapping[str, int]) -> None:
        if self.positions == "learned":
            return
        for name, size in head_sizes.items():
            need(
                size % 2 == 0 and size >= 6,
                f"`model.positions=rotary` needs heads of an even width of at least 6, a pair for each axis; {name} is {size}.",
            )
        need(self.rotary_base > 1, f"`model.rotary_base` must be above 1; got {self.rotary_base}.")
        need(
            self.init_text_from is None and self.init_image_from is None,
            "`model.init_text_from` and `model.init_image_from` are checkpoints with learned positions. Set model.positions to learned.",
        )

    def _check_modalities(self) -> None:
        modalities, tower = build_modalities(self), self.image
        need(
            not modalities or tower.pooling == "cls",
            "`model.image.pooling=attention` gathers from all tokens of a square image; of items in model.modalities only the [CLS] is "
            "read. Set model.image.pooling=cls and model.image.leading_tokens=1, or leave model.modalities empty.",
        )
        native = modalities.get("image")
        if native is None:
            return
        need(
            tower.leading_tokens == 1 and not tower.embedding_norm,
            "`model.modalities.image`: images in their own shape have one [CLS] and no norm after their embedding. Set "
            "model.image.leading_tokens=1 and model.image.embedding_norm=false, or leave model.modalities.image out.",
        )
        other = [key for key in ("patch_size", "image_size", "image_mean", "image_std") if getattr(native, key) != getattr(self, key)]
        need(
            self.init_image_from is None or not other,
            f"`model.init_image_from` starts images of model.{', model.'.join(other)}; model.modalities.image has its own. Leave "
            f"{', '.join(other)} out there.",
        )


def all_keys(section: Mapping[str, Any]) -> dict[str, Any]:
    """Every key of a saved `model` section by its dotted name: one that its version did not know means its default."""
    defaults = configfile.to_plain(ModelConfig())
    found = {**defaults, **section}
    for tower in ("text", "image"):
        found |= {f"{tower}.{key}": value for key, value in {**defaults[tower], **found.pop(tower)}.items()}
    for name, entry in found.pop("modalities").items():
        found |= {f"modalities.{name}.{key}": value for key, value in all_keys_of(name, entry).items()}
    return found


def modernize(section: Mapping[str, Any]) -> dict[str, Any]:
    """Bring a `model` section that an older version saved up to date: activation checkpointing was true or false."""
    old = section.get("activation_checkpointing")
    return dict(section) | ({"activation_checkpointing": "full" if old else "none"} if isinstance(old, bool) else {})
