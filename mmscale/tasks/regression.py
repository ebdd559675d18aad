"""Regression: a number a sample, such as the rating of a pair, by the `number` head.

Shape letters: M samples of a batch, N records, R resamples.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mmscale.config import RunConfig
from mmscale.data.batch import Batch
from mmscale.data.dataset import ShardDataset
from mmscale.data.labels import number_of, number_statistics
from mmscale.data.targets import Facts, NumberTarget
from mmscale.data.tokenize import TextTokenizer
from mmscale.model import MMScaleModel
from mmscale.objectives.regress import Regress
from mmscale.tasks.evaluated import Evaluated
from mmscale.tasks.fields import target_field
from mmscale.tasks.kinds import TaskKind
from mmscale.tasks.ranking import GROUP, ranking_metrics
from mmscale.tasks.task import NOTHING_SHOWN, Metrics, Record, Resampler, mean_of_resamples, record_of, shown_rows

logger = logging.getLogger(__name__)


class Regression:
    """The `number` head, whose output is taken back to the field's own unit by the training shards' mean and standard deviation.

    Args:
        label: json field of the number; of a list of ratings the mean counts.
    """

    name = "regression"
    main_metric = "rmse"

    def __init__(self, label: str) -> None:
        self.label = label

    def predict(self, model: MMScaleModel, batch: Batch, tokenizer: TextTokenizer) -> list[Record]:
        """Predict the number of each sample that has one: `target` and `prediction` in the field's unit, and the sample's `group`."""
        facts = model.config.facts
        number_M = (model.classify(batch, "number").squeeze(1).double() * facts.std + facts.mean).tolist()
        shown = shown_rows(batch)
        records: list[Record] = []
        for row, fields in enumerate(batch.fields):
            target = number_of(fields.get(self.label))
            if target is None:
                continue
            found = {"target": target, "prediction": number_M[row]} if row in shown else {"left_out": NOTHING_SHOWN}
            group = {GROUP: fields[GROUP]} if fields.get(GROUP) is not None else {}
            records.append(record_of(batch, row, **found, **group))
        return records

    def score(self, records: Sequence[Record]) -> Metrics:
        """RMSE and MAE in the field's unit; Pearson's and Spearman's correlation; the RMSE of the samples' own mean for comparison.

        With groups also how well each is ranked, see `ranking_metrics`.
        """
        from scipy.stats import pearsonr, spearmanr

        target_N, prediction_N = _arrays(records)
        error_N = prediction_N - target_N
        correlated = self._can_correlate(target_N, prediction_N)
        return {
            "rmse": float(np.sqrt((error_N**2).mean())),
            "mae": float(np.abs(error_N).mean()),
            "pearson": float(pearsonr(prediction_N, target_N).statistic) if correlated else None,
            "spearman": float(spearmanr(prediction_N, target_N).statistic) if correlated else None,
            "rmse_of_mean": float(target_N.std()),
            "samples": float(len(records)),
            **ranking_metrics(records),
        }

    def resampler(self, records: Sequence[Record]) -> Resampler:
        """RMSE of resamples."""
        target_N, prediction_N = _arrays(records)
        mean = mean_of_resamples((prediction_N - target_N) ** 2)
        return lambda counts_RN: np.sqrt(mean(counts_RN))

    def _can_correlate(self, target_N: NDArray[np.float64], prediction_N: NDArray[np.float64]) -> bool:
        for what, values_N in ((f"numbers in `data.label={self.label}`", target_N), ("predictions", prediction_N)):
            if len(values_N) < 2 or not np.isfinite(values_N).all() or np.ptp(values_N) <= 1e-12 * np.abs(values_N).max():
                logger.warning(
                    "The metrics pearson and spearman are undefined and reported as null: the %d %s are all the same or not finite, and a "
                    "correlation takes two that differ. Evaluate on more samples.",
                    *(len(values_N), what),
                )
                return False
        return True


def _arrays(records: Sequence[Record]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return np.array([r["target"] for r in records], dtype=float), np.array([r["prediction"] for r in records], dtype=float)


def _study(config: RunConfig, dataset: ShardDataset) -> Facts:
    mean, std = number_statistics(dataset.reader, target_field(config))
    return Facts(mean=mean, std=std)


def _draw(found: Evaluated) -> None:
    """Draw what was predicted over what is true."""
    from mmscale.pictures import draw_scatter

    draw_scatter(*_arrays(found.records), found.out / "scatter.png", name=found.config.data.label or "")


KIND = TaskKind(
    name="regression",
    build=lambda config: Regression(target_field(config)),
    objective=lambda task: Regress(weight=task.weight, squared=task.loss == "squared"),
    text=True,
    head="number",
    outputs=lambda facts: 1,
    study=_study,
    target=lambda config, facts: NumberTarget(field=target_field(config), mean=facts.mean, std=facts.std),
    draw=_draw,
)
