"""webdataset: batches made in the workers, as its manual has it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset

from benchmarks.readers import BATCH, Options
from benchmarks.readers.picture import decode
from benchmarks.readers.tars import link as prepare  # noqa: F401  (plain tars are what it reads)

SETTINGS = "shards shuffled, shuffle buffer 1,000, .batched(64) in the workers, WebLoader(batch_size=None); resume: none of its own, skips"


def decode_sample(sample: dict[str, Any]) -> tuple[str, np.ndarray]:
    """Decode one sample."""
    return sample["__key__"], decode(sample["jpg"])


def stack(samples: list[tuple[str, np.ndarray]]) -> tuple[list[str], torch.Tensor]:
    """Stack decoded samples."""
    return [key for key, _ in samples], torch.from_numpy(np.stack([image for _, image in samples]))


class Skip(webdataset.PipelineStage):
    """Leaves out the samples that a worker has delivered before, undecoded: the cheapest way to the middle of an epoch."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def run(self, source: Iterator[Any]) -> Iterator[Any]:
        """Skip this worker's share; workers take turns by batches."""
        info = torch.utils.data.get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        for _ in range(len(range(worker, self.batches, workers)) * BATCH):
            next(source, None)
        yield from source


class Reader:
    """One epoch."""

    def __init__(self, options: Options) -> None:
        urls = sorted(map(str, Path(options.folder).glob("*.tar")))[options.rank :: options.size]
        self.taken = (options.state or 0) // options.size
        dataset = (
            webdataset.WebDataset(urls, shardshuffle=len(urls), detshuffle=True, seed=0, nodesplitter=None)
            .compose(webdataset.detshuffle(1000, seed=0))
            .compose(Skip(self.taken))
            .map(decode_sample)
            .batched(BATCH, collation_fn=stack)
        )
        self.loader = webdataset.WebLoader(dataset, batch_size=None, num_workers=options.workers)
        self.size = options.size

    def __iter__(self) -> Iterator[tuple[list[str], Any]]:
        """Yield (keys, images)."""
        for batch in self.loader:
            self.taken += 1
            yield batch

    def state(self) -> int:
        """Return the batches read by all ranks."""
        return self.taken * self.size
