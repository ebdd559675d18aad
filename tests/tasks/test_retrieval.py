from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mmscale.config import RunConfig
from mmscale.data.collate import Collator
from mmscale.data.dataset import ShardDataset
from mmscale.data.tokenize import TextTokenizer
from mmscale.evaluate import EvaluateCommand, evaluation_config
from mmscale.model import MMScaleModel
from mmscale.tasks import gallery
from mmscale.tasks.gallery import Gallery, first_right_rank
from mmscale.tasks.retrieval import Retrieval
from shards import configfile
from shards.errors import ConfigError, DataError
from tests.data.tiny import image_bytes, mixed, paired, write
from tests.tasks.predicting import predict, random_model, stage

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


def test_equal_texts_tie_to_the_last_bit_and_keep_their_order() -> None:
    """In one product of matrices, equal columns can differ by rounding, as kernels treat the last ones in another way."""
    rng = np.random.default_rng(0)
    image, text = (rng.standard_normal((60, 33)).astype(np.float32) for _ in range(2))
    found = [{"caption": f"c{i % 7}", "image": image[i], "text": text[i], "position": i} for i in range(60)]
    first_QK = Gallery.of(found).first("image_to_text", 60)
    for group in range(7):
        same = list(range(group, 60, 7))
        assert all([t for t in first.tolist() if t % 7 == group] == same for first in first_QK)
        assert all(np.ptp(np.flatnonzero(np.isin(first, same))) == len(same) - 1 for first in first_QK)  # side by side


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
    monkeypatch.setattr(gallery, "_QUERIES_AT_ONCE", 7)
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


def with_candidates(found: list[dict], first: list[list[int]], logits: list[list[float]]) -> list[dict]:
    """The same candidates and logits both ways."""
    pairs = [np.stack([np.array(c, dtype=float), np.array(s)]) for c, s in zip(first, logits, strict=True)]
    return [r | {"image_to_text": p, "text_to_image": p} for r, p in zip(found, pairs, strict=True)]


def test_hand_computed_re_ranking() -> None:
    similarity = np.array([[0.9, 0.8, 0.2, 0.1], [0.8, 0.7, 0.5, 0.1], [0.9, 0.8, 0.1, 0.2], [0.3, 0.2, 0.4, 0.35]])
    # 0: the right one is put second; 1: the right one is put first; 2: not among the first two, stays fourth; 3: ties with a wrong one
    first, logits = [[0, 1], [0, 1], [0, 1], [2, 3]], [[1, 2], [1, 2], [5, 6], [3, 3]]
    made = with_candidates(records(similarity.tolist(), np.eye(4).tolist()), first, logits)
    scores = TASK.score(made)
    assert scores["contrastive_image_to_text_r1"] == pytest.approx(1 / 4)
    assert scores["image_to_text_r1"] == pytest.approx(1 / 4)
    assert scores["image_to_text_r5"] == 1
    assert Gallery.of(made).reranked("image_to_text", made, np.array([0, 1, 3, 1])).tolist() == [1, 0, 3, 1]
    assert TASK.resampler(made)(np.ones((1, 4))).tolist() == [1 / 4]


def matching_stage(shards: Path, k: int) -> RunConfig:
    return stage(shards, task={"name": "retrieval", "rerank": k})


@pytest.mark.parametrize("k", [1, 4, 1000])
def test_the_first_candidates_have_their_matching_logits(tmp_path: Path, k: int) -> None:
    """As `match_logits` gives them, one pair a batch."""
    shards = write(tmp_path / "mixed", mixed)
    config = matching_stage(shards, k)
    found = predict(tmp_path, config)
    texts = [text for r in found for text in [r["caption"], *r.get("captions", ())]]
    assert len(texts) > len(found)  # some samples have several
    assert found[0]["image_to_text"].shape == (2, min(k, len(texts)))
    plain = predict(tmp_path, stage(shards, task={"name": "retrieval"}))
    made = Gallery.of(plain)
    similarity = (made.images_NE @ made.texts_TE.T)[:, [made.captions.index(text) for text in made.captions]]  # equal texts tie
    model = random_model(TextTokenizer(tmp_path / "tokenizer"), config)
    own = np.concatenate([r["text_to_image"] for r in found])
    for direction, scores, ranked in (("image", similarity, [r["image_to_text"] for r in found]), ("text", similarity.T, own)):
        for query in (0, 7, 15):
            first, logits = ranked[query]
            assert first.tolist() == np.argsort(-scores[query], kind="stable")[:k].tolist()
            for candidate, logit in list(zip(first.astype(int), logits, strict=True))[:3]:
                image, text = (query, candidate) if direction == "image" else (candidate, query)
                expected = one_pair(model, config, tmp_path / "tokenizer", plain[image]["position"], texts[text])
                assert logit == pytest.approx(expected, abs=1e-4)


def one_pair(model: MMScaleModel, config: RunConfig, tokenizer: Path, position: int, text: str) -> float:
    """The logit of an image and a text, put into one sample."""
    dataset = ShardDataset(config.data.shards, seed=0, image_size=config.model.image_size)
    example = replace(dataset[position], captions=[text])
    collator = Collator.from_config(config, TextTokenizer(tokenizer), training=False)
    batch = replace(collator, plan=replace(collator.plan, caption=None, text="caption"))([example])
    with torch.no_grad():
        return float(model.match_logits(batch)[0])


def test_all_captions_of_a_sample_are_texts() -> None:
    """COCO's protocol: any of an image's captions is right for it, and each of them is a query."""
    found = records([[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.6, 0.8]], ["a", "b"])
    found[0] |= {"captions": ["c", "b"], "texts": np.array([[0.9, 0.1], [0.6, 0.8]])}
    # image 0: texts a 0, c 0.9, b 0.6, and the other sample's b 0.6, which is right too. image 1: a 1, c 0.1, both b 0.8
    assert Gallery.of(found).ranks("image_to_text").tolist() == [0, 1]
    # a is nearest to image 1; c to image 0; both images have a caption b
    assert Gallery.of(found).ranks("text_to_image").tolist() == [1, 0, 0, 0]
    scores = TASK.score(found)
    assert (scores["image_to_text_r1"], scores["text_to_image_r1"]) == (0.5, 0.75)


def test_batches_change_candidates_by_rounding_alone(tmp_path: Path) -> None:
    shards = write(tmp_path / "mixed", mixed)
    large, small = (predict(tmp_path, matching_stage(shards, 5), batch=batch) for batch in (50, 3))
    for one, other in zip(large, small, strict=True):
        np.testing.assert_allclose(one["image_to_text"], other["image_to_text"], atol=1e-4)
        np.testing.assert_allclose(one["text_to_image"], other["text_to_image"], atol=1e-4)
    scores = TASK.score(large)
    assert TASK.score(small) == scores
    assert any(scores[f"{way}_r{k}"] != scores[f"contrastive_{way}_r{k}"] for way in ("image_to_text", "text_to_image") for k in (1, 5))


def test_a_model_without_matching_does_not_re_rank(tmp_path: Path) -> None:
    command = configfile.build(EvaluateCommand, [("test", {"task": "retrieval", "data": "x", "rerank": 4})])
    with pytest.raises(ConfigError, match=r"^`rerank=4` orders candidates by the matching head, which this model was not trained"):
        evaluation_config(stage(tmp_path), command)
