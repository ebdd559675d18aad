"""A task of somebody's own, as docs/tasks.md describes one: which part of the picture is brighter, the upper or the lower one.

Everything about it is here: its target, its head, its loss, its metrics. It is trained with `task.name: tests.training.toy_task`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmscale.data.batch import Batch
from mmscale.data.example import Example
from mmscale.data.targets import Follow
from mmscale.data.tokenize import TextTokenizer
from mmscale.model import MMScaleModel
from mmscale.objectives.regress import Regress
from mmscale.tasks import Record, TaskKind
from mmscale.tasks.task import Metrics, Resampler, mean_of_resamples, record_of


@dataclass(frozen=True)
class Brighter:
    """1 where the upper half is brighter, -1 where the lower one is, NaN without an image; worked out of the picture itself."""

    name: str = "brighter"
    sample_bytes: int = 4

    def of(self, examples: Sequence[Example], follow: Follow) -> Tensor:
        return torch.tensor([float("nan") if e.image is None else side(e.image) for e in examples])


def side(image_HWC: NDArray[np.uint8]) -> float:
    upper, lower = np.array_split(image_HWC.astype(float), 2)
    return 1.0 if upper.mean() > lower.mean() else -1.0


class UpperOrLower:
    name = "upper_or_lower"
    main_metric = "share_right"

    def predict(self, model: MMScaleModel, batch: Batch, tokenizer: TextTokenizer) -> list[Record]:
        output_M, target_M = model.classify(batch, "brighter").squeeze(1), batch.targets["brighter"]
        rows = batch.image_rows_N.tolist()
        return [record_of(batch, row, target=target_M[row].item(), prediction=output_M[row].item()) for row in rows]

    def score(self, records: Sequence[Record]) -> Metrics:
        return {"share_right": float(right(records).mean())}

    def resampler(self, records: Sequence[Record]) -> Resampler:
        return mean_of_resamples(right(records))


def right(records: Sequence[Record]) -> NDArray[np.bool_]:
    return np.array([r["target"] * r["prediction"] > 0 for r in records])


KIND = TaskKind(
    name="upper_or_lower",
    build=lambda config: UpperOrLower(),
    objective=lambda task: Regress(weight=task.weight, squared=bool(task.options.get("squared")), head="brighter", name="brighter"),
    text=True,
    head="brighter",
    outputs=lambda facts: 1,
    target=lambda config, facts: Brighter(),
)
