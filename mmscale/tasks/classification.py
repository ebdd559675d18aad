"""Classification of an image, a text or both by the `label` head.

Shape letters: M samples of a batch, N records, C labels, R resamples.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmscale.config import RunConfig
from mmscale.data.batch import Batch
from mmscale.data.dataset import ShardDataset
from mmscale.data.labels import label_counts, label_of, label_vocabulary, need_labels
from mmscale.data.targets import Facts, LabelTarget
from mmscale.data.tokenize import TextTokenizer
from mmscale.model import MMScaleModel
from mmscale.objectives.classify import Classify
from mmscale.tasks.evaluated import Evaluated
from mmscale.tasks.fields import target_field
from mmscale.tasks.kinds import TaskKind
from mmscale.tasks.task import NOTHING_SHOWN, Metrics, Record, Resampler, mean_of_resamples, record_of, shown_rows
from shards.errors import ConfigError

logger = logging.getLogger(__name__)
BINS = 15
"""Of the calibration error."""
MOST_PROBABILITIES = 1000
"""Labels up to which a record keeps the probability of each, for AUROC: beyond it they would be gigabytes."""


class Classification:
    """The `label` head: its answer is the label with the largest logit.

    Args:
        name: classification, vqa or reasoning.
        label: json field of the target.
    """

    main_metric = "accuracy"

    def __init__(self, name: str, label: str) -> None:
        self.name = name
        self.label = label

    def predict(self, model: MMScaleModel, batch: Batch, tokenizer: TextTokenizer) -> list[Record]:
        """Predict the label of each sample that has one; a label outside the model's vocabulary counts as wrong.

        A record has `class`, the label's place in the vocabulary or -1, and up to 1,000 labels their `probabilities` (C,) float32.
        """
        probabilities_MC = model.classify(batch).float().softmax(-1).cpu().numpy()
        names, shown = model.config.id2label, shown_rows(batch)
        class_of = {name: i for i, name in names.items()}
        records: list[Record] = []
        for row, fields in enumerate(batch.fields):
            label = label_of(fields.get(self.label))
            if label is None:
                continue
            if row not in shown:
                records.append(record_of(batch, row, left_out=NOTHING_SHOWN))
                continue
            best = int(probabilities_MC[row].argmax())
            found = record_of(batch, row, label=label, prediction=names[best], confidence=float(probabilities_MC[row, best]))
            found |= self.kept_of(fields)
            found["class"] = class_of.get(label, -1)
            if len(names) <= MOST_PROBABILITIES:
                found["probabilities"] = probabilities_MC[row]
            records.append(found)
        return records

    def kept_of(self, fields: dict[str, Any]) -> Record:
        """What else of a sample's json its record keeps: nothing; tasks that score by more say what."""
        return {}

    def score(self, records: Sequence[Record]) -> Metrics:
        """Accuracy, its mean over classes, macro F1, AUROC, calibration error, and the most common label's share for comparison."""
        from sklearn.metrics import f1_score

        self._say_unknown(records)
        right = _right(records)
        labels = np.array([r["label"] for r in records])
        names, counts = np.unique(labels, return_counts=True)
        recalls = [right[labels == name].mean() for name in names]
        return {
            "accuracy": float(right.mean()),
            "balanced_accuracy": float(np.mean(recalls)),
            "macro_f1": float(f1_score(labels, [r["prediction"] for r in records], average="macro", zero_division=0.0)),
            "auroc": auroc(records),
            "ece": expected_calibration_error(np.array([r["confidence"] for r in records]), right),
            "majority": float(counts.max() / len(labels)),
            "samples": float(len(labels)),
        }

    def resampler(self, records: Sequence[Record]) -> Resampler:
        """Accuracy of resamples."""
        return mean_of_resamples(_right(records))

    def _say_unknown(self, records: Sequence[Record]) -> None:
        unknown = [r for r in records if r["class"] < 0]
        if unknown:
            logger.warning(
                "%d of %d samples have a label in `data.label=%s` that the model does not know, such as %r of %s: they count as wrong. "
                "Train with `data.labels` that has it, or leave them out with `mmscale shards filter`.",
                *(len(unknown), len(records), self.label, unknown[0]["label"], unknown[0].get("key", "?")),
            )


def _right(records: Sequence[Record]) -> NDArray[np.float64]:
    return np.array([r["label"] == r["prediction"] for r in records], dtype=np.float64)


