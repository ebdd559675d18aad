"""Captioning: greedy, beam or sampled decoding, scored by exact match, CIDEr-D, chrF and BLEU (sacrebleu)."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from mmscale.data.batch import Batch
from mmscale.data.tokenize import TextTokenizer
from mmscale.model import MMScaleModel
from mmscale.objectives.captioning import Captioning as CaptioningObjective
from mmscale.tasks.cider import cider_d
from mmscale.tasks.evaluated import Evaluated
from mmscale.tasks.fields import caption_field
from mmscale.tasks.kinds import TaskKind
from mmscale.tasks.task import Metrics, Record, Resampler, mean_of_resamples, record_of, texts_of
from mmscale.tasks.writing import Writing

logger = logging.getLogger(__name__)


class Captioning:
    """Generates a caption for each image.

    Args:
        caption: field of the references; all captions of a sample are references.
        writing: how.
    """

    name = "captioning"
    main_metric = "exact_match"

    def __init__(self, caption: str, writing: Writing | None = None) -> None:
        self.caption = caption
        self.writing = writing or Writing()

    def predict(self, model: MMScaleModel, batch: Batch, tokenizer: TextTokenizer) -> list[Record]:
        """Generate for each sample that has an image and a reference."""
        records: list[Record] = []
        for row, text in self.writing.write(model, batch, tokenizer).items():
            references = [normalise(c, tokenizer) for c in texts_of(batch.fields[row], self.caption)]
            if references:
                records.append(record_of(batch, row, references=references, prediction=normalise(text, tokenizer)))
        return records

    def score(self, records: Sequence[Record]) -> Metrics:
        """Exact match with any reference, CIDEr-D, corpus chrF and BLEU over all references."""
        from sacrebleu.metrics import BLEU, CHRF

        predictions = [r["prediction"] for r in records]
        most = max(len(r["references"]) for r in records)
        references = [[r["references"][i] if i < len(r["references"]) else None for r in records] for i in range(most)]
        exact = [r["prediction"] in r["references"] for r in records]
        return {
            "exact_match": sum(exact) / len(exact),
            "cider": self._cider(records),
            "chrf": CHRF().corpus_score(predictions, references).score / 100,
            "bleu": BLEU().corpus_score(predictions, references).score / 100,
            "samples": float(len(records)),
        }

    def _cider(self, records: Sequence[Record]) -> float | None:
        if len(records) < 2:
            logger.warning(
                "The metric cider is undefined and reported as null: it weighs words by how few images have them in their captions, and "
                "there is one image. Evaluate on more samples."
            )
            return None
        return float(cider_d([r["prediction"] for r in records], [r["references"] for r in records]).mean())

    def resampler(self, records: Sequence[Record]) -> Resampler:
        """Exact match of resamples."""
        return mean_of_resamples(np.array([r["prediction"] in r["references"] for r in records]))


def normalise(text: str, tokenizer: TextTokenizer) -> str:
    """Compare in the tokenizer's own spelling: what it does not write (case, spacing) is no mistake of the model.

    A text with an unknown token keeps its own spelling, so that no prediction can equal it by leaving words out.
    """
    ids = tokenizer.encode(text, 1 << 20)[1:-1]
    known = not set(ids) & set(tokenizer.special_ids)
    return " ".join((tokenizer.decode(ids) if known else text).split())


def _draw(found: Evaluated) -> None:
    """Draw images with what is said of them; right is what equals a reference, the percentage is chrF."""
    from sacrebleu.metrics import CHRF

    from mmscale.pictures import draw_examples

    chrf, drawn = CHRF(), []
    for record in found.records:
        said, references = record["prediction"], record["references"]
        alike = chrf.sentence_score(said, references).score / 100
        drawn.append(record | {"confidence": alike, "label": said if said in references else references[0]})
    draw_examples(drawn, found.dataset, found.out / "examples.png", text=None)


KIND = TaskKind(
    name="captioning",
    build=lambda config: Captioning(caption_field(config), Writing.of(config)),
    objective=lambda task: CaptioningObjective(weight=task.weight),
    caption=True,
    writes=True,
    draw=_draw,
)
