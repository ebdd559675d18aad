"""Which cached files go: those needed last.

Source: L. A. Belady, A study of replacement algorithms for a virtual-storage computer, IBM Systems Journal 5(2), 1966 (the MIN algorithm).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cached:
    """A file of the cache."""

    name: str
    size: int
    """Bytes."""
    used_at: float
    """When it was last opened, for those that nobody expects."""


def victims(cached: Iterable[Cached], next_use: Mapping[str, int], *, excess: int, later_than: int = -1) -> list[Cached] | None:
    """Choose what to delete: what nobody expects first, the longest unused first among those; then what is needed last.

    Args:
        cached: what may be deleted.
        next_use: place in the order of coming use, by name.
        excess: bytes that must go.
        later_than: nothing that is needed at this place or sooner may go.

    Returns:
        The files, or None if deleting all that may go is not enough.
    """
    order = sorted(
        (f for f in cached if next_use.get(f.name, math.inf) > later_than), key=lambda f: (-next_use.get(f.name, math.inf), f.used_at)
    )
    chosen: list[Cached] = []
    for file in order:
        if excess <= 0:
            break
        chosen.append(file)
        excess -= file.size
    return None if excess > 0 else chosen
