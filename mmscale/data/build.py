"""Places to a micro-batch: threads decode straight into the batch's memory, the last one to finish assembles it."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmscale.data.arena import Bytes
from mmscale.data.batch import Batch
from mmscale.data.collate import Collator
from mmscale.data.dataset import Place, ShardDataset
from mmscale.data.example import Example
from mmscale.data.packing import ALIGNMENT
from mmscale.data.statistics import READ_TOGETHER, Work
from shards.errors import ConfigError

Quarantined = tuple[int, str, str]
"""(position, key, error) of a sample that does not decode."""


@dataclass(slots=True)
class Micro:
    """A micro-batch and what was wrong in it."""

    batch: Batch
    quarantined: list[Quarantined] = field(default_factory=list)
    work: Work = field(default_factory=Work)


class Builder:
    """Reads micro-batches of a data set for a collator. Picklable.

    Args:
        dataset: what is read.
        collator: what becomes of it.
    """

    def __init__(self, dataset: ShardDataset, collator: Collator) -> None:
        if dataset.image_size != collator.image_size:
            raise ConfigError(
                f"The data set decodes images of size {dataset.image_size} and the batch wants {collator.image_size}. "
                "Open it as ShardDataset(..., image_size=model.image_size)."
            )
        self.dataset = dataset
        self.collator = collator

    def pixel_bytes(self, samples: int) -> int:
        """Bytes that the images of a micro-batch take at most."""
        return samples * self.collator.image_size**2 * 3 if self.collator.takes_squares else 0

    def regions(self, samples: int, arena: Bytes) -> dict[str, NDArray[Any]]:
        """The parts of an arena that patches of each modality are decoded into, behind the pixels: (samples, max_patches, values)."""
        begin, found = self.pixel_bytes(samples), {}
        for name, modality in self.collator.modalities.items():
            begin = -(-begin // ALIGNMENT) * ALIGNMENT
            shape, dtype = (samples, modality.max_patches, modality.values), np.dtype(modality.dtype)
            end = begin + int(np.prod(shape)) * dtype.itemsize
            found[name] = arena[begin:end].view(dtype).reshape(shape)
            begin = end
        return found

    def decoded_bytes(self, samples: int) -> int:
        """Bytes that images and patches are decoded into."""
        sizes = [samples * m.max_patches * m.values * np.dtype(m.dtype).itemsize + ALIGNMENT for m in self.collator.modalities.values()]
        return self.pixel_bytes(samples) + sum(sizes)

    def arena_bytes(self, samples: int) -> int:
        """Bytes that a micro-batch takes at most, all tensors together."""
        return self.decoded_bytes(samples) + self.collator.batch_bytes(samples)

    def submit(self, pool: ThreadPoolExecutor, chunks: int, places: Sequence[Place], arena: Bytes) -> Job:
        """Start building on the threads of a pool.

        Args:
            pool: runs the chunks in the order of submission.
            chunks: how many parts the micro-batch is cut into.
            places: M of them, of `ShardDataset.places`.
            arena: uint8, at least `decoded_bytes(M)` of it; images and patches are decoded into it.
        """
        job = Job(self, places, arena)
        job.start(pool, chunks)
        return job


class Job:
    """A micro-batch under way."""

    def __init__(self, builder: Builder, places: Sequence[Place], arena: Bytes) -> None:
        side = builder.collator.image_size
        samples = len(places) if builder.collator.takes_squares else 0
        self.builder = builder
        self.places = places
        self.pixels_MHHC = arena[: builder.pixel_bytes(samples)].reshape(samples, side, side, 3)
        self.regions = builder.regions(len(places), arena)
        self.draws = builder.collator.augment_draws([position for position, _, _ in places])
        self.examples: list[Example | None] = [None] * len(places)
        self.futures: list[Future[Micro | None]] = []
        self.unfinished = 0
        self.work = Work()
        self.lock = threading.Lock()

    def start(self, pool: ThreadPoolExecutor, chunks: int) -> None:
        """Queue the chunks."""
        step = max(1, -(-len(self.places) // chunks))
        parts = [range(i, min(i + step, len(self.places))) for i in range(0, len(self.places), step)] or [range(0)]
        self.unfinished = len(parts)
        self.futures = [pool.submit(self._run, rows) for rows in parts]

    def done(self) -> bool:
        """Whether nobody would wait for it."""
        return all(future.done() for future in self.futures)

    def result(self) -> Micro:
        """Wait for the micro-batch.

        Raises:
            ShardError, IntegrityError: of the first sample, in order, that cannot be read.
        """
        return next(micro for micro in [f.result() for f in self.futures] if micro is not None)

    def error(self) -> BaseException | None:
        """Wait, and return the first exception, in order, instead of raising it."""
        return next((e for e in [f.exception() for f in self.futures] if e is not None), None)

    def _run(self, rows: range) -> Micro | None:
        for first in range(rows.start, rows.stop, READ_TOGETHER):
            self._fill(first, self.places[first : min(first + READ_TOGETHER, rows.stop)])
        with self.lock:
            self.unfinished -= 1
            is_last = self.unfinished == 0
        return self._assemble() if is_last else None

    def _fill(self, first: int, places: Sequence[Place]) -> None:
        """Read and decode the rows from `first` on."""
        dataset, collator = self.builder.dataset, self.builder.collator
        wants_image, clock = collator.takes_squares, time.perf_counter
        begin = clock()
        samples = [dataset.fetch(place) for place in places]
        read = clock()
        for row, (place, sample) in enumerate(zip(places, samples, strict=True), first):
            out = self.pixels_MHHC[row] if wants_image else None
            outs = {name: (collator.modalities[name], region[row]) for name, region in self.regions.items()}
            change = collator.change(self.draws[row])
            example = dataset.decode(place, sample, out, image=wants_image, modalities=outs, change=change)
            if out is not None and example.image is not None:
                collator.augment_into(out, self.draws[row])
            self.examples[row] = example
        done = Work.of(samples, read_s=read - begin, decode_s=clock() - read)
        with self.lock:
            self.work += done

    def _assemble(self) -> Micro:
        examples = [e for e in self.examples if e is not None]
        regions = {name: region.reshape(-1, region.shape[-1]) for name, region in self.regions.items()}
        batch = self.builder.collator.assemble(examples, self.pixels_MHHC, regions)
        return Micro(batch, [(e.position, e.key, e.error) for e in examples if e.error is not None], self.work)
