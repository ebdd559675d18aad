"""A number a sample: targets, loss, metrics, and the way back to the field's unit."""

from __future__ import annotations

import json
from dataclasses import replace
from math import sqrt
from pathlib import Path

import numpy as np
import pytest
import torch

from mmscale.data.dataset import ShardDataset
from mmscale.data.example import Example
from mmscale.data.labels import number_of
from mmscale.data.targets import Facts, NumberTarget
from mmscale.model import MMScaleModel
from mmscale.model.sequences import Wanted
from mmscale.objectives.regress import Regress
from mmscale.tasks import study
from mmscale.tasks.interval import score_records
from mmscale.tasks.regression import Regression
from shards.errors import ConfigError
from tests.data.tiny import image_bytes, tokenizer_folder, write
from tests.model.tiny import make_batch, random_rows, tiny_model
from tests.tasks.predicting import TextTokenizer, predict, random_model, stage

TASK = Regression("rating")
RECORDS = [{"target": t, "prediction": p} for t, p in [(1.0, 2.0), (2.0, 2.5), (3.0, 2.25), (6.0, 5.0)]]


def rated(index: int) -> dict[str, bytes]:
    """By turns a number, several ratings, the text of a number, no number."""
    rating = (index, [index, index + 2], f" {index}.5", "good")[index % 4]
    return {"jpg": image_bytes(index), "json": json.dumps({"rating": rating}).encode()}


def test_what_is_a_number() -> None:
    found = [number_of(v) for v in (3, 2.5, "-1e2", [1, "3", "x"], True, "good", None, float("nan"), "inf", [], {}, 10**400)]
    assert found == [3.0, 2.5, -100.0, 2.0, None, None, None, None, None, None, None, None]


def test_targets_are_normalised_by_the_training_shards(tmp_path: Path) -> None:
    shards = write(tmp_path / "rated", rated, (4, 4))
    facts = study(stage(shards, task={"name": "regression"}, data={"label": "rating"}), ShardDataset(shards))
    numbers = [0, 2, 2.5, 4, 6, 6.5]
    assert facts == Facts(mean=pytest.approx(np.mean(numbers)), std=pytest.approx(np.std(numbers)))
    target = NumberTarget(field="rating", mean=facts.mean, std=facts.std)
    found = target.of([Example(i, "k", fields={"rating": r}) for i, r in enumerate([0, 4, "good"])], lambda row, text: text)
    assert found[:2].tolist() == pytest.approx([(0 - np.mean(numbers)) / np.std(numbers), (4 - np.mean(numbers)) / np.std(numbers)])
    assert found[2].isnan()


def test_nothing_to_learn_is_one_paragraph(tmp_path: Path) -> None:
    shards = write(tmp_path / "same", lambda i: {"json": b'{"rating": 2, "word": "good"}'}, (3,))
    for field, said in (
        ("rating", r"^`data.label=rating` is 2 in every sample that has it\. There is nothing to learn: name another key\.$"),
        ("word", r"^`data.label=word` holds a number in no sample; the samples' json has .*'word'"),
    ):
        with pytest.raises(ConfigError, match=said):
            study(stage(shards, task={"name": "regression"}, data={"label": field}), ShardDataset(shards))


def test_hand_computed_scores() -> None:
    scores = score_records(TASK, RECORDS)
    assert scores["rmse"] == pytest.approx(sqrt((1 + 0.25 + 0.5625 + 1) / 4))
    assert scores["mae"] == pytest.approx((1 + 0.5 + 0.75 + 1) / 4)
    assert scores["pearson"] == pytest.approx(np.corrcoef([1, 2, 3, 6], [2, 2.5, 2.25, 5])[0, 1])
    assert scores["spearman"] == pytest.approx(1 - 6 * 2 / (4 * 15))  # two ranks are swapped
    assert scores["rmse_of_mean"] == pytest.approx(sqrt(14 / 4))
    assert scores["samples"] == 4


@pytest.mark.parametrize(
    ("records", "what"),
    [
        ([{"target": 2.0, "prediction": p} for p in (1.0, 3.0)], "2 numbers in `data.label=rating`"),
        ([{"target": t, "prediction": 1.0} for t in (1.0, 3.0)], "2 predictions"),
        (RECORDS[:1], "1 numbers in `data.label=rating`"),
    ],
)
def test_a_correlation_of_what_is_all_the_same_is_null(records: list[dict], what: str, caplog: pytest.LogCaptureFixture) -> None:
    scores = TASK.score(records)
    assert (scores["pearson"], scores["spearman"]) == (None, None)
    assert scores["mae"] is not None
    assert caplog.messages == [
        f"The metrics pearson and spearman are undefined and reported as null: the {what} are all the same or not finite, and a "
        "correlation takes two that differ. Evaluate on more samples."
    ]


@pytest.mark.parametrize("squared", [False, True])
def test_the_loss_is_that_of_torch_over_samples_with_a_number(squared: bool) -> None:
    batch = make_batch(random_rows(3))
    batch.targets = {"number": torch.tensor([0.5, float("nan"), -2.0])}
    output = torch.tensor([[0.0], [9.0], [1.0]], requires_grad=True)
    state = replace(tiny_model().run(batch, Wanted(classify=True)), class_logits_MC={"number": output})
    term = Regress(weight=1.0, squared=squared).loss(state, batch, tiny_model())
    assert term.sum.item() == pytest.approx((0.5**2 + 3**2) / 2 if squared else 0.5**2 / 2 + 3 - 0.5)
    assert Regress(weight=1.0).count(batch) == 2
    assert [v.item() for v in term.logs["mae"]] == [3.5, 2.0]
    (gradient,) = torch.autograd.grad(term.sum, output)
    assert gradient[1].item() == 0


def test_predictions_are_in_the_unit_of_the_field_also_after_saving(tmp_path: Path) -> None:
    config = stage(write(tmp_path / "rated", rated), task={"name": "regression"}, data={"label": "rating", "text": None})
    near, far = [predict(tmp_path, config, facts=Facts(mean=mean, std=std)) for mean, std in ((0.0, 1.0), (100.0, 10.0))]
    assert {int(r["key"][1:]) % 4 for r in near} == {0, 1, 2}
    assert [r["target"] for r in far] == [r["target"] for r in near]
    assert [r["prediction"] for r in far] == pytest.approx([100 + 10 * r["prediction"] for r in near])
    tokenizer = TextTokenizer(tokenizer_folder(tmp_path / "tokenizer"))
    random_model(tokenizer, config, Facts(mean=100.0, std=10.0)).save_pretrained(tmp_path / "model")
    facts = MMScaleModel.from_pretrained(tmp_path / "model").config.facts
    assert (facts.mean, facts.std) == (100.0, 10.0)
