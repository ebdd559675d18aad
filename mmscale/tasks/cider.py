"""CIDEr-D: how much a caption says what most people say of the image. Source: Vedantam et al. 2015, sections 3 and 4, equations 1 to 6.

It is what COCO's evaluation calls CIDEr. Our own, because its code comes with 100 MB of Java and has had no release since 2020; a test
has its numbers. There a Java program splits words (PTBTokenizer); here a word is a run of letters, their marks, digits and apostrophes in
lower case. Scripts that put no space between words have one word a sentence: for them look at chrF.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

LONGEST = 4
"""Words of an n-gram, at most."""
SIGMA = 6.0
"""Words: how far apart two lengths may be (equation 6)."""
SCALE = 10.0
Counts = list[Counter[tuple[str, ...]]]
"""How often a text has each n-gram, by n."""


def cider_d(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> NDArray[np.float64]:
    """Score each prediction by its references, and by how rare their n-grams are among the references of all.

    Args:
        predictions: N captions.
        references: of each at least one caption.

    Returns:
        (N,) from 0 to 10; all 0 where N is 1, because every n-gram is then in the references of every image.
    """
    cooked = [[ngrams(text) for text in texts] for texts in references]
    images = Counter(gram for texts in cooked for gram in {gram for counts in texts for by_n in counts for gram in by_n})
    weights = _Weights({gram: math.log(len(cooked) / count) for gram, count in images.items()}, math.log(max(1, len(cooked))))
    found = [np.mean([weights.similarity(ngrams(p), r) for r in texts]) for p, texts in zip(predictions, cooked, strict=True)]
    return SCALE * np.array(found)


def words_of(text: str) -> list[str]:
    """Its words."""
    plain = unicodedata.normalize("NFC", text).lower().replace("\u2019", "'")
    kept = (c if c.isalnum() or c == "'" or unicodedata.category(c).startswith("M") else " " for c in plain)
    return [word for found in "".join(kept).split() if (word := found.strip("'"))]


def ngrams(text: str) -> Counts:
    """Count them."""
    words = words_of(text)
    return [Counter(zip(*(words[i:] for i in range(n)), strict=False)) for n in range(1, LONGEST + 1)]


class _Weights:
    """What n-grams weigh (equation 1): the rarer among images the more; one that is in no reference as if it were in one."""

    def __init__(self, known: dict[tuple[str, ...], float], unknown: float) -> None:
        self._known, self._unknown = known, unknown

    def similarity(self, prediction: Counts, reference: Counts) -> float:
        """Equation 6, a mean over n: cosines, of the prediction no more than the reference has, and what lengths cost."""
        apart = prediction[0].total() - reference[0].total()
        cosines = [self._cosine(*pair) for pair in zip(prediction, reference, strict=True)]
        return sum(cosines) / len(cosines) * math.exp(-(apart**2) / (2 * SIGMA**2))

    def _cosine(self, prediction: Counter[tuple[str, ...]], reference: Counter[tuple[str, ...]]) -> float:
        shared = sum(self._of(gram) ** 2 * min(count, reference[gram]) * reference[gram] for gram, count in prediction.items())
        norms = self._norm(prediction) * self._norm(reference)
        return shared / norms if norms else 0.0

    def _norm(self, counts: Counter[tuple[str, ...]]) -> float:
        return math.sqrt(sum((count * self._of(gram)) ** 2 for gram, count in counts.items()))

    def _of(self, gram: tuple[str, ...]) -> float:
        return self._known.get(gram, self._unknown)
