"""The `objectives` and `task` sections of a stage file: what is trained for. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


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


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskConfig:
    """The task of a fine-tuning stage; it adds its head and loss to the objectives."""

    name: Literal["classification", "vqa", "retrieval", "captioning"] = "???"  # type: ignore[assignment]
    """Which of mmscale/tasks."""
    weight: float = 1.0
    """Factor of the task's loss in the total."""
    label_smoothing: float = 0.0
    """classification, vqa: label smoothing."""
    beams: int = 1
    """captioning: beam width at evaluation; 1 is greedy."""
