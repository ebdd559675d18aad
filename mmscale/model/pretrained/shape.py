"""What a checkpoint's tower is, in the words of the `model` section, and where a model differs from it. No tensors here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mmscale.model.configuration import MMScaleConfig
from shards.errors import ConfigError

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}
"""transformers' names of activations, and ours."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TowerShape:
    """What text and image towers have alike."""

    width: int
    heads: int
    mlp: int
    layers: int
    activation: str
    eps: float
    embedding_norm: bool
    projection: int | None
    """Outputs of the map into a contrastive space; None without one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextShape(TowerShape):
    """A text tower."""

    positions: int
    """Longest text."""
    norm: str
    captions: str
    """causal or bidirectional."""
    projection_bias: bool = False
    padded: bool = False
    """Trained on texts padded to `positions` tokens, which all see the padding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageShape(TowerShape):
    """An image tower."""

    channels: int
    image_size: int
    patch_size: int
    leading: int
    pooling: str
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    aspect: bool = False
    """Trained on images of their own aspect ratio."""


def stack(config: Any) -> dict[str, Any]:
    """Fields of a tower's shape that most of transformers' configurations have under the same names."""
    return {
        "width": config.hidden_size,
        "heads": config.num_attention_heads,
        "mlp": config.intermediate_size,
        "layers": config.num_hidden_layers,
        "activation": activation_of(config.hidden_act),
        "eps": config.layer_norm_eps,
    }


def side(value: Any) -> int:
    """The side of a square that a configuration gives as a number or as a pair."""
    pair = tuple(value) if isinstance(value, (list, tuple)) else (value, value)
    if len(set(pair)) != 1:
        raise ConfigError(f"The checkpoint's images or patches are of {pair[0]} x {pair[-1]} pixels; only squares can be loaded.")
    return int(pair[0])


def activation_of(name: str) -> str:
    """Our name of a transformers activation.

    Raises:
        ConfigError: the model has no such activation.
    """
    if name not in ACTIVATIONS:
        raise ConfigError(f"The checkpoint's activation {name!r} is none of the model's ({', '.join(sorted(set(ACTIVATIONS.values())))}).")
    return ACTIVATIONS[name]


def derive(text: TextShape | None, image: ImageShape | None) -> dict[str, Any]:
    """Derive keys of the `model` section, such as `text.norm`, that make room for these towers.

    The image tower gives the keys of the whole stack where there is one; text has its own where it differs.
    """
    first = image or text
    if first is None:
        return {}
    keys: dict[str, Any] = {
        "hidden_size": first.width,
        "num_heads": first.heads,
        "unimodal_layers": first.layers,
        "mlp_ratio": _ratio(first.mlp, first.width),
        "qk_norm": False,
        "activation": first.activation,
        "layer_norm_eps": first.eps,
    }
    if image is not None:
        keys |= {"image_size": image.image_size, "patch_size": image.patch_size}
        keys |= {name: list(value) for name, value in (("image_mean", image.mean), ("image_std", image.std)) if value is not None}
        keys |= {"image.embedding_norm": image.embedding_norm, "image.leading_tokens": image.leading, "image.pooling": image.pooling}
    if text is not None:
        own: dict[str, Any] = {"hidden_size": text.width, "num_heads": text.heads, "layers": text.layers}
        own |= {"mlp_ratio": _ratio(text.mlp, text.width), "activation": text.activation, "layer_norm_eps": text.eps}
        keys |= {f"text.{k}": v for k, v in own.items() if v != keys["unimodal_layers" if k == "layers" else k]}
        keys |= {"max_text_tokens": text.positions, "text.norm": text.norm, "text.embedding_norm": text.embedding_norm}
        keys |= {"text.captions": text.captions, "text.projection_bias": text.projection_bias}
    if (size := (text and text.projection) or (image and image.projection)) is not None:
        keys["projection_size"] = size
    return keys


def check(config: MMScaleConfig, text: TextShape | None, image: ImageShape | None, folders: str) -> None:
    """Compare a model with the towers it is to be started from.

    Raises:
        ConfigError: it would compute something else; one paragraph names all keys to set.
    """
    if image is not None and image.channels != 3:
        raise ConfigError(f"`model.init_image_from`: {folders} has images of {image.channels} channels; the model's have 3.")
    keys = derive(text, image)
    wrong: dict[str, str] = {}
    for key, ours, theirs in _compared(config, text, image):
        if ours != theirs:
            stack = key.split(".")[-1]
            own = getattr(config.text_tower if key.startswith("text.") else config.image_tower, stack, None)
            named = key if key in keys or own is not None or stack not in keys else stack
            value = keys.get(named, keys.get(stack))
            wrong[named] = f"model.{named}={_plain(value)} (now {_plain(ours)})"
    if wrong:
        raise ConfigError(
            f"{folders} has weights for a model of another kind. Set {', '.join(wrong.values())}. "
            "`mmscale model-config FOLDER` prints the whole section."
        )


Compared = tuple[str, Any, Any]
"""Key, the model's value, the checkpoint's."""


def _compared(config: MMScaleConfig, text: TextShape | None, image: ImageShape | None) -> Iterator[Compared]:
    """What must agree for a tower to compute what its checkpoint computes."""
    yield "qk_norm", config.qk_norm, False
    if image is not None:
        yield from _expert(config, image, "image")
        tower = config.image_tower
        yield "patch_size", config.patch_size, image.patch_size
        yield "image.leading_tokens", tower.leading_tokens, image.leading
        yield "image.pooling", tower.pooling, image.pooling
        yield "image.embedding_norm", tower.embedding_norm, image.embedding_norm
        for name, theirs in (("image_mean", image.mean), ("image_std", image.std)):
            ours = tuple(getattr(config, name))
            yield name, ours, ours if theirs is None else theirs
    if text is not None:
        yield from _expert(config, text, "text")
        yield "text.norm", config.text_tower.norm, text.norm
        yield "text.embedding_norm", config.text_tower.embedding_norm, text.embedding_norm
        yield "text.projection_bias", config.text_tower.projection_bias, text.projection_bias


def _expert(config: MMScaleConfig, theirs: TowerShape, modality: Any) -> Iterator[Compared]:
    ours = config.expert(modality)
    for key, mine, wanted in (
        ("hidden_size", ours.width, theirs.width),
        ("num_heads", ours.heads, theirs.heads),
        ("mlp_ratio", ours.mlp / ours.width, theirs.mlp / theirs.width),
        ("activation", ours.activation, theirs.activation),
        ("layer_norm_eps", ours.eps, theirs.eps),
    ):
        yield f"{modality}.{key}" if modality == "text" or key in ("activation", "layer_norm_eps") else key, mine, wanted


def _ratio(mlp: int, width: int) -> float:
    """The ratio that gives back this width when multiplied and cut."""
    ratio = mlp / width
    return ratio if int(width * ratio) == mlp else math.nextafter(ratio, math.inf)


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{','.join(_plain(v) for v in value)}]"
    return str(value).lower() if isinstance(value, bool) else f"{value:.16g}" if isinstance(value, float) else str(value)
