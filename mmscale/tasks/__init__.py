"""What a model is fine-tuned and evaluated for: one file a task, one interface."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mmscale.config import RunConfig
from mmscale.data.dataset import ShardDataset
from mmscale.data.labels import label_vocabulary as read_labels
from mmscale.tasks.captioning import Captioning
from mmscale.tasks.classification import Classification
from mmscale.tasks.retrieval import Retrieval
from mmscale.tasks.task import Record, Task
from shards.errors import ConfigError

__all__ = ["LABEL_TASKS", "Record", "Task", "build_task", "head_sizes", "is_labelled", "label_vocabulary"]

LABEL_TASKS = ("classification", "vqa")
"""Tasks that choose a label by the model's `label` head."""


def build_task(config: RunConfig) -> Task:
    """Build the task of a stage; without one it is retrieval, what every pretraining is looked at by.

    Raises:
        ConfigError: the field that the task needs is not named.
    """
    data, task = config.data, config.task
    if task is None or task.name == "retrieval":
        return Retrieval(_named(data.caption, "caption", "text"))
    if task.name == "captioning":
        return Captioning(_named(data.caption, "caption", "text"), task.beams)
    return Classification(task.name, _named(data.label, "label", "target"))


def _named(field: str | None, key: str, what: str) -> str:
    if field is None:
        raise ConfigError(f"`data.{key}` must name the json field that holds the {what} of the task; it is null.")
    return field


def is_labelled(config: RunConfig) -> bool:
    """Whether the stage trains a classifier over `data.label`."""
    return config.task is not None and config.task.name in LABEL_TASKS


def head_sizes(config: RunConfig, labels: Sequence[str] | None) -> Mapping[str, int]:
    """Sizes of the heads that the stage's task adds to the model."""
    return {"label": len(labels)} if is_labelled(config) and labels else {}


def label_vocabulary(config: RunConfig, dataset: ShardDataset) -> list[str] | None:
    """Take the label vocabulary from `data.labels`, or read it from the training shards.

    Raises:
        ConfigError: the task needs a label field and none is named, or no sample has it.
    """
    if not is_labelled(config):
        return None
    field = _named(config.data.label, "label", "target")
    if config.data.labels:
        return list(config.data.labels)
    labels = read_labels(dataset.reader, field)
    if len(labels) < 2:
        raise ConfigError(
            f"`data.label`: all samples of {config.data.shards!r} have the same {field}, {labels[0]!r}; two labels are needed."
        )
    return labels
