import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmscale.data.dataset import ShardDataset
from mmscale.data.targets import Facts
from mmscale.model.sequences import Wanted
from mmscale.objectives.build import build_objectives
from mmscale.objectives.classify import Classify
from mmscale.tasks import Record, build_task, study
from mmscale.tasks.classification import Classification, expected_calibration_error
from mmscale.tasks.interval import score_records
from shards.errors import ConfigError, DataError
from tests.data.tiny import WORDS, image_bytes, mixed, write
from tests.model.tiny import Row, make_batch, random_rows, tiny_model
from tests.tasks.predicting import predict, stage

LABELS = sorted(WORDS[:3])


TASK = Classification("classification", "answer")


def record(label: str, *probabilities: float, names: str = "abc") -> dict[str, Any]:
    """A record of a model that knows a, b and c."""
    best = int(np.argmax(probabilities))
    found = {"key": "k", "label": label, "prediction": names[best], "confidence": probabilities[best], "class": names.find(label)}
    return found | {"probabilities": np.array(probabilities, dtype=np.float32)}


RECORDS = [record("a", 0.8, 0.1, 0.1), record("a", 0.6, 0.3, 0.1), record("a", 0.2, 0.6, 0.2), record("b", 0.1, 0.7, 0.2)]
RECORDS += [record("c", 0.5, 0.2, 0.3)]


def test_hand_computed_scores() -> None:
    assert TASK.score(RECORDS) == {
        "accuracy": pytest.approx(3 / 5),
        "balanced_accuracy": pytest.approx((2 / 3 + 1 + 0) / 3),
        # a: precision 2/3, recall 2/3; b: 1/2, 1; c: never predicted
        "macro_f1": pytest.approx((2 / 3 + 2 / 3 + 0) / 3),
        # a: of 3 x 2 pairs 5 in order (0.2 is below 0.5, above 0.1); b: 4 of 4; c: 4 of 4
        "auroc": pytest.approx((5 / 6 + 1 + 1) / 3),
        # bins of 1/15: 0.5 in (7/15, 8/15], 0.6 twice in (8/15, 9/15], 0.7 and 0.8 alone
        "ece": pytest.approx((abs(0 - 0.5) + abs(1 - 1.2) + abs(1 - 0.7) + abs(1 - 0.8)) / 5, abs=1e-6),
        "majority": pytest.approx(3 / 5),
        "samples": 5.0,
    }


def test_a_perfectly_calibrated_model_has_no_calibration_error() -> None:
    confidence = np.repeat([0.25, 0.5, 0.75, 1.0], 4)
    right = np.array([1, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1], dtype=float)
    assert expected_calibration_error(confidence, right) == 0
    assert expected_calibration_error(np.zeros(4), np.ones(4)) == 1  # the lowest bin has its lower end too


@pytest.mark.parametrize(
    ("records", "why"),
    [
        (RECORDS[:3], "all samples have the same label, 'a', and it takes samples of two. Evaluate on data with several labels."),
        ([record("x", 0.5, 0.3, 0.2), record("y", 0.1, 0.8, 0.1)], "no sample has a label that the model knows, and it takes"),
        ([record("a", float("nan"), 0.1, 0.1), RECORDS[3]], "the model computes probabilities that are not finite."),
        ([{k: v for k, v in r.items() if k != "probabilities"} for r in RECORDS], "the model has more than 1,000 labels"),
    ],
)
def test_an_undefined_metric_is_null_and_says_why(records: list[Record], why: str, caplog: pytest.LogCaptureFixture) -> None:
    scores = score_records(TASK, records)
    assert scores["auroc"] is None
    assert f"The metric auroc is undefined and reported as null: {why}" in caplog.text
    assert json.loads(json.dumps(scores, allow_nan=False)) == scores


def test_a_label_that_the_model_does_not_know_is_named(caplog: pytest.LogCaptureFixture) -> None:
    scores = TASK.score([*RECORDS, record("violet", 0.8, 0.1, 0.1)])
    assert scores["accuracy"] == pytest.approx(3 / 6)
    assert caplog.messages == [
        "1 of 6 samples have a label in `data.label=answer` that the model does not know, such as 'violet' of k: they count as wrong. "
        "Train with `data.labels` that has it, or leave them out with `mmscale shards filter`."
    ]


