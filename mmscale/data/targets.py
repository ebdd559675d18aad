"""A task's targets: from samples to the tensors of `Batch.targets`, and what has to be known of the training shards for that.

Shape letters: M samples, C labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mmscale.data.batch import IGNORE
from mmscale.data.example import Example
from mmscale.data.labels import label_of, labels_of, number_of

Follow = Callable[[int, str], str]
"""(row, text) to the text that is true of that row's augmented image."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What a task takes from its training shards; the model's configuration keeps it."""

    labels: tuple[str, ...] | None = None
    """The label vocabulary in order."""
    weights: tuple[float, ...] | None = None
    """Weight of each label in the loss; a mean of 1 over the training samples. None: all alike. Of training alone, no model keeps it."""
    log_odds: tuple[float, ...] | None = None
    """Of each label among the training samples, where the head starts; None: even odds. Of training alone, no model keeps it."""
    mean: float = 0.0
    """Mean of the numbers."""
    std: float = 1.0
    """Their standard deviation."""


class Target(Protocol):
    """Makes one entry of `Batch.targets`. It is pickled into worker processes: a dataclass of a module that they can import."""

    @property
    def name(self) -> str:
        """Its name in `Batch.targets`, that of the head which learns it."""
        ...

    @property
    def sample_bytes(self) -> int:
        """Bytes of a sample's target."""
        ...

    def of(self, examples: Sequence[Example], follow: Follow) -> Tensor:
        """Targets (M, ...) of M samples; `follow` changes a label as augmentation changed its sample's image."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelTarget:
    """One label a sample: int64 (M,), IGNORE where a sample has none or one outside the vocabulary."""

    field: str
    """Key of the samples' json."""
    classes: dict[str, int]
    """Label to class."""
    name: str = "label"
    sample_bytes: int = 8

    def of(self, examples: Sequence[Example], follow: Follow) -> Tensor:
        """Class of each sample."""
        labels = [label_of(example.fields.get(self.field)) for example in examples]
        found = [None if label is None else self.classes.get(follow(row, label)) for row, label in enumerate(labels)]
        return torch.tensor([IGNORE if c is None else c for c in found], dtype=torch.int64)


@dataclass(frozen=True, kw_only=True, slots=True)
class TagsTarget:
    """Any number of labels a sample: float32 (M, C) of 0 and 1, rows of IGNORE where a sample does not have the field."""

    field: str
    """Key of the samples' json."""
    classes: dict[str, int]
    """Label to class."""
    name: str = "tags"

    @property
    def sample_bytes(self) -> int:
        """A float32 a label."""
        return 4 * len(self.classes)

    def of(self, examples: Sequence[Example], follow: Follow) -> Tensor:
        """Flags of each sample; labels outside the vocabulary are left out."""
        target_MC = torch.zeros(len(examples), len(self.classes))
        for row, example in enumerate(examples):
            labels = labels_of(example.fields.get(self.field))
            if labels is None:
                target_MC[row] = IGNORE
                continue
            for label in labels:
                known = self.classes.get(follow(row, label))
                if known is not None:
                    target_MC[row, known] = 1
        return target_MC


@dataclass(frozen=True, kw_only=True, slots=True)
class NumberTarget:
    """A number a sample, less the mean, over the standard deviation: float32 (M,), NaN where a sample has none."""

    field: str
    """Key of the samples' json."""
    mean: float
    """Of the training shards."""
    std: float
    """Of the training shards."""
    name: str = "number"
    sample_bytes: int = 4

    def of(self, examples: Sequence[Example], follow: Follow) -> Tensor:
        """Normalised number of each sample."""
        numbers = [number_of(example.fields.get(self.field)) for example in examples]
        normed = [float("nan") if number is None else (number - self.mean) / self.std for number in numbers]
        return torch.tensor(normed, dtype=torch.float32)
