"""Ours as `docs/reader.md` has it: `ImageBatches`, as many decode threads as the others have workers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.readers import BATCH, Options
from benchmarks.readers.picture import SHORT_SIDE, SIZE
from benchmarks.readers.tars import link
from mmscale.data.reader import ImageBatches
from shards.index import adopt

SETTINGS = (
    "ImageBatches: decode threads of the process, as many as the others have workers, one for 0; every part checked against its checksum"
)


def prepare(tars: Path, folder: Path) -> None:
    """Index the tars."""
    link(tars, folder)
    adopt(folder)


class Reader:
    """One epoch."""

    def __init__(self, options: Options) -> None:
        self.batches = ImageBatches(
            options.folder,
            batch_size=BATCH,
            image_size=SIZE,
            short_side=SHORT_SIDE,
            rank=options.rank,
            size=options.size,
            threads=max(1, options.workers),
        )
        if options.state is not None:
            self.batches.load_state_dict(options.state)

    def __iter__(self) -> Iterator[tuple[list[str], Any]]:
        """Yield (keys, images)."""
        for batch in self.batches:
            yield batch.keys, batch.images

    def state(self) -> Any:
        """Return its state."""
        return self.batches.state_dict()
