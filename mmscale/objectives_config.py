"""The `objectives` and `task` sections of a stage file: what is trained for. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from mmscale.ranges import check_ranges
from shards.configfile import need

TASKS = ("classification", "vqa", "tagging", "regression", "retrieval", "captioning", "answering", "reasoning", "anomaly")
"""Tasks that come with mmscale: each is a file of that name in mmscale/tasks."""
OBJECTIVES = ("contrastive", "matching", "masked_language", "captioning", "masked_image")
"""Keys of `ObjectivesConfig`."""


def unknown_task(key: str, name: str) -> str:
    """What is said of a name that is no task's."""
    return (
        f"`{key}={name}` names no task. There are {', '.join(TASKS)}; a task of your own is named by its module with a dot in it, such as "
        "my_tasks.counting (docs/tasks.md)."
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    """One pretraining objective. Weight 0 turns it off."""

    weight: float = 0.0
    """Its factor in the total loss."""
    fraction: float = 1.0
    """Part of the samples, chosen by (train.seed, position), that take part. contrastive: always all."""
    mask: float = 0.15
    """masked_language: part of tokens masked. masked_image: part of patches masked."""
    group: int | None = None
    """contrastive, matching: negatives come from aligned groups of so many consecutive positions, which makes the loss independent of
    ranks and accumulation; null: contrastive uses the micro-batches of all ranks, matching the rank's own micro-batch."""
    negatives: Literal["micro", "global"] = "micro"
    """contrastive: `micro`: negatives come from the micro-batches of all ranks; `global`: from the whole global batch, which makes the loss
    independent of ranks and accumulation. With accumulation that costs one more forward of the lower layers (docs/objectives.md)."""
    target: Literal["pixels", "features"] = "pixels"
    """masked_image: predict per-patch normalised pixels (MAE) or the model's own detached unmasked features."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectivesConfig:
    """The pretraining objectives of one forward pass."""

    contrastive: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    matching: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    masked_language: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    captioning: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    masked_image: ObjectiveConfig = field(default_factory=ObjectiveConfig)

    def check(self) -> None:
        """Raise ConfigError for numbers out of range, and negatives that cannot be had."""
        check_ranges("objectives", self, OBJECTIVES)
        for name in ("matching", "masked_language", "captioning", "masked_image"):
            need(
                getattr(self, name).negatives == "micro",
                f"`objectives.{name}.negatives` must be micro: only contrastive takes negatives from the global batch (hard negatives of "
                "matching are hidden states, which stay in their micro-batch).",
            )
        need(
            self.contrastive.negatives == "micro" or self.contrastive.group is None,
            f"`objectives.contrastive.negatives=global` takes negatives from the whole global batch, `objectives.contrastive.group` = "
            f"{self.contrastive.group} from groups of so many. Set one of them: group=null, or negatives=micro.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskConfig:
    """The task of a fine-tuning stage; it adds its head and loss to the objectives."""

    name: str = "???"
    """One of `TASKS`, or the dotted name of a module of your own that has a `KIND`, such as my_tasks.counting (docs/tasks.md)."""
    weight: float = 1.0
    """Factor of the task's loss in the total."""
    label_smoothing: float = 0.0
    """classification, vqa, reasoning: label smoothing."""
    class_weights: Literal["none", "balanced"] = "none"
    """classification, vqa, reasoning: balanced weighs a sample by samples / (labels x samples of its label), counted over the training
    shards, so that every label counts alike."""
    loss: Literal["smooth_l1", "squared"] = "smooth_l1"
    """regression: smooth_l1 grows linearly from an error of one standard deviation on, squared keeps growing with its square."""
    beams: int = 1
    """captioning, answering: beam width at evaluation; 1 is greedy."""
    temperature: float = 0.0
    """captioning, answering: above 0, tokens are drawn at evaluation with log-probabilities over it; 0 takes the likeliest."""
    top_k: int = 0
    """Draw among so many of the likeliest tokens; 0 for all."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together have this probability."""
    rerank: int = 0
    """retrieval: at evaluation the matching head orders so many of the first candidates of each query anew; 0 leaves the contrastive order.
    For models that were trained with objectives.matching."""
    answers: Literal["free", "listed"] = "free"
    """answering: write anything, or one of the answers of the training shards (`data.labels` where it is set)."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of a task of your own."""

    def check(self) -> None:
        """Raise ConfigError for settings that cannot be."""
        check_ranges("task", self)
        need(self.rerank >= 0, f"`task.rerank` must be at least 1, or 0 for none; got {self.rerank}.")
        check_decoding("task.", self.beams, self.temperature, self.top_k, self.top_p)


DECODING = ("beams", "temperature", "top_k", "top_p", "rerank")
"""Keys of `TaskConfig` that an evaluation may set anew."""


def check_decoding(prefix: str, beams: int, temperature: float, top_k: int, top_p: float) -> None:
    """Check how texts are to be written.

    Args:
        prefix: of the keys, for errors.
        beams, temperature, top_k, top_p: as in `TaskConfig`.

    Raises:
        ConfigError: a value out of range, or beams and drawing together.
    """
    need(beams > 0, f"`{prefix}beams` must be at least 1; got {beams}.")
    need(temperature >= 0, f"`{prefix}temperature` must be at least 0; got {temperature:g}.")
    need(top_k >= 0, f"`{prefix}top_k` must be at least 1, or 0 for all tokens; got {top_k}.")
    need(0 < top_p <= 1, f"`{prefix}top_p` must be above 0 and at most 1; got {top_p:g}.")
    need(
        temperature == 0 or beams == 1,
        f"`{prefix}temperature` = {temperature:g} draws tokens and `{prefix}beams` = {beams} looks for the likeliest. Set one of them.",
    )
