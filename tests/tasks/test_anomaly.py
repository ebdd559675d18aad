"""Anomaly scores: what is hidden when, the metrics by hand, and that a sample's score is its own."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from mmscale.config import RunConfig
from mmscale.data.dataset import ShardDataset
from mmscale.evaluate import EvaluateCommand, evaluation_config
from mmscale.model.sequences import Wanted
from mmscale.pictures import draw_anomalies
from mmscale.tasks import Record, build_task
from mmscale.tasks.anomaly import Anomaly
from mmscale.tasks.curves import weighted_auroc
from shards.errors import ConfigError
from tests.data.tiny import mixed, write
from tests.model.streams import GRIDS, MODALITIES, ROWS, one, stream_batch
from tests.model.tiny import Row, make_batch, tiny_model
from tests.tasks.predicting import predict, stage

TOKENIZER: Any = None
"""Not looked at."""


def record(anomaly: bool | None, score: float, position: int = 0) -> Record:
    return {"position": position, "key": f"k{position}", "anomaly": anomaly, "score": score}


@pytest.mark.parametrize(("mask", "quarters"), [(0.1, 1), (0.5, 2), (0.6, 2), (0.75, 3), (1.0, 3)])
def test_every_patch_is_hidden_equally_often(mask: float, quarters: int) -> None:
    task = Anomaly(None, mask, "pixels")
    batch = stream_batch(tiny_model(modalities=MODALITIES), masked=False)
    turns = [task._hide(batch, turn) for turn in range(4)]
    masks = [torch.cat([b.patch_mask_NP.flatten(), *(s.mask_T for s in b.streams.values())]).long() for b in turns]
    assert torch.stack(masks).sum(0).tolist() == [quarters] * len(masks[0])
    large = [task._mask("image", np.arange(9), 16, turn) for turn in range(4)]
    assert all(mask_NP.sum(1).tolist() == [4 * quarters] * 9 for mask_NP in large)
    assert len({tuple(row) for row in large[0].tolist()}) == 9  # which, is each position's own


@pytest.mark.parametrize("target", ["pixels", "features"])
def test_squares_one_by_one(target: Any) -> None:
    """The score is the mean over turns of the mean error that the objective itself has on this image alone, hidden so."""
    model, task = tiny_model().eval(), Anomaly(None, 0.5, target)
    rows = [Row(text=None, caption=None), Row(False), Row(), Row(text=None)]
    batch = make_batch(rows, mask_images=False)
    batch.fields = [{} for _ in rows]
    with torch.no_grad():
        found = task.predict(model, batch, TOKENIZER)
    assert [r["position"] for r in found] == [0, 2, 3]
    for r in found:
        alone = make_batch([rows[r["position"]]], first=r["position"], mask_images=False)
        errors = []
        for turn in range(4):
            with torch.no_grad():
                state = model.run(task._hide(alone, turn), Wanted(masked_image=True, features=target == "features"))
            ((prediction, truth),) = state.patches
            alike = torch.nn.functional.cosine_similarity(prediction, truth, dim=-1)
            errors.append(((prediction - truth) ** 2).mean() if target == "pixels" else (1 - alike).mean())
        assert r["score"] == pytest.approx(float(torch.stack(errors).mean()), rel=1e-5)
        assert "by_time" not in r


def test_clips_and_sounds_have_a_score_for_each_step_of_time() -> None:
    model, task = tiny_model(modalities=MODALITIES).eval(), Anomaly(None, 0.5, "pixels")
    batch = stream_batch(model, masked=False)
    batch.fields = [{} for _ in ROWS]
    with torch.no_grad():
        together = task.predict(model, batch, TOKENIZER)
    assert sorted(r["position"] for r in together) == batch.perception_rows_N.tolist()
    assert any(len(r.get("by_time", ())) > 1 for r in together)
    for found in together:
        row = found["position"]
        alone = stream_batch(model, *one(row), first=row, masked=False)
        alone.fields = [{}]
        with torch.no_grad():
            (own,) = task.predict(model, alone, TOKENIZER)
        assert own["score"] == pytest.approx(found["score"], rel=1e-5)
        assert own.get("by_time", {}).keys() == found.get("by_time", {}).keys()
        for name, means in own.get("by_time", {}).items():
            assert len(means) == GRIDS[name][row][0]  # type: ignore[index]
            assert means == pytest.approx(found["by_time"][name], rel=1e-5)


def test_metrics_by_hand(caplog: pytest.LogCaptureFixture) -> None:
    """Of 2 x 3 pairs the anomaly is above in 4 and level in one; all anomalies are found at 0.4, with two false alarms of three."""
    task = Anomaly("bad", 0.5, "pixels")
    records = [record(True, 0.9), record(True, 0.4), record(False, 0.5), record(False, 0.4), record(False, 0.1), record(None, 7.0)]
    scores = task.score(records)
    assert scores["auroc"] == pytest.approx(4.5 / 6)
    assert scores["false_alarms_at_95"] == pytest.approx(2 / 3)
    assert scores["average_precision"] == pytest.approx(1 / 2 * 1 + 1 / 2 * 2 / 4)
    assert scores["normal_score"] == pytest.approx(1 / 3)
    assert scores["anomaly_score"] == pytest.approx(0.65)
    assert (scores["anomalies"], scores["samples"]) == (2, 6)
    with caplog.at_level(logging.WARNING):
        for some, why in (([True], "all 1 samples are anomalies"), ([False] * 2, "all 2 samples are normal"), ([None], "no sample says")):
            undefined = task.score([record(anomaly, 1.0) for anomaly in some])
            assert undefined["auroc"] is undefined["average_precision"] is undefined["false_alarms_at_95"] is None
            assert why in caplog.messages[-1]
        assert task.score([record(True, float("nan")), record(False, 1.0)])["auroc"] is None
        assert "not finite" in caplog.messages[-1]


def test_the_interval_is_of_the_metric() -> None:
    generator = np.random.default_rng(0)
    target_N, score_N = generator.random(60) < 0.3, generator.integers(0, 9, 60) / 4
    counts_MN = generator.multinomial(60, [1 / 60] * 60, 20).astype(float)
    expected = [roc_auc_score(target_N, score_N, sample_weight=counts) for counts in counts_MN]
    np.testing.assert_allclose(weighted_auroc(target_N, score_N, counts_MN), expected)
    records = [record(bool(t) if i % 7 else None, s) for i, (t, s) in enumerate(zip(target_N, score_N, strict=True))]
    once = Anomaly("bad", 0.5, "pixels").resampler(records)(np.ones((1, 60)))
    assert once[0] == pytest.approx(Anomaly("bad", 0.5, "pixels").score(records)["auroc"])
    assert np.isnan(weighted_auroc(np.zeros(3, bool), np.arange(3.0), np.ones((2, 3)))).all()
    assert np.isnan(weighted_auroc(np.zeros(0, bool), np.zeros(0), np.ones((2, 0)))).all()


def config_of(shards: Path, **layers: Any) -> RunConfig:
    return stage(shards, task={"name": "anomaly"}, **layers)


def test_all_that_show_something_are_scored_whatever_the_batch(tmp_path: Path) -> None:
    shards = write(tmp_path / "mixed", mixed)
    config = config_of(shards, data={"caption": None, "text": None})
    found, again = predict(tmp_path, config), predict(tmp_path, config, batch=3)
    assert len(found) == sum(ShardDataset(shards)[i].image is not None for i in range(31))
    assert [r["key"] for r in found] == [r["key"] for r in again]
    assert [r["score"] for r in found] == pytest.approx([r["score"] for r in again], rel=1e-5)
    assert {r["anomaly"] for r in found} == {None}


@pytest.mark.parametrize(("value", "known"), [(True, True), (0, False), ("False", False), ("1", True), (None, None)])
def test_what_says_that_it_is_an_anomaly(value: Any, known: bool | None) -> None:
    batch = make_batch([Row()])
    batch.fields = [{"bad": value}]
    assert Anomaly("bad", 0.5, "pixels")._label_of(batch, 0) is known


@pytest.mark.parametrize("value", ["broken", 2, [0, 1], {}])
def test_anything_else_is_refused_by_name(value: Any) -> None:
    batch = make_batch([Row()])
    batch.fields = [{"bad": value}]
    with pytest.raises(ConfigError, match=r"^`data\.label=bad` of sample-0 is .*, and an anomaly is true or false \(1 or 0\)\. Name"):
        Anomaly("bad", 0.5, "pixels")._label_of(batch, 0)


def test_a_model_that_never_guessed_is_refused(tmp_path: Path) -> None:
    shards = write(tmp_path / "d")
    command = EvaluateCommand(task="anomaly", data=str(shards))
    with pytest.raises(ConfigError, match=r"^`task=anomaly` needs a model that has learned to guess hidden patches; this one has not\. "):
        evaluation_config(stage(shards, objectives={"contrastive": {"weight": 1.0}}), command)
    pretrained = stage(shards, objectives={"masked_image": {"weight": 1.0, "mask": 0.75, "target": "features"}})
    for trained, hidden in ((pretrained, 3), (config_of(shards, objectives={"masked_image": {"mask": 0.25}}), 1)):
        task = build_task(evaluation_config(trained, command))
        assert isinstance(task, Anomaly)
        assert (task.hidden, task.target) == (hidden, trained.objectives.masked_image.target)


def test_what_another_task_learned_is_no_anomaly(tmp_path: Path) -> None:
    """A classifier that also guessed patches has a label of its own; what says that a sample is odd is named at evaluation."""
    shards = write(tmp_path / "d")
    classifier = stage(
        shards, task={"name": "classification"}, data={"label": "class"}, objectives={"masked_image": {"weight": 1.0, "mask": 0.5}}
    )
    for trained, label, expected in (
        (classifier, None, None),
        (classifier, "odd", "odd"),
        (config_of(shards, data={"label": "bad"}), None, "bad"),
        (config_of(shards, data={"label": "bad"}), "odd", "odd"),
    ):
        config = evaluation_config(trained, EvaluateCommand(task="anomaly", data=str(shards), label=label))
        assert config.data.label == expected
    same = evaluation_config(classifier, EvaluateCommand(task="classification", data=str(shards)))
    assert same.data.label == "class"


def test_who_has_read_no_words_says_none(tmp_path: Path) -> None:
    wordless = config_of(tmp_path, data={"caption": None, "text": None})
    with pytest.raises(ConfigError, match=r"^`task=retrieval` needs a model that has read captions; this one was trained without words\.$"):
        evaluation_config(wordless, EvaluateCommand(task="retrieval", data="x"))


@pytest.mark.parametrize("count", [0, 1, 31])
def test_any_scores_can_be_drawn(tmp_path: Path, count: int) -> None:
    dataset = ShardDataset(write(tmp_path / "d", mixed))
    records = [record((True, False, None)[i % 3], float("nan") if i == 5 else i / 7, i) for i in range(count)]
    for found in records[::2]:
        found["by_time"] = {"video": [0.1, 0.4, 0.2], "audio": [0.3] * 9}
    draw_anomalies(records, dataset, tmp_path / "anomalies.png")
    with Image.open(tmp_path / "anomalies.png") as picture:
        assert min(picture.size) > 300
