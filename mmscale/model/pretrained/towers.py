"""From the configuration's folders to the model's parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from mmscale.model.block import Expert
from mmscale.model.embeddings import resize_positions
from mmscale.model.pretrained import shape as shapes
from mmscale.model.pretrained.bert import BERT, DISTILBERT, ROBERTA
from mmscale.model.pretrained.clip import CLIP_IMAGE, CLIP_TEXT
from mmscale.model.pretrained.family import Found, ImageFamily, TextFamily
from mmscale.model.pretrained.report import LoadReport
from mmscale.model.pretrained.shape import ImageShape, TextShape
from mmscale.model.pretrained.siglip import SIGLIP2_IMAGE, SIGLIP_IMAGE, SIGLIP_TEXT
from mmscale.model.pretrained.source import Source, read_config, read_pixels
from mmscale.model.pretrained.vit import DEIT, VIT
from mmscale.model_config import ModelConfig
from shards.errors import ConfigError

if TYPE_CHECKING:
    from mmscale.model.model import MMScaleModel

TEXT_FAMILIES = (BERT, ROBERTA, DISTILBERT, CLIP_TEXT, SIGLIP_TEXT)
IMAGE_FAMILIES = (VIT, DEIT, CLIP_IMAGE, SIGLIP_IMAGE, SIGLIP2_IMAGE)
Family = TypeVar("Family", TextFamily, ImageFamily)


def load_towers(model: MMScaleModel, config: ModelConfig) -> list[LoadReport]:
    """Start the experts from the checkpoints that `model.init_text_from` and `model.init_image_from` name.

    Raises:
        ConfigError: not a local checkpoint of a known type, or the model is of another kind; one paragraph names all keys to set.
    """
    text, image = config.init_text_from, config.init_image_from
    of_text = None if text is None else _text_of(text)
    of_image = None if image is None else _image_of(image)
    folders = " and ".join(dict.fromkeys(repr(folder) for folder in (text, image) if folder is not None))
    shapes.check(model.config, of_text and of_text[2], of_image and of_image[2], folders) if folders else None
    reports = []
    if text is not None:
        _zero_convolutions(model.text_experts())
    if image is not None:
        _zero_convolutions(
            [m for m in model.image_layers.modules() if isinstance(m, Expert)] + [found[0] for found in model.perception_experts()]
        )
    if text is not None and of_text is not None:
        reports.append(_load_text(model, Source(text, of_text[0], "text"), of_text[1], of_text[2]))
    if image is not None and of_image is not None:
        source = Source(image, of_image[0], "image")
        reports.append(_load_image(model, source, of_image[1], of_image[2]))
        if text is not None and Path(text).resolve() == Path(image).resolve():
            _load_scale(model, source, reports)
    return reports


@torch.no_grad()
def _zero_convolutions(experts: Iterable[Expert]) -> None:
    """Let convolutions, which the checkpoint has none of, start as nothing."""
    for expert in experts:
        if expert.convolution is not None:
            expert.convolution.weight.zero_()


def model_section(folders: Sequence[str]) -> dict[str, Any]:
    """Derive the `model` section that makes room for one checkpoint of both towers, or for one of each.

    Returns:
        Keys such as `text.norm`, in the order in which they are best read.

    Raises:
        ConfigError: not a local checkpoint of a known type, or two with the same tower.
    """
    towers: dict[str, tuple[str, Any]] = {}
    for folder in sorted(folders, key=lambda f: len(_kinds(f))):  # one with both towers gives what the other does not
        kinds = [kind for kind in _kinds(folder) if kind not in towers]
        if not kinds:
            raise ConfigError(
                f"{folder!r} has no tower that another of the checkpoints does not have. Give one for text and one for images."
            )
        for kind in kinds:
            towers[kind] = (folder, (_text_of(folder) if kind == "text" else _image_of(folder))[2])
    text, image = (towers[kind][1] if kind in towers else None for kind in ("text", "image"))
    keys = shapes.derive(text, image)
    return keys | {f"init_{kind}_from": folder for kind, (folder, _) in towers.items()}


def _kinds(folder: str) -> list[str]:
    kind = read_config(folder, "A checkpoint").model_type
    found = [name for name, families in (("text", TEXT_FAMILIES), ("image", IMAGE_FAMILIES)) if any(kind in f.types for f in families)]
    if not found:
        raise ConfigError(f"{folder!r} holds a {kind}; known are {', '.join(_types((*TEXT_FAMILIES, *IMAGE_FAMILIES)))}.")
    return found


def _text_of(folder: str) -> tuple[Any, TextFamily, TextShape]:
    config = read_config(folder, "`model.init_text_from`")
    family = _family(folder, config, TEXT_FAMILIES, "init_text_from")
    return config, family, family.shape(config)


def _image_of(folder: str) -> tuple[Any, ImageFamily, ImageShape]:
    config = read_config(folder, "`model.init_image_from`")
    family = _family(folder, config, IMAGE_FAMILIES, "init_image_from")
    mean, std = read_pixels(folder)
    return config, family, replace(family.shape(config), mean=mean, std=std)


def _family(folder: str, config: Any, families: Iterable[Family], key: str) -> Family:
    for family in families:
        if config.model_type in family.types:
            return family
    raise ConfigError(
        f"`model.{key}` must be a checkpoint of type {' or '.join(_types(families))}; {folder!r} holds a {config.model_type}."
    )


def _types(families: Iterable[TextFamily | ImageFamily]) -> list[str]:
    return list(dict.fromkeys(name for family in families for name in family.types))


def _load_text(model: MMScaleModel, source: Source, family: TextFamily, shape: TextShape) -> LoadReport:
    words = source.take(family.words)
    if len(words) != model.config.vocab_size:
        raise ConfigError(
            f"`model.init_text_from`: {source.folder!r} has a vocabulary of {len(words)}, data.tokenizer one of {model.config.vocab_size}. "
            "Set data.tokenizer to the checkpoint's folder."
        )
    assert model.text_embedding.positions is not None  # ModelConfig refuses a checkpoint with rotary positions
    positions, table = family.positions(source), model.text_embedding.positions.weight.detach().clone()
    rows = min(len(positions), len(table))
    table[:rows] = positions[:rows]
    found: Found = {"text_embedding.words.weight": words, "text_embedding.positions.weight": table}
    if family.norm is not None:
        found |= source.pair("text_embedding.norm", family.norm)
    places = _places(model, "text", shape.layers)
    for i, place in enumerate(places):
        found |= family.layer(source, i, place)
    whole = model.config.lower_layers("text") == shape.layers
    notes = _text_notes(model, shape, whole) + _fit(model, family.top(source) if whole else {}, found, source)
    if rows < len(table):
        notes.append(
            f"the checkpoint has positions for {rows} tokens, the last {len(table) - rows} of model.max_text_tokens start at random"
        )
    return _fill(model, source, found, notes, ("text_embedding.", "text_layers.", "caption_projection.", ".text."))


def _text_notes(model: MMScaleModel, shape: TextShape, whole: bool) -> list[str]:
    notes, captions = _depth_notes(model.config.lower_layers("text"), shape.layers, whole), model.config.text_tower.captions
    if captions != shape.captions:
        notes.append(f"captions are {captions} here, the checkpoint's texts were {shape.captions} (model.text.captions)")
    if shape.captions == "causal":
        notes.append("the bidirectional text stream sees ahead, which the checkpoint never did")
    if shape.padded:
        notes.append(f"the checkpoint was trained on texts padded to {shape.positions} tokens (data.pad_captions, data.begin)")
    return notes


def _load_image(model: MMScaleModel, source: Source, family: ImageFamily, shape: ImageShape) -> LoadReport:
    weight, bias = family.patch(source)
    leading, positions = family.leading(source), family.positions(source)
    found: Found = {
        "image_embedding.patch_weight": weight,
        "image_embedding.patch_bias": torch.zeros(len(weight)) if bias is None else bias,
        "image_embedding.positions": resize_positions(positions, model.config.patches, shape.leading, family.interpolation),
    }
    if leading is not None:
        found["image_embedding.cls_token"] = leading[None]
    if family.norm is not None:
        found |= source.pair("image_embedding.norm", family.norm)
    for i, place in enumerate(_places(model, "image", shape.layers)):
        found |= family.layer(source, i, place)
    whole = model.config.lower_layers("image") == shape.layers
    notes = _depth_notes(model.config.lower_layers("image"), shape.layers, whole)
    notes += _fit(model, family.top(source) if whole else {}, found, source)
    theirs, ours = (int(n**0.5) for n in (len(positions) - shape.leading, model.config.patches))
    if theirs != ours:
        notes.append(f"positions of {theirs} x {theirs} patches were interpolated to {ours} x {ours}")
    if shape.aspect:
        notes.append("the checkpoint was trained on images of their own aspect ratio, here they are squares")
    return _fill(model, source, found, notes, ("image_embedding.", "image_layers.", "image_projection.", ".perception."))


def _load_scale(model: MMScaleModel, source: Source, reports: list[LoadReport]) -> None:
    """Start the contrastive scalars from a checkpoint of the sigmoid loss, which has a bias, when both towers are its own."""
    if source.scale is None or source.bias is None or any("caption_projection.linear.weight" in r.missing for r in reports):
        return
    scalars = model.contrastive_scale
    with torch.no_grad():
        scalars.log_scale.copy_(source.scale.flatten().clamp(max=scalars.LARGEST) / scalars.GAIN)
        scalars.bias.copy_(source.bias.flatten() / scalars.GAIN)
    reports[-1].loaded.extend(["contrastive_scale.log_scale", "contrastive_scale.bias"])


def _places(model: MMScaleModel, modality: Any, layers: int) -> list[str]:
    """Where a checkpoint's layers go, in order; fewer when the model is shallower, or its fusion layers of another shape."""
    config = model.config
    lower, name = ("text_layers", "text") if modality == "text" else ("image_layers", "perception")
    places = [f"{lower}.{i}.expert" for i in range(config.lower_layers(modality))]
    if config.expert(modality) == config.expert(modality, fused=True):
        places += [f"fusion_layers.{i}.{name}" for i in range(config.fusion_layers)]
    return places[:layers]


