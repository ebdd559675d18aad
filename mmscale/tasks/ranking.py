"""How well numbers rank the samples of a group, such as the items that one person was offered.

Source: Jarvelin and Kekalainen 2002 (NDCG), by scikit-learn; pairs as in Kendall's tau (Kendall 1938).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from mmscale.tasks.task import Metrics, Record

logger = logging.getLogger(__name__)
GROUP = "group"
"""Field that says which samples belong together; one without it is a group of its own."""
BLOCK = 256
"""Samples that are compared with all others at once."""
AT = 10
"""First ranks that NDCG looks at."""
Numbers = NDArray[np.float64]


def ranking_metrics(records: Sequence[Record]) -> Metrics:
    """Rank each group's samples by `prediction` and compare with `target`.

    Args:
        records: with `target` and `prediction`; those without a `group` take no part.

    Returns:
        Nothing where no record has a group. Else `ndcg_10` and `pair_accuracy`, means over the groups in which two targets differ, and
        `groups`, how many those are; None, with a warning, where there is no such group or a prediction is not finite. Of a pair with
        equal predictions a half is right.
    """
    grouped = sorted((r for r in records if GROUP in r), key=lambda r: str(r[GROUP]))
    if not grouped:
        return {}
    sides = [
        tuple(np.array([r[side] for r in found], dtype=float) for side in ("target", "prediction"))
        for found in (list(several) for _, several in groupby(grouped, key=lambda r: str(r[GROUP])))
    ]
    kept = [(target_N, prediction_N) for target_N, prediction_N in sides if np.ptp(target_N) > 0]
    finite = all(np.isfinite(prediction_N).all() for _, prediction_N in kept)
    if not kept or not finite:
        why = "predictions are not finite" if kept else f"no two samples of a group differ in what is ranked ({len(sides)} groups)"
        logger.warning("The metrics ndcg_%d and pair_accuracy are undefined and reported as null: by the field %r, %s.", AT, GROUP, why)
        return {f"ndcg_{AT}": None, "pair_accuracy": None, "groups": 0.0}
    pairs = [pair_accuracy(*side) for side in kept]
    return {f"ndcg_{AT}": _ndcg(kept), "pair_accuracy": float(np.mean(pairs)), "groups": float(len(kept))}


def pair_accuracy(target_N: Numbers, prediction_N: Numbers) -> float:
    """Part of the pairs of different targets that predictions order as targets do.

    Args:
        target_N: true numbers, not all equal.
        prediction_N: predicted ones.
    """
    right = pairs = 0.0
    for start in range(0, len(target_N), BLOCK):  # not all pairs at once: a group may be large
        rows = slice(start, start + BLOCK)
        above_BN = target_N[rows, None] > target_N
        right += float(np.sign(prediction_N[rows, None] - prediction_N)[above_BN].sum())
        pairs += float(np.count_nonzero(above_BN))
    return (1 + right / pairs) / 2


def _ndcg(kept: Sequence[tuple[Numbers, ...]]) -> float | None:
    from sklearn.metrics import ndcg_score

    least = min(target_N.min() for target_N, _ in kept)
    if least < 0:
        logger.warning("The metric ndcg_%d is undefined and reported as null: it takes gains of 0 and more, and there is %g.", AT, least)
        return None
    return float(np.mean([ndcg_score(target_N[None], prediction_N[None], k=AT) for target_N, prediction_N in kept]))
