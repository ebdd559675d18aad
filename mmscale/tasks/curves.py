"""Areas under curves of many resamples at once, for intervals. What one resample would be is the metric of scikit-learn with weights.

Shape letters: N records, K different scores, R resamples.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def weighted_average_precision(
    target_N: NDArray[np.bool_], score_N: NDArray[np.float32], counts_NR: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Average precision of R resamples (R,), NaN where one has no positive; equal scores are one threshold, as in scikit-learn.

    Args:
        target_N: whether each record has the label.
        score_N: its score.
        counts_NR: how often each resample has each record, a record a row: rows are taken in the order of scores, and whole rows fast.
    """
    order = np.argsort(-score_N, kind="stable")
    score_N, target_N = score_N[order], target_N[order]
    group_N = np.cumsum(np.r_[False, np.diff(score_N) != 0])
    hits = np.flatnonzero(target_N)
    if not len(hits):
        return np.full(counts_NR.shape[1], np.nan)
    groups, first = np.unique(group_N[hits], return_index=True)
    ends_K = np.searchsorted(group_N, groups, side="right")  # only thresholds with a positive add to the area
    all_KR = np.add.reduceat(counts_NR[order[: ends_K[-1]]], np.r_[0, ends_K[:-1]], axis=0).cumsum(0, dtype=np.float64)
    gained_KR = np.add.reduceat(counts_NR[order[hits]], first, axis=0)
    hits_KR = gained_KR.cumsum(0, dtype=np.float64)
    area_R: NDArray[np.float64] = (gained_KR * hits_KR / np.maximum(all_KR, 1)).sum(0)
    return ratio(area_R, hits_KR[-1])


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
