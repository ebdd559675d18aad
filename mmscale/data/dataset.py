"""Shards as a plain torch data set over global positions. It needs nothing of the rest of mmscale: any DataLoader can read it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from mmscale.data.decode import decode_image
from mmscale.data.example import Example
from shards.errors import SampleError
from shards.order import GlobalOrder
from shards.read import ShardReader
from shards.store.config import StoreConfig

Place = tuple[int, int, int]
"""(position, shard, row)."""


class ShardDataset(Dataset[Example]):
    """Samples of a shards folder by global position.

    Positions go on past `len`: epochs run on into each other, each shuffled anew. What the order is depends on the data set, the
    seed and nothing else.

    Args:
        path: folder or URL written or indexed by `mmscale shards`.
        seed: of the order.
        shuffle: False gives the rows of the manifest in order, for evaluation.
        image_size: side of the decoded images in pixels; None keeps each image's own.
        store: requests and the node's cache, for a URL.

    Attributes:
        reader: the samples by (shard, row).
        order: position to (epoch, shard, row).
        digest: the data set's version.
    """

    def __init__(
        self, path: str | Path, seed: int = 0, shuffle: bool = True, image_size: int | None = None, store: StoreConfig | None = None
    ) -> None:
        """Open the folder.

        Raises:
            ShardError: there is no finished data set.
        """
        self.reader = ShardReader(path, store=store)
        self.order = GlobalOrder(self.reader.rows_per_shard, seed, shuffle=shuffle)
        self.image_size = image_size
        self.digest = self.reader.manifest.digest

    def __len__(self) -> int:
        """Rows of one epoch."""
        return len(self.reader)

    def __getitem__(self, position: int) -> Example:
        """Read the sample at a global position.

        Raises:
            IndexError: a negative position.
            ShardError, IntegrityError: it cannot be read, or not as it was written.
        """
        return self.read(self.places([position])[0])

    def __getitems__(self, positions: Sequence[int]) -> list[Example]:
        """Read several samples; DataLoader calls this by name."""
        return [self.read(place) for place in self.places(positions)]

    def places(self, positions: Sequence[int] | NDArray[np.int64]) -> list[Place]:
        """Locate positions, all at once."""
        wanted = np.asarray(positions, dtype=np.int64)
        if wanted.size and wanted.min() < 0:
            raise IndexError(f"positions begin at 0; got {wanted.min()}")
        _, shards, rows = self.order.locate(wanted)
        return list(zip(wanted.tolist(), shards.tolist(), rows.tolist(), strict=True))

    def read(self, place: Place, out: NDArray[np.uint8] | None = None, *, image: bool = True) -> Example:
        """Read and decode one sample. Threads may call this at once.

        Args:
            place: of `places`.
            out: (image_size, image_size, 3) uint8 that the image is decoded into.
            image: False leaves the image undecoded and out.

        Returns:
            The sample; one that does not decode comes with weight 0 and its error.

        Raises:
            ShardError, IntegrityError: it cannot be read, or not as it was written.
        """
        position, shard, row = place
        sample = self.reader[shard, row]
        try:
            part = sample.image() if image else None
            pixels = None if part is None else decode_image(*part, self.image_size, key=sample.key, out=out)
            return Example(position, sample.key, 1.0, pixels, sample.captions(), sample.fields())
        except SampleError as e:
            return Example(position, sample.key, weight=0.0, error=f"{e.reason}: {e.detail}")
