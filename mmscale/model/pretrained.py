"""Start the experts from BERT- and ViT-shaped transformers checkpoints, and say what was loaded, left and missing.

A ViT is pre-norm like this model: with `qk_norm: false` the perception tower then computes what the ViT computes. BERT is
post-norm: its norms go to the places that feed the same sublayers (the norm after a sublayer becomes the norm before the next),
and its token type 0 is added to the positions; training has to do the rest.

A checkpoint's first `unimodal_layers` layers start the lower layers, the following ones that expert's part of the fusion layers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel

from mmscale.model.embeddings import resize_positions
from mmscale.model_config import ModelConfig
from shards.errors import ConfigError

if TYPE_CHECKING:
    from mmscale.model.model import MMScaleModel

TEXT_TYPES = ("bert", "roberta", "xlm-roberta", "camembert")
IMAGE_TYPES = ("vit", "deit")
SHOWN = 6
"""Names listed for each line of a printed report."""


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What became of a checkpoint's tensors."""

    source: str
    loaded: list[str] = field(default_factory=list)
    """Parameters of the model that took their values from the checkpoint."""
    left: list[str] = field(default_factory=list)
    """Tensors of the checkpoint that have no place in the model."""
    missing: list[str] = field(default_factory=list)
    """Parameters of the expert that the checkpoint does not hold; they keep their random start."""

    def __str__(self) -> str:
        lines = [f"started from {self.source}"]
        for title, names in (("loaded", self.loaded), ("left", self.left), ("missing", self.missing)):
            more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            lines.append(f"  {title:<8}{len(names):>5}  {', '.join(names[:SHOWN])}{more}".rstrip())
        return "\n".join(lines)


class Source:
    """Tensors of a checkpoint, each marked when it is taken."""

    def __init__(self, folder: str | Path, types: tuple[str, ...], key: str) -> None:
        self.folder, self.key = str(folder), key
        if not (Path(folder) / "config.json").is_file():
            raise ConfigError(f"`model.{key}` must be a local transformers folder with a config.json; {self.folder!r} is not.")
        self.config = AutoConfig.from_pretrained(self.folder, local_files_only=True)
        if self.config.model_type not in types:
            raise ConfigError(
                f"`model.{key}` must be a checkpoint of type {' or '.join(types)}; {self.folder!r} holds a {self.config.model_type}."
            )
        self.tensors: dict[str, Tensor] = AutoModel.from_pretrained(self.folder, local_files_only=True, dtype=torch.float32).state_dict()
        self.taken: set[str] = set()

    def take(self, *names: str) -> Tensor:
        """The first tensor of these names that there is; transformers has renamed some between versions."""
        for name in names:
            if name in self.tensors:
                self.taken.add(name)
                return self.tensors[name]
        raise ConfigError(f"`model.{self.key}`: {self.folder!r} holds no tensor {names[0]!r}. It is not of the shape of its type.")

    def check(self, model: MMScaleModel) -> None:
        """Raise ConfigError where widths differ."""
        ours = {
            "hidden_size": model.config.hidden_size,
            "intermediate_size": model.config.mlp_size,
            "num_attention_heads": model.config.num_heads,
        }
        for name, value in ours.items():
            if getattr(self.config, name) != value:
                raise ConfigError(
                    f"`model.{self.key}`: {self.folder!r} has {name} = {getattr(self.config, name)}, the model {value}. "
                    "Set model.hidden_size, model.num_heads and model.mlp_ratio to the checkpoint's."
                )

    def check_pixels(self, model: MMScaleModel) -> None:
        """Raise ConfigError where the checkpoint's own preprocessor, if it is there, scales pixels otherwise."""
        path = Path(self.folder) / "preprocessor_config.json"
        if not path.is_file():
            return
        theirs = json.loads(path.read_text(encoding="utf-8"))
        for name in ("image_mean", "image_std"):
            ours = list(getattr(model.config, name))
            if theirs.get(name, ours) != ours:
                raise ConfigError(
                    f"`model.{self.key}`: {self.folder!r} was trained with {name} = {theirs[name]}, the model has {ours}. "
                    f"Set model.{name} to the checkpoint's."
                )


def load_towers(model: MMScaleModel, config: ModelConfig) -> list[LoadReport]:
    """Start the experts from the checkpoints that `model.init_text_from` and `model.init_image_from` name.

    Raises:
        ConfigError: not a local checkpoint of a known type, or one of another width.
    """
    reports = []
    if config.init_text_from is not None:
        reports.append(load_text(model, config.init_text_from))
    if config.init_image_from is not None:
        reports.append(load_image(model, config.init_image_from))
    return reports


def load_text(model: MMScaleModel, folder: str | Path) -> LoadReport:
    """Start the text expert from a BERT-shaped checkpoint; errors as `load_towers`."""
    source = Source(folder, TEXT_TYPES, "init_text_from")
    source.check(model)
    words = source.take("embeddings.word_embeddings.weight")
    if len(words) != model.config.vocab_size:
        raise ConfigError(
            f"`model.init_text_from`: {str(folder)!r} has a vocabulary of {len(words)}, data.tokenizer one of {model.config.vocab_size}. "
            "Set data.tokenizer to the checkpoint's folder."
        )
    positions = source.take("embeddings.position_embeddings.weight")
    if source.config.model_type != "bert":  # the RoBERTa family counts positions from padding_idx + 1
        positions = positions[source.config.pad_token_id + 1 :]
    rows = min(len(positions), model.config.max_text_tokens)
    assert model.text_embedding.positions is not None  # ModelConfig refuses such a checkpoint with rotary positions
    table = model.text_embedding.positions.weight.detach().clone()
    table[:rows] = positions[:rows] + source.take("embeddings.token_type_embeddings.weight")[0]
    found = {"text_embedding.words.weight": words, "text_embedding.positions.weight": table}
    places = _layer_places(model, "text", source.config.num_hidden_layers)
    for i, place in enumerate(places):
        found |= _bert_layer(source, i, place)
    found |= _pair(source, "text_embedding.norm", "embeddings.LayerNorm")
    for i, place in enumerate(places[1:]):  # the norm after a layer feeds the next one's attention
        found |= _pair(source, f"{place}.attention_norm", f"encoder.layer.{i}.output.LayerNorm")
    if len(places) == model.config.unimodal_layers == source.config.num_hidden_layers and places:
        found |= _pair(source, "caption_projection.norm", f"encoder.layer.{len(places) - 1}.output.LayerNorm")
    return _fill(model, source, found, ("text_embedding.", "text_layers.", "caption_projection.norm.", ".text."))