def _depth_notes(lower: int, layers: int, whole: bool) -> list[str]:
    if whole:
        return []
    if lower > layers:
        return [f"the checkpoint has {layers} layers, the {lower - layers} above them start at random"]
    return [f"{lower} of the checkpoint's {layers} layers are lower layers, so its final norm and projection have no place"]


def _fit(model: MMScaleModel, top: Found, found: Found, source: Source) -> list[str]:
    """Add what stands on the last layer to what was found, but for a projection of another size."""
    parameters = dict(model.named_parameters())
    wrong = [name for name, value in top.items() if parameters[name].shape != value.shape]
    found |= {name: value for name, value in top.items() if name not in wrong}
    source.taken -= {n for n, t in source.tensors.items() if any(t is top[name] for name in wrong)}
    size = {len(top[name]) for name in wrong}
    return [f"its projection has {n} outputs, model.projection_size is {model.config.projection_size}: it was left" for n in size]


@torch.no_grad()
def _fill(model: MMScaleModel, source: Source, found: Found, notes: list[str], expert: tuple[str, ...]) -> LoadReport:
    parameters = dict(model.named_parameters())
    for name, value in found.items():
        parameters[name].copy_(value)
    ours = [name for name in parameters if any(part in name if part.startswith(".") else name.startswith(part) for part in expert)]
    return LoadReport(
        source.folder,
        loaded=[name for name in ours if name in found],
        left=[name for name in source.tensors if name not in source.taken],
        missing=[name for name in ours if name not in found],
        notes=notes,
    )
