"""The bootstrap interval of a task's main metric."""

from __future__ import annotations

from math import sqrt
from typing import Any

import numpy as np
import pytest

from mmscale.tasks import Record, Task, interval
from mmscale.tasks.captioning import Captioning
from mmscale.tasks.classification import Classification
from mmscale.tasks.interval import score_records
from mmscale.tasks.regression import Regression
from mmscale.tasks.retrieval import Retrieval
from mmscale.tasks.tagging import Tagging

GENERATOR = np.random.default_rng(3)
COUNT = 60


def labelled(index: int) -> Record:
    probabilities = GENERATOR.dirichlet([1, 1, 1]).astype(np.float32)
    best, label = int(probabilities.argmax()), index % 3
    values: dict[str, Any] = {"label": str(label), "class": label, "prediction": str(best), "confidence": float(probabilities[best])}
    return values | {"probabilities": probabilities}


def tagged(index: int) -> Record:
    return {"target": GENERATOR.random(4) < 0.3, "probabilities": GENERATOR.random(4).round(1).astype(np.float32), "unknown": []}


def rated(index: int) -> Record:
    return {"target": float(index), "prediction": index + GENERATOR.normal()}


def paired(index: int) -> Record:
    vector = GENERATOR.normal(size=6)
    return {"caption": str(index), "image": vector, "text": vector + GENERATOR.normal(size=6)}


def captioned(index: int) -> Record:
    return {"prediction": "a", "references": ["a" if index % 3 else "b"]}


CASES: list[tuple[Task, Any]] = [
    (Classification("vqa", "answer"), labelled),
    (Tagging("tags"), tagged),
    (Regression("rating"), rated),
    (Retrieval("caption"), paired),
    (Captioning("caption"), captioned),
]


@pytest.mark.parametrize(("task", "make"), CASES, ids=lambda case: getattr(case, "name", ""))
def test_a_resample_is_scored_as_its_records_would_be(task: Task, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [make(index) for index in range(COUNT)]
    assert task.resampler(records)(np.ones((2, COUNT))) == pytest.approx([task.score(records)[task.main_metric]] * 2)
    if task.name != "retrieval":  # whose candidates stay the same while queries are drawn
        counts = np.bincount(GENERATOR.integers(0, COUNT, COUNT), minlength=COUNT)
        drawn = [record for record, count in zip(records, counts, strict=True) for _ in range(count)]
        assert task.resampler(records)(counts[None].astype(float)) == pytest.approx([task.score(drawn)[task.main_metric]])
    scores = score_records(task, records)
    low, main, high = (scores[f"{task.main_metric}{end}"] for end in ("_low", "", "_high"))
    assert low is not None
    assert main is not None
    assert high is not None
    assert low < main < high
    assert score_records(task, records) == scores
    monkeypatch.setattr(interval, "_NUMBERS_AT_ONCE", 7 * COUNT)
    assert score_records(task, records) == scores


def test_the_interval_is_that_of_the_binomial() -> None:
    records = [{"prediction": "a", "references": ["a" if i % 4 else "b"]} for i in range(1000)]
    low, high = interval.interval(Captioning("caption"), records)
    assert low == pytest.approx(0.75 - 1.96 * sqrt(0.75 * 0.25 / 1000), abs=0.003)
    assert high == pytest.approx(0.75 + 1.96 * sqrt(0.75 * 0.25 / 1000), abs=0.003)


def test_one_record_has_an_interval_of_no_width() -> None:
    assert interval.interval(Captioning("caption"), [{"prediction": "a", "references": ["a"]}]) == (1.0, 1.0)


def test_an_undefined_metric_has_no_interval() -> None:
    records = [tagged(index) for index in range(10)]
    records[0]["probabilities"] = records[0]["probabilities"] + np.float32("nan")
    found = score_records(Tagging("tags"), records)
    assert (found["map"], found["map_low"], found["map_high"]) == (None, None, None)
