"""What a model is fine-tuned and evaluated for: one file a task, one interface."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mmscale.config import RunConfig
from mmscale.data.targets import Facts
from mmscale.tasks.fields import caption_field, target_field
from mmscale.tasks.kinds import TaskKind, kind_of, kind_of_stage
from mmscale.tasks.task import Record, Task

if TYPE_CHECKING:
    from mmscale.data.dataset import ShardDataset
    from mmscale.data.tokenize import TextTokenizer

__all__ = [
    "Record",
    "Task",
    "TaskKind",
    "build_task",
    "caption_field",
    "check",
    "head_sizes",
    "kind_of",
    "kind_of_stage",
    "study",
    "target_field",
]


def build_task(config: RunConfig) -> Task:
    """Build the task of a stage; without one it is retrieval, what every pretraining is looked at by.

    Raises:
        ConfigError: the field that the task needs is not named, or there is no such task.
    """
    return kind_of("retrieval" if config.task is None else config.task.name).build(config)


def head_sizes(config: RunConfig, facts: Facts | None) -> Mapping[str, int]:
    """Sizes of the heads that the stage's task adds to the model."""
    kind = kind_of_stage(config)
    if kind is None or kind.head is None or kind.outputs is None or facts is None:
        return {}
    return {kind.head: kind.outputs(facts)}


def study(config: RunConfig, dataset: ShardDataset) -> Facts | None:
    """Take from the training shards what the stage's task needs to know of them; None for a task that needs to know nothing.

    Raises:
        ConfigError: the task needs a field and none is named, no sample has it, or there is nothing to learn in it.
    """
    kind = kind_of_stage(config)
    if kind is None or (kind.head is None and kind.study is None):
        return None
    return Facts() if kind.study is None else kind.study(config, dataset)


def check(config: RunConfig, facts: Facts | None, tokenizer: TextTokenizer) -> None:
    """See that what the stage's task found in the training shards fits the tokenizer and the model.

    Raises:
        ConfigError: it does not.
    """
    kind = kind_of_stage(config)
    if kind is not None and kind.check is not None and facts is not None:
        kind.check(config, facts, tokenizer)
