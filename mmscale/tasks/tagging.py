"""Tagging: any number of labels a sample, by the `tags` head.

Shape letters: M samples of a batch, N records, C labels, R resamples.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mmscale.config import RunConfig
from mmscale.data.batch import Batch
from mmscale.data.dataset import ShardDataset
from mmscale.data.labels import labels_of, need_labels, tag_counts
from mmscale.data.targets import Facts, TagsTarget
from mmscale.data.tokenize import TextTokenizer
from mmscale.model import MMScaleModel
from mmscale.objectives.tag import Tag
from mmscale.tasks.classification import classes_of
from mmscale.tasks.curves import ratio, weighted_average_precision
from mmscale.tasks.evaluated import Evaluated
from mmscale.tasks.fields import target_field
from mmscale.tasks.kinds import TaskKind
from mmscale.tasks.task import NOTHING_SHOWN, Metrics, Record, Resampler, record_of, shown_rows

logger = logging.getLogger(__name__)
THRESHOLD = 0.5
"""Probability from which a label is predicted."""


class Tagging:
    """The `tags` head: every label whose probability is at least 0.5.

    Args:
        label: json field of the list of labels; an empty list is a sample without one.
    """

    name = "tagging"
    main_metric = "map"

    def __init__(self, label: str) -> None:
        self.label = label

    def predict(self, model: MMScaleModel, batch: Batch, tokenizer: TextTokenizer) -> list[Record]:
        """Predict the labels of each sample that has the field.

        A record has `labels` and `predictions` by name, `unknown` labels, and (C,) arrays `target` (bool) and `probabilities` (float32).
        """
        probabilities_MC = model.classify(batch, "tags").float().sigmoid().cpu().numpy()
        names, shown = model.config.id2label, shown_rows(batch)
        class_of = {name: i for i, name in names.items()}
        records: list[Record] = []
        for row, fields in enumerate(batch.fields):
            labels = labels_of(fields.get(self.label))
            if labels is None:
                continue
            if row not in shown:
                records.append(record_of(batch, row, left_out=NOTHING_SHOWN))
                continue
            target_C = np.zeros(len(names), dtype=bool)
            target_C[[class_of[label] for label in labels if label in class_of]] = True
            found = [names[int(c)] for c in np.flatnonzero(probabilities_MC[row] >= THRESHOLD)]
            unknown = [label for label in labels if label not in class_of]
            values = {"labels": labels, "predictions": found, "unknown": unknown}
            records.append(record_of(batch, row, **values, target=target_C, probabilities=probabilities_MC[row]))
        return records

    def score(self, records: Sequence[Record]) -> Metrics:
        """Mean average precision over labels that some sample has; micro and macro F1 at 0.5.

        A label that the model does not know is missed, which F1 counts.
        """
        self._say_unknown(records)
        target_NC, probabilities_NC = _arrays(records)
        predicted_NC = probabilities_NC >= THRESHOLD
        hits, missed = int((target_NC & predicted_NC).sum()), sum(len(r["unknown"]) for r in records)
        both = int(target_NC.sum()) + int(predicted_NC.sum()) + missed
        present_C = target_NC.any(0)
        both_C = target_NC.sum(0) + predicted_NC.sum(0)
        per_label_C = 2 * (target_NC & predicted_NC).sum(0) / np.maximum(both_C, 1)
        per_label = [*per_label_C[both_C > 0], *[0.0] * len({label for r in records for label in r["unknown"]})]
        return {
            "map": self._map(target_NC, probabilities_NC),
            "micro_f1": 2 * hits / both if both else None,
            "macro_f1": float(np.mean(per_label)) if per_label else None,
            "labels": float(present_C.sum()),
            "samples": float(len(records)),
        }

    def resampler(self, records: Sequence[Record]) -> Resampler:
        """Mean average precision of resamples, over the labels that each of them has."""
        target_NC, probabilities_NC = _arrays(records)

        def mean(counts_RN: NDArray[np.float64]) -> NDArray[np.float64]:
            total_R, labels_R = np.zeros(len(counts_RN)), np.zeros(len(counts_RN))
            counts_NR = np.ascontiguousarray(counts_RN.T, dtype=np.float32)  # sums of counts are whole and small: exact
            for c in np.flatnonzero(target_NC.any(0)):
                value_R = weighted_average_precision(target_NC[:, c], probabilities_NC[:, c], counts_NR)
                total_R += np.nan_to_num(value_R)
                labels_R += np.isfinite(value_R)
            return ratio(total_R, labels_R)

        return mean

    def _map(self, target_NC: NDArray[np.bool_], probabilities_NC: NDArray[np.float32]) -> float | None:
        from sklearn.metrics import average_precision_score

        present = np.flatnonzero(target_NC.any(0))
        if not len(present) or not np.isfinite(probabilities_NC).all():
            why = "the model computes probabilities that are not finite" if len(present) else "no sample has a label that the model knows"
            logger.warning("The metric map is undefined and reported as null: %s. Look at `data.label=%s`.", why, self.label)
            return None
        return float(np.mean([average_precision_score(target_NC[:, c], probabilities_NC[:, c]) for c in present]))

    def _say_unknown(self, records: Sequence[Record]) -> None:
        unknown = [r for r in records if r["unknown"]]
        if unknown:
            logger.warning(
                "%d of %d samples have a label in `data.label=%s` that the model does not know, such as %r of %s: F1 counts it as missed, "
                "map leaves it out. Train with `data.labels` that has it.",
                *(len(unknown), len(records), self.label, unknown[0]["unknown"][0], unknown[0].get("key", "?")),
            )


def _arrays(records: Sequence[Record]) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
    return np.stack([r["target"] for r in records]), np.stack([r["probabilities"] for r in records])


def _study(config: RunConfig, dataset: ShardDataset) -> Facts:
    """Labels, and their log-odds, so that a head of rare labels need not learn first that they are rare (Lin et al. 2017, RetinaNet,
    section 3.3). Labels set by hand are not counted: their log-odds are those of one label a sample."""
    if config.data.labels:
        labels = config.data.labels
        need_labels(dataset.reader, target_field(config), labels)
        return Facts(labels=tuple(labels), log_odds=(-math.log(max(1, len(labels) - 1)),) * len(labels))
    counts, samples = tag_counts(dataset.reader, target_field(config))
    names = sorted(counts)
    return Facts(labels=tuple(names), log_odds=tuple(math.log((counts[n] + 0.5) / (samples - counts[n] + 0.5)) for n in names))


def _draw(found: Evaluated) -> None:
    """Draw images with their labels, and what is looked at; right is who has all of them and no other, the percentage is shared / all."""
    from mmscale.pictures import draw_examples

    drawn = []
    for record in found.records:
        labels, predictions = set(record["labels"]), set(record["predictions"])
        alike = len(labels & predictions) / len(labels | predictions) if labels | predictions else 1.0
        names = {key: ", ".join(sorted(some)) or "none" for key, some in (("label", labels), ("prediction", predictions))}
        drawn.append(record | names | {"confidence": alike})
    draw_examples(drawn, found.dataset, found.out / "examples.png", text=found.config.data.text)
    found.draw_attention(drawn, text=found.config.data.text)


KIND = TaskKind(
    name="tagging",
    build=lambda config: Tagging(target_field(config)),
    objective=lambda task: Tag(weight=task.weight),
    text=True,
    head="tags",
    outputs=lambda facts: len(facts.labels or ()),
    study=_study,
    target=lambda config, facts: TagsTarget(field=target_field(config), classes=classes_of(config, facts)),
    draw=_draw,
)
