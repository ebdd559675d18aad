"""What every task is: the interface, and the record of a prediction."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mmscale.data.example import Example

if TYPE_CHECKING:
    from mmscale.data.batch import Batch
    from mmscale.data.tokenize import TextTokenizer
    from mmscale.model import MMScaleModel

Record = dict[str, Any]
"""One sample's prediction: `position`, `key` and what the task needs for its score. With `left_out`, why it has no prediction."""
Metrics = Mapping[str, float | None]
"""Metrics by name; None where one is undefined on these records."""
Resampler = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""How often each of R resamples has each of N records, (R, N), to the main metric of each, (R,), NaN where undefined."""


class Task(Protocol):
    """Predicts batch by batch, then scores all records at once, so that a metric over ranks counts every sample exactly once."""

    name: str
    main_metric: str
    """The metric that a person asks for first."""

    def predict(self, model: MMScaleModel, batch: Batch, tokenizer: TextTokenizer) -> list[Record]:
        """Predict for the samples of a batch that have what the task needs."""
        ...

    def score(self, records: Sequence[Record]) -> Metrics:
        """Compute the metrics over all records, of which there is at least one; fractions of 1 where they are fractions."""
        ...

    def resampler(self, records: Sequence[Record]) -> Resampler:
        """Return what computes the main metric of resamples of these records, for its interval."""
        ...


def record_of(batch: Batch, row: int, **values: Any) -> Record:
    """Start the record of a batch's row."""
    return {"position": int(batch.positions_M[row]), "key": batch.keys[row]} | values


def texts_of(fields: dict[str, Any], name: str) -> list[str]:
    """Return a sample's texts of a field, as the collator chose them."""
    return Example(0, "", captions=fields["captions"], fields=fields).texts(name)


def shown_rows(batch: Batch) -> set[int]:
    """Rows whose samples show or say something that the model reads."""
    return {row for rows in (batch.perception_rows_N, batch.text.rows_S, batch.caption.rows_S) for row in rows.tolist()}


NOTHING_SHOWN = "it has a target, but neither an image (nor an item of another modality) nor a text to predict it from"
"""Why a sample is left out."""


def mean_of_resamples(values_N: NDArray[Any]) -> Resampler:
    """Of a metric that is a mean over samples."""
    plain_N = values_N.astype(np.float64)
    return lambda counts_RN: counts_RN @ plain_N / counts_RN.sum(1)
