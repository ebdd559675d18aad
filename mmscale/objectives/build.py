"""From the configuration to the objectives, in the order their terms are summed."""

from __future__ import annotations

import dataclasses

from mmscale.config import RunConfig
from mmscale.data.targets import Facts
from mmscale.objectives.base import Objective
from mmscale.objectives.captioning import Captioning
from mmscale.objectives.classify import Classify
from mmscale.objectives.contrastive import Contrastive
from mmscale.objectives.masked_image import MaskedImage
from mmscale.objectives.masked_language import MaskedLanguage
from mmscale.objectives.matching import Matching
from mmscale.objectives.tag import Tag
from mmscale.tasks.kinds import kind_of
from shards.errors import ConfigError


def build_objectives(config: RunConfig, facts: Facts | None = None) -> list[Objective]:
    """The pretraining objectives of positive weight, then the task's.

    A task whose objective is among those already keeps the one of `objectives`, with the task's weight added.

    Args:
        config: the stage.
        facts: what the task took from its training shards; classification takes the labels' weights from it.
    """
    o = config.objectives
    built: list[Objective] = [
        Contrastive(weight=o.contrastive.weight, group=o.contrastive.group, negatives=o.contrastive.negatives),
        Matching(weight=o.matching.weight, group=o.matching.group),
        MaskedLanguage(weight=o.masked_language.weight),
        Captioning(weight=o.captioning.weight),
        MaskedImage(weight=o.masked_image.weight, target=o.masked_image.target),
    ]
    if config.task is not None:
        added = kind_of(config.task.name).objective(config.task)
        if facts is not None and facts.weights is not None and isinstance(added, Classify):
            added = dataclasses.replace(added, class_weights=facts.weights)
        mixes = config.data.augment.mixes
        if mixes is not None and not isinstance(added, (Classify, Tag)):
            raise ConfigError(
                f"`data.augment.{mixes}` mixes labels, and the loss of task.name = {config.task.name} is neither Classify nor Tag, which "
                f"know how. Set {mixes}=0."
            )
        built = [_sum(objective, added) for objective in built]
        if added.name not in {objective.name for objective in built}:
            built.append(added)
    return [objective for objective in built if objective.weight > 0]


def _sum(objective: Objective, added: Objective) -> Objective:
    if objective.name != added.name:
        return objective
    return dataclasses.replace(objective, weight=objective.weight + added.weight)  # type: ignore[type-var]
