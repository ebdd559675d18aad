"""What a configuration will need on a rank, before anything is started, from the model itself without its weights (`mmscale.outline`).

The arithmetic is that of the run (`mmscale.memory`). torch is loaded when an estimate is asked for, not before.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmscale.arithmetic import plan_batch
from mmscale.config import RunConfig

if TYPE_CHECKING:
    from mmscale.memory import ParameterSize

VOCABULARY = 30_522
"""Entries of the tokenizer where it is not known: BERT's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """Numbers of a run."""

    parameters: int
    checkpoint_bytes: int
    state_bytes: int
    """Of weights, gradients, optimizer and buffers on a rank, in its own and the host's memory; activations come on top."""


def estimate(config: RunConfig, ranks: int, *, bf16: bool, vocabulary: int = VOCABULARY) -> Estimate:
    """Estimate a run.

    Args:
        config: the stage.
        ranks: how many there will be.
        bf16: weights and gradients are in bf16, beside fp32 masters.
        vocabulary: entries of the tokenizer.

    Raises:
        ConfigError: adapters or frozen names that the model does not have.
    """
    from mmscale.memory import parameter_sizes, with_state
    from mmscale.outline import outline

    sizes = parameter_sizes(outline(config, vocabulary, len(config.data.labels or ())), config.optimizer)
    width = 2 if bf16 else 4
    memory = with_state(sizes, config, plan_batch(config, ranks), width, 0, 0)
    return Estimate(
        parameters=sum(s.numel for s in sizes),
        checkpoint_bytes=checkpoint_bytes(sizes, config, width),
        state_bytes=int(memory.device + memory.host),
    )


def checkpoint_bytes(sizes: Sequence[ParameterSize], config: RunConfig, width: int) -> int:
    """Size of a checkpoint: fp32 masters and moments (docs/checkpoints.md); what is frozen is saved as it is.

    Args:
        sizes: of the parameters.
        config: the stage.
        width: bytes of a weight.
    """
    average = 4 if config.train.ema_decay is not None else 0
    return sum(s.numel * (4 + 4 * s.moments + average if s.trained else width) for s in sizes)


def known_vocabulary(config: RunConfig) -> int | None:
    """Entries of the tokenizer, where it can be found."""
    folder = config.data.tokenizer or (f"{config.data.shards}/tokenizer" if isinstance(config.data.shards, str) else "")
    try:
        return len(json.loads((Path(folder) / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
