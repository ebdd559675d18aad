"""litdata: the samples as an optimized data set."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from litdata import StreamingDataLoader, StreamingDataset, optimize

from benchmarks.readers import BATCH, Options
from benchmarks.readers.picture import decode
from benchmarks.readers.tars import samples

SETTINGS = "chunks of as many samples as a tar holds, shuffle=True, drop_last=False, transform decodes; resume by state_dict"


def same(sample: tuple[str, bytes]) -> dict[str, Any]:
    """Store a sample as it is."""
    return {"key": sample[0], "jpg": sample[1]}


def prepare(tars: Path, folder: Path) -> None:
    """Write the samples as chunks, a chunk a tar."""
    found = list(samples(tars))
    rows = -(-len(found) // len(list(tars.glob("*.tar"))))
    optimize(fn=same, inputs=found, output_dir=str(folder), chunk_size=rows, num_workers=1, reorder_files=False, verbose=False)


def picture(sample: dict[str, Any]) -> tuple[str, np.ndarray]:
    """Decode a sample."""
    return sample["key"], decode(sample["jpg"])


def stack(found: list[tuple[str, np.ndarray]]) -> tuple[list[str], torch.Tensor]:
    """Stack decoded samples."""
    return [key for key, _ in found], torch.from_numpy(np.stack([image for _, image in found]))


class Reader:
    """One epoch."""

    def __init__(self, options: Options) -> None:
        dataset = StreamingDataset(str(options.folder), shuffle=True, drop_last=False, seed=0, transform=picture)
        self.loader = StreamingDataLoader(dataset, batch_size=BATCH, num_workers=options.workers, collate_fn=stack)
        if options.state is not None:
            self.loader.load_state_dict(options.state)

    def __iter__(self) -> Iterator[tuple[list[str], Any]]:
        """Yield (keys, images)."""
        yield from self.loader

    def state(self) -> Any:
        """Return its state."""
        return self.loader.state_dict()
