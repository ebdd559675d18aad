"""One file a reader, the same interface each, so that `benchmarks/read.py` can run every one in a virtual environment of its own.

A reader's file has `prepare(tars, folder)`, which makes whatever the reader reads out of the shards, and a class `Reader(options)` that
yields (keys, images) of one epoch, images uint8 (N, 224, 224, 3), and whose `state()` is what its own way of resuming saves. `SETTINGS`
says what was chosen and where that comes from.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

BATCH = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How one process opens a reader."""

    folder: Path
    """What `prepare` made."""
    workers: int
    """Worker processes; a reader that decodes in threads takes as many threads, and one for 0."""
    rank: int = 0
    """Of this process."""
    size: int = 1
    """Ranks."""
    state: Any = None
    """What `state()` returned where another process stopped; None at the beginning."""
