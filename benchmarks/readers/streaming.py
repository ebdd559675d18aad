"""mosaicml-streaming: the samples as an MDS data set."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.readers import no_torchvision

no_torchvision.stand_in()  # before streaming, which imports it for image classes that are not used here

from streaming import MDSWriter, StreamingDataLoader, StreamingDataset  # noqa: E402
from streaming.base.util import clean_stale_shared_memory  # noqa: E402

from benchmarks.readers import BATCH, Options  # noqa: E402
from benchmarks.readers.picture import decode  # noqa: E402
from benchmarks.readers.tars import samples  # noqa: E402

SETTINGS = "MDS of about 1,000 samples a shard, no compression, shuffle=True (py1e), batch_size given to the data set; resume by state_dict"


def prepare(tars: Path, folder: Path) -> None:
    """Write the samples as MDS, a shard for about each tar."""
    files = list(tars.glob("*.tar"))
    size_limit = sum(path.stat().st_size for path in files) // len(files)
    with MDSWriter(out=str(folder), columns={"key": "str", "jpg": "bytes"}, size_limit=size_limit) as writer:
        for key, data in samples(tars):
            writer.write({"key": key, "jpg": data})


class Decoded(StreamingDataset):
    """Samples with their image decoded."""

    def __getitem__(self, index: int) -> tuple[str, np.ndarray]:
        """Return (key, image)."""
        sample = super().__getitem__(index)
        return sample["key"], decode(sample["jpg"])


def stack(found: list[tuple[str, np.ndarray]]) -> tuple[list[str], torch.Tensor]:
    """Stack decoded samples."""
    return [key for key, _ in found], torch.from_numpy(np.stack([image for _, image in found]))


class Reader:
    """One epoch."""

    def __init__(self, options: Options) -> None:
        if options.rank == 0 and options.size == 1:
            clean_stale_shared_memory()
        dataset = Decoded(local=str(options.folder), shuffle=True, shuffle_seed=0, batch_size=BATCH, num_canonical_nodes=1)
        self.loader = StreamingDataLoader(dataset, batch_size=BATCH, num_workers=options.workers, collate_fn=stack)
        if options.state is not None:
            self.loader.load_state_dict(options.state)

    def __iter__(self) -> Iterator[tuple[list[str], Any]]:
        """Yield (keys, images)."""
        yield from self.loader

    def state(self) -> Any:
        """Return its state."""
        return self.loader.state_dict()