def test_predicts_for_every_labelled_sample_whatever_it_holds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shards = write(tmp_path / "mixed", mixed)
    config = stage(shards, task={"name": "vqa"}, data={"label": "answer", "text": "question"})
    found = predict(tmp_path, config, LABELS)
    # of six kinds three have an answer: a pair and several captions; the one with a broken image is left out
    assert {int(r["key"][1:]) % 6 for r in found} == {0, 4}
    assert all(r["prediction"] in LABELS and 1 / 3 <= r["confidence"] <= 1 for r in found)
    assert len(caplog.messages) == 2
    assert re.search(r"^\d+ of 31 samples of '.*mixed' have not what the task vqa asks for \(data\.label=answer\)$", caplog.messages[1])
    assert re.search(r"^\d of \d+ samples of '.*mixed' are left out\. s\d, for example: it does not decode: .*[^.]\.$", caplog.messages[0])
    assert {r["key"]: r["label"] for r in found}["s0"] == "red"


def test_a_sample_that_shows_nothing_is_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A question without an image is answered; an answer without either is not a sample."""
    kinds = ({}, {"jpg": image_bytes(1)}, {"json": b'{"answer": "red", "question": "a red circle"}'})
    shards = write(tmp_path / "d", lambda i: {"json": b'{"answer": "red"}'} | kinds[i % 3], (4, 2))
    config = stage(shards, task={"name": "vqa"}, data={"label": "answer", "text": "question"})
    found = predict(tmp_path, config, LABELS, batch=2)
    assert {r["key"] for r in found} == {"s1", "s2", "s4", "s5"}
    said = "it has a target, but neither an image (nor an item of another modality) nor a text to predict it from."
    assert caplog.messages == [f"2 of 6 samples of {str(shards)!r} are left out. s0, for example: {said}"]
    bare = write(tmp_path / "bare", lambda i: {"json": b'{"answer": "red"}'})
    with pytest.raises(
        DataError,
        match=r"^No sample of '.*bare' has what the task vqa needs\. s\d, for example: it has a target, but",
    ):
        predict(tmp_path, stage(bare, task={"name": "vqa"}, data={"label": "answer"}), LABELS)


def test_neither_image_nor_text_is_a_mistake(tmp_path: Path) -> None:
    shards = write(tmp_path / "pairs")
    config = stage(shards, task={"name": "vqa"}, data={"label": "answer", "text": None, "image": False})
    with pytest.raises(ConfigError, match=r"^`task.name=vqa` has nothing to predict from: `data.image` is false and `data.text` is null\."):
        predict(tmp_path, config, LABELS)


def test_batches_change_nothing(tmp_path: Path) -> None:
    """What is scored is the same samples in the same order; rounding of the model's numbers alone may differ between batch sizes."""
    config = stage(write(tmp_path / "pairs"), task={"name": "vqa"}, data={"label": "answer", "text": "question"})
    whole, *others = [predict(tmp_path, config, LABELS, batch=batch) for batch in (31, 1, 5)]
    for found in others:
        for name in ("position", "key", "label", "prediction", "class"):
            assert [r[name] for r in found] == [r[name] for r in whole], name
        assert score_records(TASK, found) == pytest.approx(score_records(TASK, whole), abs=1e-6)
        assert score_records(TASK, found)["accuracy_low"] == score_records(TASK, whole)["accuracy_low"]


def test_a_label_outside_the_vocabulary_is_wrong_and_a_missing_one_is_no_sample(tmp_path: Path) -> None:
    shards = write(tmp_path / "pairs")
    config = stage(shards, task={"name": "classification"}, data={"label": "answer"})
    found = predict(tmp_path, config, ["blue", "green"])
    assert len(found) == 31
    assert not any(r["label"] == r["prediction"] for r in found if r["label"] == "red")
    with pytest.raises(
        DataError,
        match=r"has what the task classification needs\. It reads data\.label=colour; the first sample's json has .*'answer'.* Look at",
    ):
        predict(tmp_path, stage(shards, task={"name": "classification"}, data={"label": "colour"}), LABELS)