def auroc(records: Sequence[Record]) -> float | None:
    """Mean over labels of the area under the curve that tells samples of the label from all others.

    Labels are those of the vocabulary that some samples have and others do not. None, with a warning that says why, where it is undefined.
    Source: Hanley and McNeil 1982; one against the rest as in scikit-learn's `roc_auc_score(multi_class="ovr")`.
    """
    from sklearn.metrics import roc_auc_score

    class_N = np.array([r["class"] for r in records])
    present = [c for c in np.unique(class_N) if c >= 0 and (class_N != c).any()]
    if not present:
        seen = sorted({str(r["label"]) for r in records})
        why = f"all samples have the same label, {seen[0]!r}" if len(seen) == 1 else "no sample has a label that the model knows"
        _say_undefined(f"{why}, and it takes samples of two. Evaluate on data with several labels.")
        return None
    if "probabilities" not in records[0]:
        _say_undefined(f"the model has more than {MOST_PROBABILITIES:,} labels, whose probabilities are not kept.")
        return None
    probabilities_NC = np.stack([r["probabilities"] for r in records])
    if not np.isfinite(probabilities_NC).all():
        _say_undefined("the model computes probabilities that are not finite. Look at its training's losses.")
        return None
    return float(np.mean([roc_auc_score(class_N == c, probabilities_NC[:, c]) for c in present]))


def _say_undefined(why: str) -> None:
    logger.warning("The metric auroc is undefined and reported as null: %s", why)


def expected_calibration_error(confidence_N: NDArray[np.float64], right_N: NDArray[np.float64], bins: int = BINS) -> float:
    """Mean over samples of how far their bin's accuracy is from its mean confidence; bins of equal width, closed above.

    Source: Guo et al. 2017 (On calibration of modern neural networks), section 2 with M = 15.
    """
    place_N = np.clip(np.ceil(np.nan_to_num(confidence_N) * bins) - 1, 0, bins - 1).astype(int)
    gap_B = np.bincount(place_N, right_N - confidence_N, minlength=bins)
    return float(np.abs(gap_B).sum() / len(confidence_N))


def study_labels(config: RunConfig, dataset: ShardDataset) -> Facts:
    """Take the label vocabulary from `data.labels`, or read it from the training shards."""
    field = target_field(config)
    if config.task is not None and config.task.class_weights == "balanced":
        return _balanced(config, dataset, field)
    if config.data.labels:
        need_labels(dataset.reader, field, config.data.labels)
        return Facts(labels=tuple(config.data.labels))
    labels = label_vocabulary(dataset.reader, field)
    if len(labels) < 2:
        raise ConfigError(
            f"`data.label`: all samples of {config.data.shards!r} have the same {field}, {labels[0]!r}; two labels are needed."
        )
    return Facts(labels=tuple(labels))


def _balanced(config: RunConfig, dataset: ShardDataset, field: str) -> Facts:
    """Labels with the weights that make each count alike. Source: King and Zeng 2001, as in scikit-learn's `class_weight="balanced"`."""
    counts = label_counts(dataset.reader, field)
    labels = list(config.data.labels or sorted(counts))
    missing = [label for label in labels if not counts[label]]
    if missing or len(labels) < 2:
        why = f"no sample of {config.data.shards!r} has the label {missing[0]!r}" if missing else f"{field} has fewer than two labels"
        raise ConfigError(f"`task.class_weights=balanced` weighs labels by their samples, and {why}. Mend `data.labels`, or set none.")
    total = sum(counts[label] for label in labels)
    return Facts(labels=tuple(labels), weights=tuple(total / (len(labels) * counts[label]) for label in labels))


def classes_of(config: RunConfig, facts: Facts) -> dict[str, int]:
    """Label to class.

    Raises:
        ConfigError: the vocabulary is not known.
    """
    if facts.labels is None:
        name = "classification" if config.task is None else config.task.name
        raise ConfigError(f"`task.name={name}` needs the label vocabulary. List `data.labels`, or start from a checkpoint that has one.")
    return {label: i for i, label in enumerate(facts.labels)}


def draw_labels(found: Evaluated) -> None:
    """Draw the confusion matrix, right and wrong examples, and what the model looks at in them."""
    from mmscale.pictures import draw_confusion, draw_examples

    draw_confusion(found.records, found.out / "confusion.png")
    draw_examples(found.records, found.dataset, found.out / "examples.png", text=found.config.data.text)
    found.draw_attention(found.records, text=found.config.data.text)


def label_kind(name: str, task: type[Classification] = Classification) -> TaskKind:
    """A task of the `label` head."""
    return TaskKind(
        name=name,
        build=lambda config: task(name, target_field(config)),
        objective=lambda settings: Classify(weight=settings.weight, label_smoothing=settings.label_smoothing),
        text=True,
        head="label",
        outputs=lambda facts: len(facts.labels or ()),
        study=study_labels,
        target=lambda config, facts: LabelTarget(field=target_field(config), classes=classes_of(config, facts)),
        draw=draw_labels,
    )


KIND = label_kind("classification")
