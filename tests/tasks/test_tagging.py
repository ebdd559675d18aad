"""Several labels a sample: targets, loss, metrics."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score

from mmscale.assemble import build_model
from mmscale.config import RunConfig
from mmscale.data.batch import IGNORE
from mmscale.data.dataset import ShardDataset
from mmscale.data.example import Example
from mmscale.data.labels import labels_of
from mmscale.data.targets import Facts, TagsTarget
from mmscale.data.tokenize import TextTokenizer
from mmscale.evaluate import predict_records
from mmscale.model import MMScaleModel
from mmscale.model.sequences import Wanted
from mmscale.objectives.tag import Tag
from mmscale.tasks import Record, study
from mmscale.tasks.curves import weighted_average_precision
from mmscale.tasks.tagging import Tagging
from shards.errors import ConfigError
from tests.data.tiny import image_bytes, tokenizer_folder, write
from tests.model.tiny import Row, make_batch, random_rows, tiny_model
from tests.tasks.predicting import predict, stage

TASK = Tagging("tags")


def record(target: list[int], *probabilities: float, unknown: tuple[str, ...] = ()) -> Record:
    return {"key": "k", "target": np.array(target, bool), "probabilities": np.array(probabilities, np.float32), "unknown": list(unknown)}


RECORDS = [
    record([1, 0, 0], 0.9, 0.2, 0.1),
    record([0, 1, 0], 0.8, 0.7, 0.1),
    record([1, 1, 0], 0.3, 0.6, 0.6),
    record([0, 0, 0], 0.1, 0.1, 0.1),
]


def tagged(index: int) -> dict[str, bytes]:
    """By turns two tags, one, none, no field."""
    fields = ({"tags": ["red", "small"]}, {"tags": "red"}, {"tags": []}, {})[index % 4]
    return {"jpg": image_bytes(index), "json": json.dumps(fields).encode()}


def test_what_holds_of_a_sample() -> None:
    assert labels_of(["a", "b", "a", None]) == ["a", "b"]
    assert labels_of([]) == []
    assert labels_of("a") == ["a"]
    assert labels_of(3) == ["3"]
    assert labels_of(None) is None
    assert labels_of({"a": 1}) is None
    assert labels_of([None]) is None


def test_targets_are_flags_and_a_sample_without_the_field_is_none() -> None:
    target = TagsTarget(field="tags", classes={"red": 0, "small": 1})
    fields = [{"tags": ["small", "violet"]}, {"tags": []}, {}]
    found = target.of([Example(i, "k", fields=f) for i, f in enumerate(fields)], lambda row, text: text)
    assert found.tolist() == [[0, 1], [0, 0], [IGNORE, IGNORE]]
    turned = target.of([Example(0, "k", fields={"tags": ["red"]})], lambda row, text: {"red": "small"}[text])
    assert turned.tolist() == [[0, 1]]
    assert target.sample_bytes == 8


def test_hand_computed_scores() -> None:
    assert TASK.score(RECORDS) == {
        # first: positives ranked 1 and 3 of 4; second: 1 and 2; third: no sample has it
        "map": pytest.approx(((1 + 2 / 3) / 2 + 1) / 2),
        # hits: first 1, second 2; predicted 2 + 2 + 1; there are 4
        "micro_f1": pytest.approx(2 * 3 / (4 + 5)),
        "macro_f1": pytest.approx((1 / 2 + 1 + 0) / 3),
        "labels": 2.0,
        "samples": 4.0,
    }


def test_an_unknown_tag_is_missed_and_named(caplog: pytest.LogCaptureFixture) -> None:
    scores = TASK.score([*RECORDS, record([0, 0, 0], 0.1, 0.1, 0.1, unknown=("violet",))])
    assert scores["micro_f1"] == pytest.approx(2 * 3 / (5 + 5))
    assert scores["macro_f1"] == pytest.approx((1 / 2 + 1 + 0 + 0) / 4)
    assert caplog.messages == [
        "1 of 5 samples have a label in `data.label=tags` that the model does not know, such as 'violet' of k: F1 counts it as missed, "
        "map leaves it out. Train with `data.labels` that has it."
    ]


def test_without_any_positive_map_is_null(caplog: pytest.LogCaptureFixture) -> None:
    scores = TASK.score([record([0, 0], 0.1, 0.2)])
    assert (scores["map"], scores["micro_f1"], scores["macro_f1"]) == (None, None, None)
    assert caplog.messages == [
        "The metric map is undefined and reported as null: no sample has a label that the model knows. Look at `data.label=tags`."
    ]


def test_average_precision_of_counts_is_that_of_repeated_records() -> None:
    generator = np.random.default_rng(0)
    target, score = generator.random(50) < 0.3, generator.random(50).round(1).astype(np.float32)
    counts = generator.integers(0, 4, (20, 50))
    expected = [average_precision_score(np.repeat(target, c), np.repeat(score, c)) for c in counts]
    assert weighted_average_precision(target, score, counts.T.astype(np.float32)) == pytest.approx(expected)
    assert np.isnan(weighted_average_precision(target, score, np.where(target, 0.0, 1.0).astype(np.float32)[:, None])).all()


def test_the_loss_is_that_of_torch_over_samples_that_have_the_field() -> None:
    batch = make_batch(random_rows(3))
    target = torch.tensor([[1.0, 0.0], [IGNORE, IGNORE], [0.0, 0.0]])
    batch.targets = {"tags": target}
    logits = torch.tensor([[2.0, -1.0], [5.0, 5.0], [0.5, -3.0]], requires_grad=True)
    state = replace(tiny_model().run(batch, Wanted(classify=True)), class_logits_MC={"tags": logits})
    term = Tag(weight=1.0).loss(state, batch, tiny_model())
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits[[0, 2]], target[[0, 2]], reduction="sum")
    torch.testing.assert_close(term.sum, expected)
    assert Tag(weight=1.0).count(batch) == 4
    assert [v.item() for v in term.logs["micro_f1"]] == [2.0, 3.0]
    (gradient,) = torch.autograd.grad(term.sum, logits)
    assert gradient[1].tolist() == [0.0, 0.0]


def test_a_batch_without_targets_has_a_loss_of_zero() -> None:
    batch = make_batch([Row()])
    batch.targets = {"tags": torch.full((1, 2), float(IGNORE))}
    state = replace(tiny_model().run(batch, Wanted(classify=True)), class_logits_MC={"tags": torch.ones(1, 2)})
    assert Tag(weight=1.0).loss(state, batch, tiny_model()).sum == 0


def test_a_head_starts_at_how_often_each_label_is_met(tmp_path: Path) -> None:
    """Not at even odds, which are far from where rare labels are."""
    shards = write(tmp_path / "tagged", tagged, rows=(10, 6))
    config = stage(shards, task={"name": "tagging"}, data={"label": "tags", "text": None})
    facts = study(config, ShardDataset(shards))
    assert facts == Facts(labels=("red", "small"), log_odds=(math.log(8.5 / 4.5), math.log(4.5 / 8.5)))
    tokenizer = TextTokenizer(tokenizer_folder(tmp_path / "tokenizer"))
    model, _ = build_model(config, tokenizer, facts, None)
    mean_C = np.mean([r["probabilities"] for r in _first_predictions(model, config, tokenizer)], axis=0)
    np.testing.assert_allclose(mean_C, [8.5 / 13, 4.5 / 13], atol=0.06)


def _first_predictions(model: MMScaleModel, config: RunConfig, tokenizer: TextTokenizer) -> list[Record]:
    return predict_records(model.eval(), TASK, config, tokenizer, samples=0, batch=5, device=torch.device("cpu"))


def test_labels_by_hand_are_not_counted(tmp_path: Path) -> None:
    shards = write(tmp_path / "tagged", tagged)
    config = stage(shards, task={"name": "tagging"}, data={"label": "tags", "labels": ["red", "small", "large"]})
    assert study(config, ShardDataset(shards)) == Facts(labels=("red", "small", "large"), log_odds=(math.log(1 / 2),) * 3)


def test_predicts_for_every_sample_that_has_the_field(tmp_path: Path) -> None:
    shards = write(tmp_path / "tagged", tagged)
    config = stage(shards, task={"name": "tagging"}, data={"label": "tags", "text": None})
    facts = study(config, ShardDataset(shards))
    assert facts is not None
    assert facts.labels == ("red", "small")
    found = predict(tmp_path, config, facts=facts)
    assert {int(r["key"][1:]) % 4 for r in found} == {0, 1, 2}
    by_key = {r["key"]: r for r in found}
    assert by_key["s0"]["target"].tolist() == [True, True]
    assert by_key["s1"]["target"].tolist() == [True, False]
    assert by_key["s2"]["labels"] == []
    assert all(r["predictions"] == [n for n, p in zip(facts.labels or (), r["probabilities"], strict=True) if p >= 0.5] for r in found)
    with pytest.raises(
        ConfigError, match=r"^`data.label=colour` is a field of no sample, or empty in all of them; the samples' json has 'tags'"
    ):
        study(stage(shards, task={"name": "tagging"}, data={"label": "colour"}), ShardDataset(shards))


def test_a_single_label_is_scored() -> None:
    records = [record([1], 0.9), record([0], 0.8), record([1], 0.2), record([0], 0.1)]
    found = TASK.score(records)
    assert (found["micro_f1"], found["macro_f1"]) == (pytest.approx(0.5), pytest.approx(0.5))


def test_f1_is_that_of_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    target, score = generator.random((40, 5)) < 0.3, generator.random((40, 5))
    target[:, 4], score[:, 4] = False, 0.0  # neither there nor predicted: left out
    found = TASK.score([record(t.tolist(), *s) for t, s in zip(target, score, strict=True)])
    assert found["macro_f1"] == pytest.approx(f1_score(target[:, :4], score[:, :4] >= 0.5, average="macro"))
    assert found["micro_f1"] == pytest.approx(f1_score(target, score >= 0.5, average="micro"))
