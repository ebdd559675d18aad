"""Batches of decoded images from a shards folder, for anybody's training loop: numpy arrays, neither torch nor a model's config needed.

Threads of the process decode straight into the batch's memory: the decoders release the interpreter's lock, so no process is started,
nothing is pickled and nothing is copied.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmscale.data.arena import ArenaPool, Bytes, page_locked, pageable
from mmscale.data.decode import decode_image
from mmscale.data.statistics import LOCATED_TOGETHER, READ_TOGETHER, LoaderStatistics, StoreMeter, Work
from shards.errors import ConfigError, SampleError
from shards.order import GlobalOrder
from shards.read import ShardReader
from shards.sample import Sample



@dataclass(slots=True)
class ImageBatch:
    """Samples of one batch; row i of everything belongs to sample i."""

    images: NDArray[np.uint8]
    """(N, size, size, 3) uint8 RGB; black where a sample has no image or one that does not decode. `torch.from_numpy` copies nothing."""
    positions: NDArray[np.int64]
    """(N,) global positions."""
    samples: list[Sample]
    """Key and parts of each sample, the image left out: `captions()` and `fields()` parse when they are called."""
    samples_seen: int
    """Samples that all ranks have consumed once this batch is."""
    errors: dict[int, str] = field(default_factory=dict)
    """Row -> why it has no image."""

    @property
    def keys(self) -> list[str]:
        """Keys of the samples."""
        return [sample.key for sample in self.samples]


class ImageBatches:
    """Iterates over batches of images from where it stands to the end of the epoch; iterating again reads the next epoch.

    Positions count samples over all epochs; global batch b holds `batch_size * size` of them and rank r the r-th `batch_size` of these.
    The last batch of an epoch is short (on some ranks perhaps empty): every sample comes exactly once an epoch, and all ranks yield the
    same number of batches. Its whole state is one integer, `samples_seen`, which any number of ranks and threads may go on from.

    Args:
        path: folder written or indexed by `mmscale shards`.
        batch_size: samples a rank gets at once.
        image_size: side of the images in pixels.
        short_side: the image is scaled to this short side and its middle taken; None squeezes the whole image to a square.
        seed: of the order.
        shuffle: False gives the rows of the manifest in order.
        rank: of this process.
        size: ranks.
        samples_seen: samples consumed so far; the first position read.
        threads: how many decode at a time.
        prefetch: batches held ready.
        pin: decode into page-locked memory, for `.to("cuda", non_blocking=True)`; this takes torch.

    Raises:
        ConfigError: sizes that do not fit together.
        ShardError: there is no finished data set.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        batch_size: int = 64,
        image_size: int = 224,
        short_side: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        size: int = 1,
        samples_seen: int = 0,
        threads: int = 2,
        prefetch: int = 2,
        pin: bool = False,
    ) -> None:
        _check(batch_size=batch_size, image_size=image_size, size=size, threads=threads, prefetch=prefetch)
        if short_side is not None and short_side < image_size:
            raise ConfigError(f"`short_side` must be at least `image_size` = {image_size}; got {short_side}.")
        if samples_seen < 0:
            raise ConfigError(f"`samples_seen` must be at least 0; got {samples_seen}.")
        if not 0 <= rank < size:
            raise ConfigError(f"`rank` must be in [0, {size}) for {size} ranks; got {rank}.")
        self.reader = ShardReader(path)
        self.order = GlobalOrder(self.reader.rows_per_shard, seed, shuffle=shuffle)
        self.batch_size, self.image_size, self.short_side = batch_size, image_size, short_side
        self.rank, self.size = rank, size
        self.samples_seen = samples_seen
        self.threads, self.prefetch, self.pin = threads, prefetch, pin
        self._work = Work()
        self._meter = StoreMeter(self.reader)
        self._wait_s = 0.0
        self._jobs: deque[_Job] = deque()

    def __len__(self) -> int:
        """Batches to the end of the epoch."""
        return -(-(self.order.rows - self.samples_seen % self.order.rows) // (self.batch_size * self.size))

    def __iter__(self) -> Iterator[ImageBatch]:
        """Start reading ahead, and yield the batches of the rest of the epoch.

        Raises:
            ShardError, IntegrityError: a sample cannot be read, or not as it was written.
        """
        arenas = ArenaPool(self.batch_size * self.image_size**2 * 3, allocate=page_locked if self.pin else pageable)
        jobs = self._jobs = deque()
        with ThreadPoolExecutor(self.threads, thread_name_prefix="mmscale-decode") as pool:
            try:
                for positions, places, seen in self._located():
                    jobs.append(_Job(self, pool, positions, places, seen, arenas.lend(arenas.take())))
                    if len(jobs) > self.prefetch:
                        yield self._finish(jobs.popleft())
                while jobs:
                    yield self._finish(jobs.popleft())
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
                jobs.clear()
                arenas.close()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resume needs: the samples seen, and the fingerprint of the order that they are counted in."""
        return {"samples_seen": self.samples_seen, "order": self.order.fingerprint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken, with any number of ranks and threads and any batch size.

        Raises:
            ConfigError: it was taken over another data set, or with another seed or shuffle.
        """
        if state["order"] != self.order.fingerprint():
            raise ConfigError(
                f"The saved state belongs to another order than that of {str(self.reader.path)!r} with seed {self.order.seed}: "
                "the data set, `seed` or `shuffle` differs. Open what it was saved with, or start from samples_seen=0."
            )
        self.samples_seen = int(state["samples_seen"])

    def statistics(self) -> LoaderStatistics:
        """Return a snapshot of what was read so far and how long it took."""
        return LoaderStatistics.of(self._work, wait_s=self._wait_s, ready=sum(job.done() for job in list(self._jobs)))

    def _ranges(self) -> Iterator[tuple[int, int, int]]:
        """Yield (begin, end, samples seen after it) of this rank's batches to the end of the epoch."""
        step = self.batch_size * self.size
        stop = (self.samples_seen // self.order.rows + 1) * self.order.rows
        for start in range(self.samples_seen, stop, step):
            begin = min(start + self.rank * self.batch_size, stop)
            yield begin, min(begin + self.batch_size, stop), min(start + step, stop)

    def _located(self) -> Iterator[tuple[NDArray[np.int64], list[tuple[int, int]], int]]:
        """Yield (positions, their (shard, row), samples seen after it) of each batch, several located at once."""
        ranges = self._ranges()
        while group := list(islice(ranges, LOCATED_TOGETHER)):
            positions = np.concatenate([np.arange(begin, end) for begin, end, _ in group])
            _, shards, rows = self.order.locate(positions)
            places = list(zip(shards.tolist(), rows.tolist(), strict=True))
            first = 0
            for begin, end, seen in group:
                last = first + end - begin
                yield positions[first:last], places[first:last], seen
                first = last

    def _finish(self, job: _Job) -> ImageBatch:
        begin = time.perf_counter()
        batch = job.result()
        self._wait_s += time.perf_counter() - begin
        job.work.store = self._meter.take()
        self._work += job.work
        self.samples_seen = batch.samples_seen
        return batch


class _Job:
    """One batch under way, its rows divided among the threads."""

    def __init__(
        self,
        batches: ImageBatches,
        pool: ThreadPoolExecutor,
        positions: NDArray[np.int64],
        places: Sequence[tuple[int, int]],
        seen: int,
        arena: Bytes,
    ) -> None:
        self.batches, self.seen, self.work = batches, seen, Work()
        side, count = batches.image_size, len(positions)
        self.images = arena[: count * side * side * 3].reshape(count, side, side, 3)
        self.positions, self.places = positions, places
        self.samples: list[Sample | None] = [None] * count
        self.errors: dict[int, str] = {}
        self.lock = threading.Lock()
        step = max(1, -(-count // batches.threads))
        self.futures: list[Future[None]] = [pool.submit(self._run, range(i, min(i + step, count))) for i in range(0, count, step)]

    def done(self) -> bool:
        """Whether nobody would wait for it."""
        return all(future.done() for future in self.futures)

    def result(self) -> ImageBatch:
        """Wait for the batch; what went wrong in a thread is raised here, the first sample's error first."""
        for future in self.futures:
            future.result()
        samples = [sample for sample in self.samples if sample is not None]
        return ImageBatch(self.images, self.positions, samples, self.seen, self.errors)

    def _run(self, rows: range) -> None:
        clock, reader = time.perf_counter, self.batches.reader
        for first in range(rows.start, rows.stop, READ_TOGETHER):
            block = range(first, min(first + READ_TOGETHER, rows.stop))
            begin = clock()
            samples = [reader[self.places[row]] for row in block]
            read = clock()
            for row, sample in zip(block, samples, strict=True):
                self._decode(row, sample)
            done = Work.of(samples, read_s=read - begin, decode_s=clock() - read)
            with self.lock:
                self.work += done

    def _decode(self, row: int, sample: Sample) -> None:
        found = sample.image()
        try:
            if found is None:
                raise SampleError(sample.key, "no_image", "the sample has no image part")
            size, short_side = self.batches.image_size, self.batches.short_side
            decode_image(*found, size, short_side=short_side, key=sample.key, out=self.images[row])
        except SampleError as e:
            self.images[row] = 0
            self.errors[row] = f"{e.reason}: {e.detail}"
        # the encoded image would weigh on whoever keeps the batch
        data = None if found is None else found[1]
        self.samples[row] = Sample(sample.key, {ext: part for ext, part in sample.parts.items() if part is not data})


def _check(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise ConfigError(f"`{name}` must be at least 1; got {value}.")