def test_the_label_vocabulary_is_read_or_given(tmp_path: Path) -> None:
    shards = write(tmp_path / "pairs")
    dataset = ShardDataset(shards)

    def vocabulary(**data: object) -> list[str]:
        facts = study(stage(shards, task={"name": "vqa"}, data=data), dataset)
        assert facts is not None
        return list(facts.labels or ())

    assert vocabulary(label="answer") == LABELS
    assert vocabulary(label="answer", labels=["red", "blue"]) == ["red", "blue"]
    assert study(stage(shards, task={"name": "captioning"}), dataset) is None
    with pytest.raises(ConfigError, match=r"^`data.label` must name the json field that holds the target of the task; it is null\.$"):
        vocabulary()
    with pytest.raises(
        ConfigError, match=r"^`data.labels` = \['True', 'no'\]: no sample's `data.label=answer` is one of them; what they have is 'blue'"
    ):
        vocabulary(label="answer", labels=["True", "no"])
    with pytest.raises(ConfigError, match=r"no sample's `data.label=colour` is one of them; the samples' json has .*'answer'"):
        vocabulary(label="colour", labels=["red"])
    with pytest.raises(
        ConfigError, match=r"^`data.label=colour` is a field of no sample, or empty in all of them; the samples' json has .*'answer'"
    ):
        vocabulary(label="colour")
    one = write(tmp_path / "one", lambda i: {"txt": b"red", "json": b'{"answer": "red"}'})
    with pytest.raises(ConfigError, match=r"have the same answer, 'red'; two labels are needed\.$"):
        study(stage(one, task={"name": "vqa"}, data={"label": "answer"}), ShardDataset(one))


def test_a_task_whose_field_is_not_named() -> None:
    with pytest.raises(ConfigError, match=r"^`data.label` must name the json field that holds the target of the task; it is null\.$"):
        build_task(stage(Path("x"), task={"name": "classification"}))
    with pytest.raises(ConfigError, match=r"^`data.caption` must name the json field that holds the text of the task; it is null\.$"):
        build_task(stage(Path("x"), task={"name": "captioning"}, data={"caption": None}))


def rare(index: int) -> dict[str, bytes]:
    """Three reds to a blue."""
    return {"jpg": image_bytes(index), "json": json.dumps({"answer": "blue" if index % 4 == 0 else "red"}).encode()}


def test_balanced_weights_make_labels_count_alike(tmp_path: Path) -> None:
    shards = write(tmp_path / "shards", rare, (20,))
    config = stage(shards, data={"text": None, "label": "answer"}, task={"name": "classification", "class_weights": "balanced"})
    facts = study(config, ShardDataset(shards))
    assert facts == Facts(labels=("blue", "red"), weights=(20 / (2 * 5), 20 / (2 * 15)))
    (objective,) = build_objectives(config, facts)
    assert isinstance(objective, Classify)
    assert objective.class_weights == facts.weights


def test_each_class_has_its_weight_in_the_loss() -> None:
    model, objective = tiny_model(), Classify(weight=1.0, class_weights=(0.5, 1.0, 1.5))
    batch = make_batch([*random_rows(8), Row()])  # the last one has no label
    state = model.run(batch, Wanted.of([objective]))
    labels = batch.targets["label"][:8]
    each = torch.nn.functional.cross_entropy(state.class_logits_MC["label"][:8], labels, reduction="none")
    expected = (each * torch.tensor([0.5, 1.0, 1.5])[labels]).sum()
    torch.testing.assert_close(objective.loss(state, batch, model).sum, expected)
    assert objective.count(batch) == 8


def test_weights_of_a_label_without_samples_cannot_be(tmp_path: Path) -> None:
    shards = write(tmp_path / "shards", rare, (20,))
    data = {"text": None, "label": "answer", "labels": ["blue", "red", "green"]}
    config = stage(shards, data=data, task={"name": "classification", "class_weights": "balanced"})
    with pytest.raises(ConfigError, match=r"^`task.class_weights=balanced` weighs labels by their samples, and no sample of .* 'green'"):
        study(config, ShardDataset(shards))


def test_batches_change_a_report_by_rounding_alone(tmp_path: Path) -> None:
    config = stage(write(tmp_path / "pairs"), task={"name": "vqa"}, data={"label": "answer", "text": "question"})
    one, five, all_at_once = (predict(tmp_path, config, LABELS, batch=batch) for batch in (1, 5, 50))
    for other in (five, all_at_once):
        assert [(r["key"], r["prediction"]) for r in other] == [(r["key"], r["prediction"]) for r in one]
        assert score_records(TASK, other) == pytest.approx(score_records(TASK, one), abs=1e-6)
