"""Ranking within groups, by hand and against scikit-learn and scipy."""

from __future__ import annotations

import logging
from math import log2
from typing import Any

import numpy as np
import pytest
from scipy.stats import kendalltau

from mmscale.tasks import Record
from mmscale.tasks.ranking import BLOCK, pair_accuracy, ranking_metrics
from mmscale.tasks.regression import Regression
from tests.model.tiny import make_batch, random_rows, tiny_config
from tests.tasks.test_regression import MMScaleModel


def record(group: Any, target: float, prediction: float) -> Record:
    return {"target": target, "prediction": prediction} | ({} if group is None else {"group": group})


def test_by_hand() -> None:
    """Anna's best of three comes second; what Bob was offered he liked alike, and Carl was offered one thing."""
    records = [record("anna", 3, 0.2), record("bob", 1, 5.0), record("anna", 1, 0.9), record(7, 2, 1.0)]
    records += [record("anna", 0, 0.1), record("bob", 1, 4.0), record(None, 9, 9.0), record(8, 2, 2), record(8, 1, 2)]
    found = ranking_metrics(records)
    anna = (1 / log2(2) + 3 / log2(3)) / (3 / log2(2) + 1 / log2(3))
    tied = 1.5 * (1 / log2(2) + 1 / log2(3)) / (2 / log2(2) + 1 / log2(3))  # scikit-learn takes the mean of both orders
    assert found == {
        "ndcg_10": pytest.approx((anna + tied) / 2),
        "pair_accuracy": pytest.approx((2 / 3 + 1 / 2) / 2),
        "groups": 2.0,
    }
    assert Regression("rating").score(records)["ndcg_10"] == found["ndcg_10"]


def test_pairs_are_those_of_kendall() -> None:
    generator = np.random.default_rng(0)
    size = BLOCK + 45
    target_N, prediction_N = generator.permutation(size).astype(float), generator.normal(size=size)
    assert pair_accuracy(target_N, prediction_N) == pytest.approx((1 + kendalltau(target_N, prediction_N).statistic) / 2)


def test_what_is_undefined_is_null_and_said(caplog: pytest.LogCaptureFixture) -> None:
    assert ranking_metrics([record(None, 1, 2), record(None, 2, 3)]) == {}
    with caplog.at_level(logging.WARNING):
        alike = [record("a", 1, 2), record("a", 1, 3), record("b", 2, 3)]
        assert ranking_metrics(alike) == {"ndcg_10": None, "pair_accuracy": None, "groups": 0.0}
        assert "no two samples of a group differ in what is ranked (2 groups)" in caplog.messages[-1]
        assert ranking_metrics([record("a", 1, float("nan")), record("a", 2, 3)])["pair_accuracy"] is None
        assert "predictions are not finite" in caplog.messages[-1]
        losses = ranking_metrics([record("a", -1, 2), record("a", 2, 3)])
        assert losses == {"ndcg_10": None, "pair_accuracy": 1.0, "groups": 1.0}
        assert "it takes gains of 0 and more, and there is -1." in caplog.messages[-1]


def test_records_keep_their_group() -> None:
    model, batch = MMScaleModel(tiny_config_of_numbers()).eval(), make_batch(random_rows(3))
    batch.fields = [{"rating": 1, "group": "u1"}, {"rating": 2}, {"rating": 3, "group": None}]
    no: Any = None
    assert [r.get("group") for r in Regression("rating").predict(model, batch, no)] == ["u1", None, None]


def tiny_config_of_numbers() -> Any:
    config = tiny_config()
    config.heads = {"number": 1}
    return config
