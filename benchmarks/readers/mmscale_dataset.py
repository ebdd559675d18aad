"""Ours as a plain map-style data set in torch's own DataLoader."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from benchmarks.readers import BATCH, Options
from benchmarks.readers.mmscale_threads import prepare as prepare
from benchmarks.readers.picture import SHORT_SIDE, SIZE
from mmscale.data.dataset import ShardDataset
from mmscale.data.example import Example

SETTINGS = "ShardDataset in torch's DataLoader, positions in order (they are shuffled already), images stacked in the workers"


def stack(examples: list[Example]) -> tuple[list[str], torch.Tensor]:
    """Stack decoded samples."""
    return [e.key for e in examples], torch.from_numpy(np.stack([e.image for e in examples if e.image is not None]))


class Reader:
    """One epoch."""

    def __init__(self, options: Options) -> None:
        dataset = ShardDataset(options.folder, image_size=SIZE, short_side=SHORT_SIDE)
        self.seen = options.state or 0
        self.step = BATCH * options.size
        firsts = range(self.seen, len(dataset), self.step)
        starts = [min(first + options.rank * BATCH, len(dataset)) for first in firsts]
        batches = [range(start, min(start + BATCH, len(dataset))) for start in starts]
        self.loader = DataLoader(dataset, batch_sampler=[b for b in batches if b], num_workers=options.workers, collate_fn=stack)

    def __iter__(self) -> Iterator[tuple[list[str], Any]]:
        """Yield (keys, images)."""
        for batch in self.loader:
            self.seen += self.step
            yield batch

    def state(self) -> int:
        """Return the samples seen."""
        return self.seen
