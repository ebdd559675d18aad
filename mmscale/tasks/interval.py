"""A task's metrics with a bootstrap interval of the main one.

Shape letters: N records, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmscale.tasks.task import Record, Task

RESAMPLES = 1000
SEED = 0
INTERVAL = (2.5, 97.5)
"""Percentiles of the resamples."""
_NUMBERS_AT_ONCE = 1 << 22
"""Counts of resamples that are held at once."""


def score_records(task: Task, records: Sequence[Record]) -> dict[str, float | None]:
    """Score a task's records and add `NAME_low` and `NAME_high`, the 95 % interval of its main metric.

    The percentile bootstrap over samples (Efron and Tibshirani 1993, chapter 13) with 1,000 resamples and a fixed seed: what the same model
    would have got on other samples of the same kind. Other trainings of the model differ by more. Resamples where the metric is
    undefined are left out.

    Args:
        task: that predicted them.
        records: in order of position, so that ranks and batches change nothing.
    """
    metrics = {name: finite(value) for name, value in task.score(records).items()}
    low, high = (None, None) if metrics[task.main_metric] is None else interval(task, records)
    return metrics | {f"{task.main_metric}_low": low, f"{task.main_metric}_high": high}


def interval(task: Task, records: Sequence[Record]) -> tuple[float | None, float | None]:
    """The 95 % interval of the main metric; None where no resample has it."""
    generator, count, resampler = np.random.default_rng(SEED), len(records), task.resampler(records)
    values = []
    for start in range(0, RESAMPLES, block := max(1, _NUMBERS_AT_ONCE // count)):
        drawn = (generator.integers(0, count, count) for _ in range(min(block, RESAMPLES - start)))
        values.append(resampler(np.stack([np.bincount(d, minlength=count) for d in drawn]).astype(np.float64)))
    value_R = np.concatenate(values)
    defined_R = value_R[np.isfinite(value_R)]
    if not len(defined_R):
        return None, None
    low, high = np.percentile(defined_R, INTERVAL)
    return float(low), float(high)


def finite(value: float | None) -> float | None:
    """JSON has no NaN: what a broken model computes is undefined."""
    return None if value is None or not np.isfinite(value) else float(value)
