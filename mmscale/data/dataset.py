"""Shards as a plain torch data set over global positions. It needs nothing of the rest of mmscale: any DataLoader can read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from mmscale.data.decode import decode_image
from mmscale.data.example import Example, Patches
from mmscale.modalities.modality import Change, Modality
from shards.errors import SampleError, ShardError
from shards.joined import JoinedReader
from shards.mixture import MixedOrder
from shards.order import GlobalOrder
from shards.read import ShardReader
from shards.sample import Sample
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
        short_side: scale images to this short side and take their middle; None squeezes the whole image to the square.
        store: requests and the node's cache, for a URL.

    Attributes:
        reader: the samples by (shard, row).
        order: position to (epoch, shard, row).
        digest: the data set's version.
    """

    reader: ShardReader | JoinedReader
    order: GlobalOrder | MixedOrder
    short_side: int | None

    def __init__(
        self,
        path: str | Path,
        seed: int = 0,
        shuffle: bool = True,
        image_size: int | None = None,
        short_side: int | None = None,
        store: StoreConfig | None = None,
    ) -> None:
        """Open the folder.

        Raises:
            ShardError: there is no finished data set, or it is empty.
        """
        reader = ShardReader(path, store=store)
        if not len(reader):
            raise ShardError(
                f"The data set {str(path)!r} holds no rows: there is nothing to read. Look at it with `mmscale shards show`; where it is a "
                "version, its filter or split has left nothing."
            )
        self._set(reader, GlobalOrder(reader.rows_per_shard, seed, shuffle=shuffle), image_size)
        self.short_side = short_side

    @classmethod
    def over(cls, reader: ShardReader | JoinedReader, order: GlobalOrder | MixedOrder, image_size: int | None = None) -> ShardDataset:
        """Read what a reader has in another order than the default one; `mmscale.data.sources` opens mixtures this way."""
        dataset = cls.__new__(cls)
        dataset._set(reader, order, image_size)
        return dataset

    def _set(self, reader: ShardReader | JoinedReader, order: GlobalOrder | MixedOrder, image_size: int | None) -> None:
        self.reader = reader
        self.order = order
        self.image_size = image_size
        self.short_side = None
        self.digest = reader.digest

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
        """Read and decode one sample: `fetch`, then `decode`. Threads may call these at once."""
        return self.decode(place, self.fetch(place), out, image=image)

    def fetch(self, place: Place) -> Sample:
        """Read one sample.

        Raises:
            ShardError, IntegrityError: it cannot be read, or not as it was written.
        """
        _, shard, row = place
        return self.reader[shard, row]

    def decode(
        self,
        place: Place,
        sample: Sample,
        out: NDArray[np.uint8] | None = None,
        *,
        image: bool = True,
        modalities: Mapping[str, tuple[Modality, NDArray[Any]]] | None = None,
        change: Change | None = None,
    ) -> Example:
        """Decode the sample of a place.

        Args:
            place: of `places`.
            sample: what lies there.
            out: (image_size, image_size, 3) uint8 that the image is decoded into.
            image: False leaves the image undecoded and out.
            modalities: those that are read, by name, each with the memory its patches are written into.
            change: augmentation of the modalities' parts; None for none.

        Returns:
            The sample; one that does not decode comes with weight 0 and its error.
        """
        position = place[0]
        try:
            part = sample.image() if image else None
            pixels = None if part is None else decode_image(
                *part, self.image_size, short_side=self.short_side, key=sample.key, out=out
            )
            items = {}
            for name, (modality, out_PC) in (modalities or {}).items():
                grid = modality.read(sample, out_PC, change or Change())
                if grid is not None:
                    items[name] = Patches(out_PC[: grid[0] * grid[1] * grid[2]], grid)
            return Example(position, sample.key, 1.0, pixels, sample.captions(), sample.fields(), items=items)
        except SampleError as e:
            return Example(position, sample.key, weight=0.0, error=f"{e.reason}: {e.detail}")
