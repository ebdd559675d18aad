"""Early stopping: a run ends when its evaluations have not improved for a while. What they gave is on file, so a resumed run agrees."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Best:
    """The best evaluation so far."""

    step: int
    value: float
    since: int
    """Evaluations after it."""


def best_of(evaluations: Iterable[Mapping[str, Any]], metric: str) -> Best | None:
    """Find the evaluation where a metric was highest, the first one among equals; None where it was never defined.

    Args:
        evaluations: records of `evaluations.jsonl`, in order.
        metric: its name.
    """
    best: Best | None = None
    for record in evaluations:
        value = record.get(metric)
        if value is not None and (best is None or value > best.value):
            best = Best(record["step"], float(value), 0)
        elif best is not None:
            best = Best(best.step, best.value, best.since + 1)
    return best


def is_out(best: Best | None, patience: int) -> bool:
    """Whether so many evaluations were no better; 0 has patience for ever."""
    return patience > 0 and best is not None and best.since >= patience
