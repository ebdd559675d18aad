"""Areas under curves of many resamples at once, for intervals. What one resample would be is the metric of scikit-learn with weights.

Shape letters: N records, K different scores, R resamples.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def weighted_average_precision(
    target_N: NDArray[np.bool_], score_N: NDArray[np.float32], counts_RN: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Average precision of R resamples (R,), NaN where one has no positive; equal scores are one threshold, as in scikit-learn.

    Args:
        target_N: whether each record has the label.
        score_N: its score.
        counts_RN: how often each resample has each record.
    """
    order = np.argsort(-score_N, kind="stable")
    last_K = np.append(np.flatnonzero(np.diff(score_N[order])), len(order) - 1)
    counts_RN = counts_RN[:, order]
    all_RK = counts_RN.cumsum(1)[:, last_K]
    hits_RK = (counts_RN * target_N[order]).cumsum(1)[:, last_K]
    gained_RK = np.diff(hits_RK, axis=1, prepend=0)
    area_R: NDArray[np.float64] = (gained_RK * hits_RK / np.maximum(all_RK, 1)).sum(1)
    return ratio(area_R, hits_RK[:, -1])


def weighted_auroc(target_N: NDArray[np.bool_], score_N: NDArray[np.float64], counts_RN: NDArray[np.float64]) -> NDArray[np.float64]:
    """Area under the curve of R resamples (R,), NaN where one has no anomaly or nothing else; equal scores are one threshold.

    It is the probability that an anomaly scores above a normal sample (Hanley and McNeil 1982), ties counting a half.

    Args:
        target_N: whether each record is an anomaly.
        score_N: its score.
        counts_RN: how often each resample has each record.
    """
    order = np.argsort(score_N, kind="stable")
    first_K = np.flatnonzero(np.r_[True, np.diff(score_N[order]) != 0]) if len(order) else np.empty(0, np.int64)
    above_RK, below_RK = (
        np.add.reduceat(counts_RN[:, order] * which[order], first_K, axis=1) if len(first_K) else np.zeros((len(counts_RN), 0))
        for which in (target_N, ~target_N)
    )
    before_RK = below_RK.cumsum(1) - below_RK / 2
    return ratio((above_RK * before_RK).sum(1), above_RK.sum(1) * below_RK.sum(1))


def ratio(sum_R: NDArray[np.float64], count_R: NDArray[np.float64]) -> NDArray[np.float64]:
    """NaN where the count is 0."""
    ratio_R: NDArray[np.float64] = np.divide(sum_R, count_R, out=np.full(len(sum_R), np.nan), where=count_R > 0)
    return ratio_R
