"""The model of a checkpoint: its configuration and tokenizer lie in model/, its weights among the state's tensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mmscale.checkpoint.pieces import AVERAGE, BUFFER, FROZEN, MASTER
from mmscale.checkpoint.reader import StateReader
from mmscale.checkpoint.state import read_state
from mmscale.data.tokenize import is_wordless
from mmscale.errors import CheckpointError
from mmscale.lora import adapter_of, merged, merged_name
from mmscale.model import MMScaleConfig, MMScaleModel

MODEL = "model"
"""Folder of the model's configuration and tokenizer inside a checkpoint."""
_UNSEEN_IN_SHAPES = (
    *("num_heads", "activation", "image_mean", "image_std"),
    *("text.num_heads", "text.activation", "text.norm", "image.activation"),
)
"""Keys of the model's configuration that weights of equal shapes may differ in and then compute something else."""


def write_model_files(attempt: Path, config: object, tokenizer: Path) -> list[Path]:
    """Write config.json and the tokenizer into a checkpoint that is being made; returns the files."""
    folder = attempt / MODEL
    folder.mkdir(parents=True)
    config.save_pretrained(folder)  # type: ignore[attr-defined]
    shutil.copytree(tokenizer, folder / "tokenizer")
    return [p for p in sorted(folder.rglob("*")) if p.is_file()]


def tokenizer_of(checkpoint: Path) -> Path:
    """Find the tokenizer of a checkpoint."""
    return checkpoint / MODEL / "tokenizer"


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight of the plain model, and the tensors of a checkpoint that it is made of."""

    name: str
    """In the model."""
    kind: str
    stored: str
    """Name in the checkpoint."""
    adapter: tuple[tuple[str, str], tuple[str, str]] | None
    """(kind, name) of the two matrices of an adapter that is to be merged."""


def model_weights(reader: StateReader, *, average: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and value of each weight, one at a time: trained ones in fp32, then frozen ones and buffers; adapters are merged.

    Args:
        average: take the moving average where the checkpoint has one.
    """
    for weight in plain_weights(reader, average=average):
        value = read_weight(reader, weight)
        yield weight.name, value.float() if weight.kind == FROZEN else value


def plain_weights(reader: StateReader, *, average: bool = True) -> list[Weight]:
    """List the weights of the model without adapters."""
    kinds = {name: kind for kind, name in model_tensors(reader, average=average)}
    found = []
    for stored, kind in kinds.items():
        name, adapter = merged_name(stored), adapter_of(stored)
        if name is not None:
            both = None if adapter is None else ((kinds[adapter[0]], adapter[0]), (kinds[adapter[1]], adapter[1]))
            found.append(Weight(name, kind, stored, both))
    return found


def read_weight(reader: StateReader, weight: Weight) -> Tensor:
    """Read a weight, its adapter merged."""
    value = reader.whole(weight.kind, weight.stored)
    if weight.adapter is None:
        return value
    lora = read_state(reader.checkpoint).config["lora"]
    down, up = (reader.whole(*place) for place in weight.adapter)
    return merged(value, down, up, lora["alpha"] / lora["rank"])


def model_tensors(reader: StateReader, *, average: bool = True) -> list[tuple[str, str]]:
    """List kind and name of each tensor that makes up the model, adapters apart."""
    kinds = reader.index.tensors
    trained = AVERAGE if average and AVERAGE in kinds else MASTER
    return [(kind, name) for kind in (trained, FROZEN, BUFFER) for name in kinds.get(kind, {})]


def open_model(checkpoint: Path) -> MMScaleModel:
    """Build the model of a checkpoint with its weights, the moving average where there is one, for evaluation.

    Raises:
        CheckpointError: the checkpoint lacks a tensor of the model.
    """
    model = MMScaleModel(MMScaleConfig.from_pretrained(checkpoint / MODEL))
    weights = dict(model_weights(StateReader(checkpoint)))
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, value in own.items():
        if name not in weights or weights[name].shape != value.shape:
            raise CheckpointError(f"The checkpoint {str(checkpoint)!r} does not hold the model that it describes: {name} is not in it.")
        with torch.no_grad():
            value.copy_(weights[name])
    return model


@dataclass(frozen=True, slots=True)
class InitReport:
    """What `init_from` took."""

    loaded: tuple[str, ...]
    """Parameters taken over."""
    left: tuple[str, ...]
    """Tensors of the checkpoint that this model has no place for, such as another task's head."""
    missing: tuple[str, ...]
    """Parameters of this model that start at random."""

    def __str__(self) -> str:
        lines = [f"init_from   {len(self.loaded)} tensors loaded, {len(self.left)} left, {len(self.missing)} at random"]
        lines += [f"            left    {name}" for name in self.left] + [f"            random  {name}" for name in self.missing]
        return "\n".join(lines)


def init_from(model: PreTrainedModel, checkpoint: Path) -> InitReport:
    """Start a model from a checkpoint's weights; heads may differ, the stack may not, and words where the checkpoint has read none.

    Raises:
        CheckpointError: no weights, tensors of another shape, or weights that were trained to be used otherwise.
    """
    saved = dict(model_weights(StateReader(checkpoint)))
    own = dict(model.state_dict())
    shared = {n: v for n, v in saved.items() if n in own and own[n].shape == v.shape}
    theirs = json.loads((checkpoint / MODEL / "config.json").read_text(encoding="utf-8"))
    without_words = theirs["vocab_size"] if is_wordless(tokenizer_of(checkpoint)) else None  # its tables of words are empty
    words = {n for n, v in saved.items() if n in own and v.shape[:1] == (without_words,) and v.shape[1:] == own[n].shape[1:]}
    wrong = [n for n in saved if n in own and n not in shared and n not in words and not n.startswith("task_heads.")]
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"`init_from`: {str(checkpoint)!r} is of another model: {name} is {tuple(saved[name].shape)} there and "
            f"{tuple(own[name].shape)} here ({len(wrong)} tensors differ). Use the same `model` part and tokenizer as that run."
        )
    stack = [n for n in own if n not in saved and not n.startswith("task_heads.")]
    if len(stack) * 2 > len(own):
        raise CheckpointError(
            f"`init_from`: {str(checkpoint)!r} is of another model: {len(stack)} of {len(own)} tensors, such as {stack[0]}, are not in it."
        )
    ours = json.loads(model.config.to_json_string(use_diff=False))
    for key in _UNSEEN_IN_SHAPES:
        before, now = (_look_up(config, key) for config in (theirs, ours))
        if before != now and key.split(".")[0] in theirs:
            raise CheckpointError(
                f"`init_from`: {str(checkpoint)!r} was trained with model.{key} = {before}, here it is {now}. "
                "Use the same `model` part as that run."
            )
    model.load_state_dict(shared, strict=False)
    return InitReport(tuple(shared), tuple(n for n in saved if n not in shared), tuple(n for n in own if n not in shared))


def _look_up(config: dict[str, Any], key: str) -> Any:
    """The value under a key such as `text.norm`, None where there is none."""
    value: Any = config
    for part in key.split("."):
        value = (value or {}).get(part)
    return value
