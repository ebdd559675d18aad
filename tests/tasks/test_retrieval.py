from pathlib import Path

import numpy as np
import pytest

from mmscale.tasks import retrieval
from mmscale.tasks.retrieval import Retrieval, first_right_rank
from shards.errors import DataError
from tests.data.tiny import image_bytes, mixed, paired, write
from tests.tasks.predicting import predict, stage

TASK = Retrieval("caption")


def records(images: list[list[float]], texts: list[list[float]], captions: list[str] | None = None) -> list[dict]:
    names = captions or [f"caption {i}" for i in range(len(images))]
    return [{"caption": c, "image": np.array(i), "text": np.array(t)} for c, i, t in zip(names, images, texts, strict=True)]


def test_hand_computed_ranks() -> None:
    # rows: image 0 prefers text 0, image 1 prefers texts 0 and 2 before its own, image 2 is nearest to text 0, then its own
    similarity = np.array([[0.9, 0.1, 0.2], [0.8, 0.3, 0.5], [0.7, 0.1, 0.6]])
    own = np.eye(3, dtype=bool)
    assert first_right_rank(similarity, own).tolist() == [0, 2, 1]
    assert first_right_rank(similarity.T, own).tolist() == [0, 0, 0]
    scores = TASK.score(records(similarity.tolist(), np.eye(3).tolist()))
    assert scores["candidates"] == 3
    assert scores["image_to_text_r1"] == pytest.approx(1 / 3)
    assert scores["text_to_image_r1"] == 1
    assert scores["image_to_text_r5"] == scores["image_to_text_r10"] == 1


def test_a_tie_counts_against_the_model() -> None:
    """A model that maps everything to one point must not look perfect."""
    same = [[1.0, 0.0]] * 20
    scores = TASK.score(records(same, same))
    assert [v for k, v in scores.items() if k != "candidates"] == [0.0] * 6


def test_a_model_that_computes_nan_has_nothing_right() -> None:
    broken = [[float("nan"), 0.0]] * 20
    scores = TASK.score(records(broken, broken))
    assert [v for k, v in scores.items() if k != "candidates"] == [0.0] * 6


def test_equal_captions_are_equally_right() -> None:
    texts = [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]
    images = [[0.8, 0.6], [1.0, 0.0], [0.0, 1.0]]
    assert TASK.score(records(images, texts, ["dot", "dot", "line"]))["image_to_text_r1"] == 1
    assert TASK.score(records(images, texts, ["dot", "spot", "line"]))["image_to_text_r1"] == pytest.approx(1 / 3)
    assert TASK.score(records(images, texts, ["dot", "dot", "line"]))["text_to_image_r1"] == 1


def test_ranks_do_not_depend_on_how_many_queries_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    images, texts = generator.normal(size=(2, 50, 4)).tolist()
    captions = [str(i) for i in generator.integers(0, 30, 50)]
    whole = TASK.score(records(images, texts, captions))
    monkeypatch.setattr(retrieval, "_QUERIES_AT_ONCE", 7)
    assert TASK.score(records(images, texts, captions)) == whole
    assert 0 < whole["image_to_text_r10"] < 1


def test_only_samples_with_an_image_and_a_text_are_candidates(tmp_path: Path) -> None:
    shards = write(tmp_path / "mixed", mixed)
    found = predict(tmp_path, stage(shards, task={"name": "retrieval"}))
    # of six kinds: a pair, several captions, a picture of another size; not text alone, an image alone, a broken image
    assert sorted(int(r["key"][1:]) % 6 for r in found) == sorted([0, 4, 5] * 5 + [0])
    assert all(np.linalg.norm(r["image"]) == pytest.approx(1, abs=1e-5) for r in found)
    assert len({r["position"] for r in found}) == len(found)
    captions = {r["key"]: r["caption"] for r in found}
    assert captions["s0"] == paired(0)["txt"].decode()


def test_the_text_may_be_another_field(tmp_path: Path) -> None:
    shards = write(tmp_path / "pairs")
    found = predict(tmp_path, stage(shards, task={"name": "retrieval"}, data={"caption": "question"}))
    assert len(found) == 31
    assert all(len(r["caption"].split()) > 0 for r in found)


def test_data_without_texts_are_named(tmp_path: Path) -> None:
    shards = write(tmp_path / "bare", lambda i: {"jpg": image_bytes(i)})
    with pytest.raises(
        DataError, match=r"^No sample of '.*bare' has what the task retrieval needs\. Look at them with `mmscale shards show`\.$"
    ):
        predict(tmp_path, stage(shards, task={"name": "retrieval"}))
