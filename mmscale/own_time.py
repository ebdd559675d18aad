"""What a rank spends on a step by itself, so that the rank that all others wait for can be named.

By the clock, every rank takes as long as the slowest: collectives make them wait. A rank's own are the wait for its data, and each
micro-step from the start of its forward until the gradient reaches the embeddings, without what the contrastive loss gathers in between.
Gradients are reduced after that, as long as they fit `zero.reduce_bucket`; ZeRO 3 gathers weights all along, which evens ranks out, so that
there only data tells. On a device the moments are events, and read when a line is logged: they have passed then, and nobody waits.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch

SLOW, LINES = 1.5, 3
"""A rank is slow that takes so many times the median in so many logged lines in a row."""


class Moment:
    """A point in the work of a device, or in time on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._at = time.perf_counter()
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._event.record()

    def until(self, later: Moment) -> float:
        """Seconds to a later moment; both must have passed."""
        if self._event is None or later._event is None:
            return later._at - self._at
        return float(self._event.elapsed_time(later._event)) / 1000


@dataclass(slots=True)
class OwnTime:
    """Spans of this rank that are its own, and waits inside of them that are not."""

    spans: list[tuple[Moment, Moment]] = field(default_factory=list)
    waits: list[tuple[Moment, Moment]] = field(default_factory=list)

    def add(self, other: OwnTime) -> None:
        """Take in those of another step."""
        self.spans += other.spans
        self.waits += other.waits

    def seconds(self) -> float:
        """Own time in all; on a device, after a wait for it."""
        return sum(a.until(b) for a, b in self.spans) - sum(a.until(b) for a, b in self.waits)


_current: ContextVar[OwnTime | None] = ContextVar("own_time", default=None)
"""Of the micro-step that runs; the collectives inside of a forward have no other way to it."""


@contextmanager
def waiting(device: torch.device) -> Iterator[None]:
    """Around a collective of the forward: what it takes is not this rank's own."""
    own, before = _current.get(), Moment(device)
    yield
    if own is not None:
        own.waits.append((before, Moment(device)))


@contextmanager
def measured(own: OwnTime, device: torch.device) -> Iterator[list[Moment]]:
    """Around a micro-step: adds it to `own`. The list that it gives is to get the moment when the micro-step's own part was over."""
    before, over = Moment(device), list[Moment]()
    token = _current.set(own)
    try:
        yield over
    finally:
        _current.reset(token)
    own.spans.append((before, over[-1] if over else Moment(device)))


@dataclass(slots=True)
class Straggler:
    """The slowest rank of each logged line, and for how many lines it has been slow."""

    rank: int | None = None
    lines: int = 0

    def look(self, own_R: Sequence[float]) -> dict[str, float]:
        """Find the slowest rank and its part of the (lower) median, for the metrics.

        Args:
            own_R: own seconds of each rank.
        """
        slowest = max(range(len(own_R)), key=lambda rank: own_R[rank])
        ratio = own_R[slowest] / max(statistics.median_low(own_R), 1e-9)
        if ratio <= SLOW:
            self.rank, self.lines = None, 0
        else:
            self.lines = self.lines + 1 if self.rank == slowest else 1
            self.rank = slowest
        return {"slowest_rank": slowest, "slowest_over_median": ratio}

    def warning(self) -> str | None:
        """Say it once, when a rank has been slow for long enough."""
        if self.lines != LINES:
            return None
        return (
            f"rank {self.rank} took more than {SLOW:g} times the median of the ranks' own time (data, forward, backward) in {LINES} logged "
            "lines in a row, and all others wait for it: look at its host, its device and its data (slowest_rank in metrics.jsonl)"
        )
