"""What happens around the training loop: each hook is told of every step and acts every so many."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from mmscale.data.loader import StepBatch
from mmscale.step import StepSums
from mmscale.watchdog import Section


@dataclass(frozen=True, slots=True)
class StepInfo:
    """A finished step."""

    step: int
    """Optimizer steps done, this one included."""
    samples_seen: int
    """Samples consumed by then."""
    batch: StepBatch
    """What this rank trained on."""
    sums: StepSums
    """What the step summed up."""
    last: bool
    """Whether the run ends with this step, finished or stopped."""


class Hook(Protocol):
    """One concern beside the loop. Hooks run in order on all ranks: they may use collectives."""

    section: ClassVar[Section]
    """Whose limit of time the hook has."""

    def after_step(self, info: StepInfo) -> None:
        """Act on a finished step."""
        ...

    def close(self) -> None:
        """Release files; called however the run ends, without collectives."""
        ...


def due(step: int, every: int, last: bool) -> bool:
    """Whether an action that happens every so many steps is due; 0 is never but last."""
    return last or (every > 0 and step % every == 0)
