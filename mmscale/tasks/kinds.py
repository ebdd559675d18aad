"""What a task is made of, and how it is found by its name: `KIND` of its file. Adding one is described in docs/tasks.md."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmscale.config import RunConfig
from mmscale.objectives_config import TASKS, TaskConfig, unknown_task
from shards.errors import ConfigError

if TYPE_CHECKING:
    from mmscale.data.dataset import ShardDataset
    from mmscale.data.targets import Facts, Target
    from mmscale.data.tokenize import TextTokenizer
    from mmscale.objectives.base import Objective
    from mmscale.tasks.evaluated import Evaluated
    from mmscale.tasks.rerank import Look
    from mmscale.tasks.task import Record, Task


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskKind:
    """Everything that training and evaluation ask of a task. A task without a head leaves out what is about one."""

    name: str
    """Its name in errors."""
    build: Callable[[RunConfig], Task]
    """What predicts and scores."""
    objective: Callable[[TaskConfig], Objective]
    """The loss that trains it."""
    caption: bool = False
    """Whether it reads the causal text, `data.caption`."""
    writes: bool = False
    """Whether it writes captions: all of them enter the fusion layers."""
    text: bool = False
    """Whether it reads the bidirectional text, `data.text`."""
    masks: bool = False
    """Whether it learns from hidden patches, `objectives.masked_image.mask` of them."""
    head: str | None = None
    """Name of the model's head that it trains and reads; kinds of one head can be evaluated for one another. None: it needs none."""
    outputs: Callable[[Facts], int] | None = None
    """Size of the head."""
    study: Callable[[RunConfig, ShardDataset], Facts] | None = None
    """What is taken from the training shards before the first step, on rank 0 for all."""
    check: Callable[[RunConfig, Facts, TextTokenizer], None] | None = None
    """Raises ConfigError where what was found does not fit the tokenizer or the model, before the first step."""
    target: Callable[[RunConfig, Facts], Target] | None = None
    """What goes into `Batch.targets`, under the head's name."""
    refine: Callable[[Look, list[Record]], list[Record]] | None = None
    """A second look of the model at all records together, which rank 0 has; all ranks call."""
    draw: Callable[[Evaluated], None] | None = None
    """Draws pictures of an evaluation into its folder."""


def kind_of(name: str, key: str = "task.name") -> TaskKind:
    """Find a task: a name of `TASKS`, or the dotted name of a module that has a `KIND`, looked up in the current folder too.

    Args:
        name: of the task.
        key: the configuration key that has it, for errors.

    Raises:
        ConfigError: there is no such task.
    """
    if name in TASKS:
        kind = importlib.import_module(f"mmscale.tasks.{name}").KIND
    elif "." in name:
        kind = _own(name, key)
    else:
        raise ConfigError(unknown_task(key, name))
    assert isinstance(kind, TaskKind)
    return kind


def kind_of_stage(config: RunConfig) -> TaskKind | None:
    """The stage's task; None in pretraining."""
    return None if config.task is None else kind_of(config.task.name)


def _own(name: str, key: str) -> TaskKind:
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:  # last, so that no file beside the user hides a package
        sys.path.append(here)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as e:
        if e.name is None or not (name == e.name or name.startswith(f"{e.name}.")):
            raise  # what the module itself imports
        raise ConfigError(
            f"`{key}={name}` names a module that is not there: no {e.name} in {here} or on Python's path. Start in the folder that "
            "holds it, or add that to PYTHONPATH."
        ) from e
    kind = getattr(module, "KIND", None)
    if not isinstance(kind, TaskKind):
        raise ConfigError(f"`{key}={name}`: {module.__file__} has no KIND of type mmscale.tasks.TaskKind. docs/tasks.md shows one.")
    return kind
