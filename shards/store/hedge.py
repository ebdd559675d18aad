"""When to ask for the same bytes a second time: past a high quantile of recent reads, and not more often than agreed.

Source: J. Dean and L. A. Barroso, The Tail at Scale, CACM 56(2), 2013 (hedged requests).
"""

from __future__ import annotations

from collections import deque

FIRST_S = 1.0
"""How long a read may take before the usual time is known."""
KNOWN_AFTER = 20
"""Reads of a size after which its usual time is known."""
REMEMBERED = 256
"""Recent reads of a size that the quantile is taken of."""
BURST = 4.0
"""Second askings that may follow each other at once."""


class Hedge:
    """Decides on second askings. Used by one thread.

    Args:
        share: of reads that are slow enough, and of requests that may be spent on them; 0 for never.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._allowed = BURST if share else 0.0
        self._recent: dict[int, deque[float]] = {}
        self._threshold_s: dict[int, float] = {}

    def after_s(self, size: int) -> float | None:
        """Return how long to wait for so many bytes before asking again; None for ever."""
        if not self._share:
            return None
        return self._threshold_s.get(_size_class(size), FIRST_S)

    def observe(self, size: int, took_s: float) -> None:
        """Take in how long a read took; every one also earns a part of a second asking."""
        self._allowed = min(BURST, self._allowed + self._share)
        kind = _size_class(size)
        recent = self._recent.setdefault(kind, deque(maxlen=REMEMBERED))
        recent.append(took_s)
        if len(recent) == KNOWN_AFTER or (len(recent) > KNOWN_AFTER and len(recent) % 16 == 0):
            self._threshold_s[kind] = sorted(recent)[int((1 - self._share) * (len(recent) - 1))]

    def take(self) -> bool:
        """Spend one second asking, if one is left."""
        if self._allowed < 1:
            return False
        self._allowed -= 1
        return True


def _size_class(size: int) -> int:
    return size.bit_length() // 2
