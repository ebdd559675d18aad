from pathlib import Path

import pytest

from mmscale.tasks import build_task, label_vocabulary
from mmscale.tasks.classification import Classification
from shards.errors import ConfigError, DataError
from tests.data.tiny import WORDS, mixed, write
from tests.tasks.predicting import predict, stage

LABELS = sorted(WORDS[:3])


def test_hand_computed_scores() -> None:
    pairs = [("a", "a"), ("a", "a"), ("a", "b"), ("b", "b"), ("c", "a")]
    scores = Classification("classification", "label").score([{"label": x, "prediction": y} for x, y in pairs])
    assert scores == {
        "accuracy": pytest.approx(3 / 5),
        "balanced_accuracy": pytest.approx((2 / 3 + 1 + 0) / 3),
        "majority": pytest.approx(3 / 5),
        "samples": 5.0,
    }


def test_predicts_for_every_labelled_sample_whatever_it_holds(tmp_path: Path) -> None:
    shards = write(tmp_path / "mixed", mixed)
    config = stage(shards, task={"name": "vqa"}, data={"label": "answer", "text": "question"})
    found = predict(tmp_path, config, LABELS)
    # of six kinds three have an answer: a pair and several captions; the one with a broken image is left out
    assert {int(r["key"][1:]) % 6 for r in found} == {0, 4}
    assert all(r["prediction"] in LABELS and 1 / 3 <= r["confidence"] <= 1 for r in found)
    assert {r["key"]: r["label"] for r in found}["s0"] == "red"


def test_a_label_outside_the_vocabulary_is_wrong_and_a_missing_one_is_no_sample(tmp_path: Path) -> None:
    shards = write(tmp_path / "pairs")
    config = stage(shards, task={"name": "classification"}, data={"label": "answer"})
    found = predict(tmp_path, config, ["blue", "green"])
    assert len(found) == 31
    assert not any(r["label"] == r["prediction"] for r in found if r["label"] == "red")
    with pytest.raises(DataError, match="has what the task classification needs"):
        predict(tmp_path, stage(shards, task={"name": "classification"}, data={"label": "colour"}), LABELS)


def test_the_label_vocabulary_is_read_or_given(tmp_path: Path) -> None:
    from mmscale.data.dataset import ShardDataset

    shards = write(tmp_path / "pairs")
    dataset = ShardDataset(shards)

    def vocabulary(**data: object) -> list[str] | None:
        return label_vocabulary(stage(shards, task={"name": "vqa"}, data=data), dataset)

    assert vocabulary(label="answer") == LABELS
    assert vocabulary(label="answer", labels=["red", "blue"]) == ["red", "blue"]
    assert label_vocabulary(stage(shards, task={"name": "captioning"}), dataset) is None
    with pytest.raises(ConfigError, match=r"^`data.label` must name the json field that holds the target of the task; it is null\.$"):
        vocabulary()
    with pytest.raises(ConfigError, match=r"^`data.label=colour` is a field of no sample\. Name a key of the samples' json"):
        vocabulary(label="colour")
    one = write(tmp_path / "one", lambda i: {"txt": b"red", "json": b'{"answer": "red"}'})
    with pytest.raises(ConfigError, match=r"have the same answer, 'red'; two labels are needed\.$"):
        label_vocabulary(stage(one, task={"name": "vqa"}, data={"label": "answer"}), ShardDataset(one))


def test_a_task_whose_field_is_not_named() -> None:
    with pytest.raises(ConfigError, match=r"^`data.label` must name the json field that holds the target of the task; it is null\.$"):
        build_task(stage(Path("x"), task={"name": "classification"}))
    with pytest.raises(ConfigError, match=r"^`data.caption` must name the json field that holds the text of the task; it is null\.$"):
        build_task(stage(Path("x"), task={"name": "captioning"}, data={"caption": None}))
