from pathlib import Path

import pytest

from mmscale.data.tokenize import TextTokenizer
from mmscale.tasks.captioning import Captioning, normalise
from tests.data.tiny import caption, mixed, tokenizer_folder, write
from tests.tasks.predicting import predict, stage


@pytest.fixture
def tokenizer(tmp_path: Path) -> TextTokenizer:
    return TextTokenizer(tokenizer_folder(tmp_path / "tokenizer"))


def record(prediction: str, *references: str) -> dict:
    return {"prediction": prediction, "references": list(references)}


def test_case_and_spacing_are_no_mistakes(tokenizer: TextTokenizer) -> None:
    assert normalise("  Red   SQUARE ", tokenizer) == "red square"
    assert normalise("", tokenizer) == ""


def test_a_word_that_the_tokenizer_lacks_is_never_matched(tokenizer: TextTokenizer) -> None:
    """Dropping unknown words would let an empty prediction equal a reference of unknown words alone."""
    assert normalise("violet  square", tokenizer) == "violet square"
    assert normalise("violet", tokenizer) == "violet"


def test_a_long_reference_is_not_cut(tokenizer: TextTokenizer) -> None:
    assert normalise("red " * 5000, tokenizer).count("red") == 5000


def test_hand_computed_scores() -> None:
    task = Captioning("caption")
    scores = task.score([record("red square", "red square", "square"), record("blue circle", "green circle"), record("small", "small")])
    assert scores["exact_match"] == pytest.approx(2 / 3)
    assert scores["samples"] == 3
    perfect = task.score([record("a red square left of it", "a red square left of it")] * 4)
    assert perfect == {"exact_match": 1.0, "cider": 0.0, "chrf": pytest.approx(1), "bleu": pytest.approx(1), "samples": 4.0}
    assert task.score([record("", "red square")])["chrf"] == 0


def test_bleu_by_hand() -> None:
    """Of 5 words 4 are right, of 4 pairs 3, of 3 triples 2, of 2 quadruples 1; equal lengths: no brevity penalty."""
    scores = Captioning("caption").score([record("red square left of green", "red square left of blue")])
    assert scores["bleu"] == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)


def test_chrf_by_hand() -> None:
    """chrF with beta 2 over character n-grams: here only orders 1 to 3 exist, F = 5 P R / (4 P + R) of each order's mean P and R."""
    scores = Captioning("caption").score([record("abc", "abd")])
    precision = recall = (2 / 3 + 1 / 2 + 0) / 3
    assert scores["chrf"] == pytest.approx(5 * precision * recall / (4 * precision + recall), abs=1e-3)


@pytest.mark.parametrize("beams", [1, 3])
def test_generates_for_every_image_with_a_reference(tmp_path: Path, beams: int) -> None:
    shards = write(tmp_path / "mixed", mixed)
    found = predict(tmp_path, stage(shards, task={"name": "captioning", "beams": beams}))
    assert {int(r["key"][1:]) % 6 for r in found} == {0, 4, 5}
    references = {r["key"]: r["references"] for r in found}
    assert references["s0"] == [caption(0)]
    assert references["s4"] == [caption(4 + i) for i in range(3)]
    assert all(isinstance(r["prediction"], str) for r in found)
