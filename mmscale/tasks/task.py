"""What every task is: the interface, and the record of a prediction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from mmscale.data.batch import Batch
from mmscale.data.example import Example
from mmscale.data.tokenize import TextTokenizer
from mmscale.model import MMScaleModel

Record = dict[str, Any]
"""One sample's prediction: `position`, `key` and what the task needs for its score."""


class Task(Protocol):
    """Predicts batch by batch, then scores all records at once, so that a metric over ranks counts every sample exactly once."""

    name: str
    main_metric: str
    """The metric that a person asks for first."""

    def predict(self, model: MMScaleModel, batch: Batch, tokenizer: TextTokenizer) -> list[Record]:
        """Predict for the samples of a batch that have what the task needs."""
        ...

    def score(self, records: Sequence[Record]) -> dict[str, float]:
        """Compute the metrics over all records, of which there is at least one; fractions of 1."""
        ...


def record_of(batch: Batch, row: int, **values: Any) -> Record:
    """Start the record of a batch's row."""
    return {"position": int(batch.positions_M[row]), "key": batch.keys[row]} | values


def texts_of(fields: dict[str, Any], name: str) -> list[str]:
    """Return a sample's texts of a field, as the collator chose them."""
    return Example(0, "", captions=fields["captions"], fields=fields).texts(name)