def _bert_layer(source: Source, layer: int, place: str) -> dict[str, Tensor]:
    base = f"encoder.layer.{layer}"
    found = _joined(source, f"{place}.qkv", [(f"{base}.attention.self.{part}",) for part in ("query", "key", "value")])
    found |= _pair(source, f"{place}.out", f"{base}.attention.output.dense")
    found |= _pair(source, f"{place}.mlp_norm", f"{base}.attention.output.LayerNorm")
    found |= _pair(source, f"{place}.up", f"{base}.intermediate.dense")
    return found | _pair(source, f"{place}.down", f"{base}.output.dense")


def load_image(model: MMScaleModel, folder: str | Path) -> LoadReport:
    """Start the perception expert from a ViT-shaped checkpoint; errors as `load_towers`."""
    source = Source(folder, IMAGE_TYPES, "init_image_from")
    source.check(model)
    if source.config.patch_size != model.config.patch_size:
        raise ConfigError(
            f"`model.init_image_from`: {str(folder)!r} has patches of {source.config.patch_size} pixels, model.patch_size is "
            f"{model.config.patch_size}. Set model.patch_size to the checkpoint's."
        )
    source.check_pixels(model)
    positions = source.take("embeddings.position_embeddings")[0]
    if source.config.model_type == "deit":  # the distillation token's row stands second
        positions = torch.cat([positions[:1], positions[2:]])
    found = {
        "image_embedding.patch_weight": source.take("embeddings.patch_embeddings.projection.weight").flatten(1),
        "image_embedding.patch_bias": source.take("embeddings.patch_embeddings.projection.bias"),
        "image_embedding.cls_token": source.take("embeddings.cls_token"),
        "image_embedding.positions": resize_positions(positions, model.config.patches),
    }
    places = _layer_places(model, "perception", source.config.num_hidden_layers)
    for i, place in enumerate(places):
        found |= _vit_layer(source, i, place)
    if len(places) == model.config.unimodal_layers == source.config.num_hidden_layers:
        found |= _pair(source, "image_projection.norm", "layernorm")
    return _fill(model, source, found, ("image_embedding.", "image_layers.", "image_projection.norm.", ".perception."))


def _vit_layer(source: Source, layer: int, place: str) -> dict[str, Tensor]:
    bases = (f"layers.{layer}", f"encoder.layer.{layer}")
    parts = [("attention.q_proj", "attention.attention.query"), ("attention.k_proj", "attention.attention.key")]
    parts += [("attention.v_proj", "attention.attention.value")]
    found = _joined(source, f"{place}.qkv", [tuple(f"{b}.{n}" for b in bases for n in names) for names in parts])
    for ours, theirs in (
        ("attention_norm", ("layernorm_before",)),
        ("out", ("attention.o_proj", "attention.output.dense")),
        ("mlp_norm", ("layernorm_after",)),
        ("up", ("mlp.fc1", "intermediate.dense")),
        ("down", ("mlp.fc2", "output.dense")),
    ):
        found |= _pair(source, f"{place}.{ours}", *(f"{b}.{n}" for b in bases for n in theirs))
    return found


def _layer_places(model: MMScaleModel, expert: str, layers: int) -> list[str]:
    """Where a checkpoint's layers go, in order; fewer when the model is shallower."""
    lower = "text_layers" if expert == "text" else "image_layers"
    places = [f"{lower}.{i}.expert" for i in range(model.config.unimodal_layers)]
    return (places + [f"fusion_layers.{i}.{expert}" for i in range(model.config.fusion_layers)])[:layers]


def _pair(source: Source, ours: str, *theirs: str) -> dict[str, Tensor]:
    return {f"{ours}.{part}": source.take(*(f"{name}.{part}" for name in theirs)) for part in ("weight", "bias")}


def _joined(source: Source, ours: str, theirs: list[tuple[str, ...]]) -> dict[str, Tensor]:
    join: Callable[[str], Tensor] = lambda part: torch.cat([source.take(*(f"{n}.{part}" for n in names)) for names in theirs])  # noqa: E731
    return {f"{ours}.{part}": join(part) for part in ("weight", "bias")}


@torch.no_grad()
def _fill(model: MMScaleModel, source: Source, found: dict[str, Tensor], expert: tuple[str, ...]) -> LoadReport:
    parameters = dict(model.named_parameters())
    for name, value in found.items():
        parameters[name].copy_(value)
    ours = [name for name in parameters if any(part in name if part.startswith(".") else name.startswith(part) for part in expert)]
    return LoadReport(
        source.folder,
        loaded=[name for name in ours if name in found],
        left=[name for name in source.tensors if name not in source.taken],
        missing=[name for name in ours if name not in found],
    )
