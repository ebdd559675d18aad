"""Where the numbers of a stage file must lie: a wrong one is refused before anything is computed from it. No torch here."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

from shards.configfile import need

AT_LEAST: dict[str, float] = {
    **dict.fromkeys(("model.hidden_size", "model.num_heads", "model.image_size", "model.patch_size"), 1),
    **dict.fromkeys(("model.projection_size", "model.max_text_tokens"), 1),
    **dict.fromkeys(("model.unimodal_layers", "model.fusion_layers"), 0),
    **dict.fromkeys(("model.text.layers", "model.image.layers", "model.image.leading_tokens"), 0),
    **dict.fromkeys(("model.text.hidden_size", "model.text.num_heads"), 1),
    **dict.fromkeys(("train.steps", "train.global_batch", "train.micro_batch", "log.every", "evaluate.batch"), 1),
    **dict.fromkeys(("train.clip_norm", "evaluate.every", "evaluate.samples"), 0),
    **dict.fromkeys(("optimizer.lr", "optimizer.min_lr_ratio", "optimizer.warmup_steps", "optimizer.weight_decay"), 0),
    **dict.fromkeys(("objectives.*.weight", "task.weight", "optimizer.momentum"), 0),
    **dict.fromkeys(("objectives.contrastive.group", "objectives.matching.group"), 1),
    **dict.fromkeys(("lora.rank", "lora.dropout", "model.dropout", "train.ema_decay", "task.label_smoothing", "objectives.*.fraction"), 0),
}
"""The lowest value of a key; null is allowed where the key has it."""
ABOVE: dict[str, float] = {
    **dict.fromkeys(("model.mlp_ratio", "model.text.mlp_ratio", "model.text.table_std", "objectives.*.mask"), 0),
    **dict.fromkeys(("optimizer.eps", "optimizer.head_lr_ratio", "optimizer.layer_decay"), 0),
}
"""What a key's value must be above."""
AT_MOST: dict[str, float] = dict.fromkeys(("objectives.*.fraction", "objectives.*.mask", "optimizer.layer_decay"), 1.0)
"""The highest value of a key that is a part of something."""
BELOW: dict[str, float] = dict.fromkeys(
    ("model.dropout", "lora.dropout", "train.ema_decay", "task.label_smoothing", "optimizer.momentum"), 1.0
)
"""What a key's value must be below."""


BOUNDS = (
    ("at least", operator.ge, AT_LEAST),
    ("above", operator.gt, ABOVE),
    ("at most", operator.le, AT_MOST),
    ("below", operator.lt, BELOW),
)


def check_ranges(section: str, values: Any, names: Iterable[str] = ()) -> None:
    """Raise ConfigError for the first number out of range.

    Args:
        section: of the stage file, such as `model`.
        values: its configuration.
        names: what `*` stands for.
    """
    for word, holds, bounds in BOUNDS:
        for pattern, bound in bounds.items():
            if not pattern.startswith(f"{section}."):
                continue
            for key in [pattern.replace("*", name) for name in names] if "*" in pattern else [pattern]:
                value = values
                for part in key.split(".")[1:]:
                    value = getattr(value, part)
                need(value is None or holds(value, bound), f"`{key}` must be {word} {bound:g}; got {value}.")
