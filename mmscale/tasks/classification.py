"""Classification of an image, a text or both, and visual question answering over a closed vocabulary of answers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmscale.data.batch import Batch
from mmscale.data.labels import label_of
from mmscale.data.tokenize import TextTokenizer
from mmscale.model import MMScaleModel
from mmscale.tasks.task import Record, record_of


class Classification:
    """The `label` head: its answer is the label with the largest logit.

    Args:
        name: classification or vqa.
        label: json field of the target.
    """

    main_metric = "accuracy"

    def __init__(self, name: str, label: str) -> None:
        self.name = name
        self.label = label

    def predict(self, model: MMScaleModel, batch: Batch, tokenizer: TextTokenizer) -> list[Record]:
        """Predict the label of each sample that has one; a label outside the model's vocabulary counts as wrong."""
        probabilities_MC = model.classify(batch).float().softmax(-1)
        best_M = probabilities_MC.max(-1)
        names = model.config.id2label
        records: list[Record] = []
        for row, fields in enumerate(batch.fields):
            label = label_of(fields.get(self.label))
            if label is not None:
                prediction, confidence = names[int(best_M.indices[row])], float(best_M.values[row])
                records.append(record_of(batch, row, label=label, prediction=prediction, confidence=confidence))
        return records

    def score(self, records: Sequence[Record]) -> dict[str, float]:
        """Accuracy, the mean over classes of recall, and the share of the most common label for comparison."""
        right = np.array([r["label"] == r["prediction"] for r in records], dtype=float)
        labels = np.array([r["label"] for r in records])
        names, counts = np.unique(labels, return_counts=True)
        recalls = [right[labels == name].mean() for name in names]
        return {
            "accuracy": float(right.mean()),
            "balanced_accuracy": float(np.mean(recalls)),
            "majority": float(counts.max() / len(labels)),
            "samples": float(len(labels)),
        }
