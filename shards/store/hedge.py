"""When to ask for the same bytes a second time: past a high quantile of recent reads, and not more often than agreed.

Source: J. Dean and L. A. Barroso, The Tail at Scale, CACM 56(2), 2013 (hedged requests).
"""

from __future__ import annotations

from collections import deque

FIRST_S = 1.0
"""How long a read may take before the usual time is known."""
KNOWN_AFTER = 20
"""Reads of a kind after which its usual time is known."""
REMEMBERED = 256
"""Recent reads of a kind that the quantile is taken of."""
BURST = 4.0
"""Second askings that may follow each other at once."""
STALLED = 16.0
"""Times the threshold, and at least FIRST_S, after which a read has stalled: it is asked for again whatever the share, and a last time
after four times as long."""


class Hedge:
    """Decides on second askings. Used by one thread.

    Args:
        share: of requests that may be spent on them; reads slower than all but half of this share are asked for again. 0 for never.
            Askings for what has stalled are made in any case, and count.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._allowed = BURST
        self._recent: dict[str, deque[float]] = {}
        self._threshold_s: dict[str, float] = {}

    def pauses_s(self, kind: str) -> list[tuple[float, bool]]:
        """Return how long to wait before each further asking, and whether it is for what has stalled."""
        if not self._share:
            return []
        threshold_s = self._threshold_s.get(kind, FIRST_S)
        stalled_s = max(FIRST_S, STALLED * threshold_s)
        return [(threshold_s, False), (stalled_s - threshold_s, True), (3 * stalled_s, True)]

    def observe(self, kind: str, took_s: float) -> None:
        """Take in how long a read took; every one also earns a part of a second asking."""
        self._allowed = min(BURST, self._allowed + self._share)
        recent = self._recent.setdefault(kind, deque(maxlen=REMEMBERED))
        recent.append(took_s)
        if len(recent) == KNOWN_AFTER or (len(recent) > KNOWN_AFTER and len(recent) % 16 == 0):
            self._threshold_s[kind] = sorted(recent)[int((1 - self._share / 2) * (len(recent) - 1))]

    def take(self, stalled: bool) -> bool:
        """Spend one second asking; for what is merely slow, only if one is left."""
        if self._allowed < 1 and not stalled:
            return False
        self._allowed -= 1
        return True


def size_class(size: int) -> str:
    """Name the kind of a read by its size: those within a factor of four take about the same time."""
    return f"4^{size.bit_length() // 2}"
