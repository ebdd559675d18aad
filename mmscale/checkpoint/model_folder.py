"""The model inside a checkpoint, in the transformers layout: what evaluation, export and `init_from` read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from mmscale.errors import CheckpointError
from mmscale.run_folder import fsync

MODEL = "model"
"""Folder of the weights as trained."""
AVERAGE = "ema"
"""Folder of their moving average, where one is kept."""
_WEIGHTS = "model.safetensors"
_UNSEEN_IN_SHAPES = (
    *("num_heads", "activation", "image_mean", "image_std"),
    *("text.num_heads", "text.activation", "text.norm", "image.activation"),
)
"""Keys of the model's configuration that weights of equal shapes may differ in and then compute something else."""


def write_model(folder: Path, config: object, weights: Iterator[tuple[str, Tensor]], tokenizer: Path | None, *, write: bool) -> list[Path]:
    """Write config.json, model.safetensors and the tokenizer (all ranks call: `weights` gathers).

    Args:
        write: whether this rank writes; the others only take part in the gathers.

    Returns:
        The files written.
    """
    kept = {name: value.contiguous() for name, value in weights if write}
    if not write:
        return []
    folder.mkdir(parents=True)
    config.save_pretrained(folder)  # type: ignore[attr-defined]
    save_file(kept, folder / _WEIGHTS, metadata={"format": "pt"})
    if tokenizer is not None:
        shutil.copytree(tokenizer, folder / "tokenizer")
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    for path in files:
        fsync(path)
    return files


def model_folder(checkpoint: Path) -> Path:
    """Find the model of a checkpoint: the moving average where there is one."""
    return checkpoint / AVERAGE if (checkpoint / AVERAGE).is_dir() else checkpoint / MODEL


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
    """Start a model from a checkpoint's weights; heads may differ, the stack may not.

    Raises:
        CheckpointError: no weights, tensors of another shape, or weights that were trained to be used otherwise.
    """
    path = model_folder(checkpoint) / _WEIGHTS
    if not path.is_file():
        raise CheckpointError(f"`init_from`: {str(checkpoint)!r} holds no {_WEIGHTS}. Give a run folder or one of its checkpoints.")
    saved = load_file(path)
    own = dict(model.state_dict())
    shared = {n: v for n, v in saved.items() if n in own and own[n].shape == v.shape}
    wrong = [n for n in saved if n in own and n not in shared and not n.startswith("task_heads.")]
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
    theirs = json.loads((path.parent / "config.json").read_text(encoding="utf-8"))
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
