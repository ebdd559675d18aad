"""The limit: the same decoder over JPEGs that lie in memory, into memory that is used again. Ranks share the samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.readers import BATCH, Options
from benchmarks.readers.picture import SIZE, decode
from benchmarks.readers.tars import link as prepare  # noqa: F401  (it reads the tars at its start)
from benchmarks.readers.tars import samples

SETTINGS = "a loop over bytes in memory, decoded into memory that is used again; with 2 workers, 2 such processes at once"


class Reader:
    """One epoch of this rank's share."""

    def __init__(self, options: Options) -> None:
        self.samples = list(samples(options.folder))[options.rank :: options.size]
        self.room = np.empty(1 << 22, np.uint8)
        self.images = np.empty((BATCH, SIZE, SIZE, 3), np.uint8)

    def __iter__(self) -> Iterator[tuple[list[str], Any]]:
        """Yield (keys, images)."""
        for start in range(0, len(self.samples), BATCH):
            chunk = self.samples[start : start + BATCH]
            for row, (_, data) in enumerate(chunk):
                self.images[row] = decode(data, self.room)
            yield [key for key, _ in chunk], self.images[: len(chunk)]

    def state(self) -> None:
        """Nothing is to be resumed."""
        return
