"""The tensors of one tower of a checkpoint, each marked when it is taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModel

from shards.errors import ConfigError

Pixels = tuple[float, float, float]


def read_config(folder: str | Path, what: str) -> Any:
    """Read a folder's config.json by transformers.

    Args:
        folder: a local checkpoint.
        what: which is named so in the error.

    Raises:
        ConfigError: not a local checkpoint.
    """
    if not (Path(folder) / "config.json").is_file():
        raise ConfigError(f"{what} must be a local transformers folder with a config.json; {str(folder)!r} is not.")
    return AutoConfig.from_pretrained(str(folder), local_files_only=True)


def read_pixels(folder: str | Path) -> tuple[Pixels | None, Pixels | None]:
    """Mean and standard deviation that the checkpoint's own preprocessor, if it is there, scales pixels by."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = Path(folder) / name
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            found = found.get("image_processor", found)
            mean, std = (tuple(found[k]) if found.get(k) is not None else None for k in ("image_mean", "image_std"))
            return mean, std
    return None, None


class Source:
    """Tensors of a tower by their names within it.

    Args:
        folder: a local transformers folder.
        config: its configuration.
        tower: which tower, where it holds two.
    """

    def __init__(self, folder: str | Path, config: Any, tower: Literal["text", "image"]) -> None:
        self.folder = str(folder)
        self.config = config
        self.key = f"init_{tower}_from"
        own, other = ("text_model.", "vision_model.") if tower == "text" else ("vision_model.", "text_model.")
        tensors = _read_tensors(self.folder, config)
        self.tensors = {name.removeprefix(own): tensor for name, tensor in tensors.items() if not name.startswith(other)}
        for name in ("logit_scale", "logit_bias", "visual_projection.weight" if tower == "text" else "text_projection.weight"):
            self.tensors.pop(name, None)
        self.scale, self.bias = tensors.get("logit_scale"), tensors.get("logit_bias")
        self.taken: set[str] = set()

    def find(self, *names: str) -> Tensor | None:
        """The first tensor of these names that there is; transformers has renamed some between versions."""
        for name in names:
            if name in self.tensors:
                self.taken.add(name)
                return self.tensors[name]
        return None

    def take(self, *names: str) -> Tensor:
        """The same, and ConfigError where there is none."""
        found = self.find(*names)
        if found is None:
            raise ConfigError(f"`model.{self.key}`: {self.folder!r} holds no tensor {names[0]!r}. It is not of the shape of its type.")
        return found

    def pair(self, ours: str, *theirs: str) -> dict[str, Tensor]:
        """Weight and bias of one module, the first of these names."""
        return {f"{ours}.{part}": self.take(*(f"{name}.{part}" for name in theirs)) for part in ("weight", "bias")}

    def joined(self, ours: str, *theirs: tuple[str, ...]) -> dict[str, Tensor]:
        """Weights and biases of several modules, each the first of its names, one below the other; absent biases are 0."""
        weights = [self.take(*(f"{name}.weight" for name in names)) for names in theirs]
        biases = [self.find(*(f"{name}.bias" for name in names)) for names in theirs]
        filled = [w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)]
        return {f"{ours}.weight": torch.cat(weights), f"{ours}.bias": torch.cat(filled)}


def _read_tensors(folder: str, config: Any) -> dict[str, Tensor]:
    """All tensors that are in the files; what transformers would draw at random is left out."""
    named = (getattr(config, "architectures", None) or [""])[0]
    auto = getattr(transformers, named, AutoModel) if named.endswith("ModelWithProjection") else AutoModel
    model, info = auto.from_pretrained(folder, local_files_only=True, dtype=torch.float32, output_loading_info=True)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in set(info["missing_keys"])}
