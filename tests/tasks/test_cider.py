"""CIDEr-D against the code of its authors, and by hand."""

from __future__ import annotations

import logging
import math

import pytest

from mmscale.tasks.captioning import Captioning
from mmscale.tasks.cider import cider_d, words_of

PREDICTIONS = ["a dog runs over the grass", "Two men play chess.", "a red bus", "a dog"]
REFERENCES = [
    ["a brown dog runs across the grass", "dog running on grass"],
    ["two men are playing chess", "men play a game of chess"],
    ["a red bus on a street"],
    ["a cat sleeps on a sofa", "a sleeping cat"],
]


def test_numbers_of_pycocoevalcap() -> None:
    """Those that version 1.2 of pycocoevalcap's CiderScorer gives for these words."""
    assert cider_d(PREDICTIONS, REFERENCES) == pytest.approx([1.95669796, 2.28134488, 4.40518846, 0.0], abs=1e-8)
    records = [{"prediction": p, "references": r} for p, r in zip(PREDICTIONS, REFERENCES, strict=True)]
    assert Captioning("caption").score(records)["cider"] == pytest.approx((1.95669796 + 2.28134488 + 4.40518846) / 4, abs=1e-8)


def test_by_hand() -> None:
    """Of "b" and "b c" the words are in one image of two, so that their weight is log 2; the length differs by a word."""
    one, two = cider_d(["b", "d"], [["b c"], ["d"]])
    assert one == pytest.approx(10 * (1 / math.sqrt(2)) / 4 * math.exp(-1 / 72))
    assert two == pytest.approx(10 / 4)
    assert cider_d(["b b b"], [["b"]]).tolist() == [0]
    assert cider_d([], []).tolist() == []
    clipped, _ = cider_d(["b b", "d"], [["b"], ["d"]])  # one b counts, and the prediction is longer
    assert clipped == pytest.approx(10 * (1 / 2) / 4 * math.exp(-1 / 72))


def test_words_are_without_case_and_punctuation() -> None:
    assert words_of("A dog's tail, Zo\u00eb-like: 2 x 3_4!") == ["a", "dog's", "tail", "zo\u00eb", "like", "2", "x", "3", "4"]
    assert words_of("the dog\u2019s \u2018tail\u2019 cafe\u0301s '") == ["the", "dog's", "tail", "caf\u00e9s"]
    assert words_of("\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e") == [
        "\u0928\u092e\u0938\u094d\u0924\u0947",
        "\u0926\u0941\u0928\u093f\u092f\u093e",
    ]


def test_one_image_has_no_score(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert Captioning("caption").score([{"prediction": "a", "references": ["a"]}])["cider"] is None
    assert "The metric cider is undefined and reported as null" in caplog.text
