"""The batches of a run, step by step. Its whole state is one integer: the samples seen."""

from __future__ import annotations

import time
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice, repeat
from types import TracebackType

import torch

from mmscale.data.batch import Batch
from mmscale.data.build import Builder, Micro, Quarantined
from mmscale.data.collate import Collator
from mmscale.data.dataset import Place, ShardDataset
from mmscale.data.forecast import Forecast
from mmscale.data.feed import Feed, ThreadFeed
from mmscale.data.starting import StartingFeed
from mmscale.data.statistics import LOCATED_TOGETHER, LoaderStatistics, Work
from mmscale.data.transfer import Arriving, Transfer
from shards.errors import ConfigError

EXPECT_EVERY = 16
"""Steps between two words to the cache about what comes next."""


@dataclass(slots=True)
class StepBatch:
    """What one rank trains on in one step."""

    step: int
    """Steps done before this one."""
    samples_seen_after: int
    """Samples consumed by all ranks when this step is done."""
    micro: list[Batch]
    """One micro-batch for each accumulation step, on the device."""
    host: list[Batch]
    """The same before they were copied to the device; on a CPU the very same."""
    wait_s: float
    """Seconds that whoever iterates waited for it."""
    quarantined: list[Quarantined]
    """(position, key, error) of this rank's samples that do not decode; they are rows of weight 0."""
    work: Work
    """What reading and decoding them took."""
    ready: int
    """Micro-batches that lay finished behind this step when it was handed out."""

    @property
    def positions(self) -> list[int]:
        """This rank's global positions, in order."""
        return [p for batch in self.host for p in batch.positions_M.tolist()]

    @property
    def keys(self) -> list[str]:
        """Their samples' keys."""
        return [key for batch in self.host for key in batch.keys]


class StepLoader:
    """Iterates over the steps of a run from where it stands; use it as a context manager, or close it.

    Step t of the run holds the B positions from `t * B`, lane by lane of the order; micro-step a of rank r takes places
    `(a * R + r) * M + [0, M)` among them. Batches are the same bit for bit whatever `workers`, `threads` and `prefetch` are.

    Args:
        dataset: what is read.
        collator: what becomes of it.
        global_batch: B, samples a step.
        micro_batch: M, samples a rank takes at once.
        rank: r of this process.
        size: R, ranks.
        samples_seen: samples that the run has consumed; the first position read.
        steps: steps of the whole run; iteration ends there.
        workers: worker processes; 0 decodes in threads of this process.
        threads: decode threads, in each worker where there are workers.
        prefetch: micro-batches held ready, of each worker where there are workers.
        consecutive: share out positions in their own order, for losses over groups of consecutive positions. A rank of a large data set
            then reads from all over it.
        device: where the batches go.

    Raises:
        ConfigError: a global batch that does not divide.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        collator: Collator,
        *,
        global_batch: int,
        micro_batch: int,
        rank: int,
        size: int,
        samples_seen: int = 0,
        steps: int,
        workers: int = 0,
        threads: int = 1,
        prefetch: int = 4,
        consecutive: bool = False,
        device: torch.device | None = None,
    ) -> None:
        if global_batch % (micro_batch * size):
            raise ConfigError(
                f"`train.global_batch` must divide by micro_batch x ranks = {micro_batch} x {size} = {micro_batch * size}; "
                f"got {global_batch}."
            )
        self.builder = Builder(dataset, collator)
        self.global_batch, self.micro_batch, self.rank, self.size = global_batch, micro_batch, rank, size
        self.samples_seen, self.steps = samples_seen, steps
        self.workers, self.threads, self.prefetch = workers, threads, max(1, prefetch)
        self.order = None if consecutive else dataset.order
        self.device = device or torch.device("cpu")
        self.transfer = Transfer(self.device)
        self.feed: Feed | None = None
        self._work, self._wait_s = Work(), 0.0

    def positions(self, start: int) -> list[Sequence[int]]:
        """Return this rank's positions of the step whose first position is `start`, M of them a micro-step."""
        places = range(start, start + self.global_batch) if self.order is None else self.order.by_lane(start, self.global_batch).tolist()
        return share(places, self.micro_batch, self.rank, self.size)

    def __iter__(self) -> Iterator[StepBatch]:
        """Start reading ahead, and yield the steps."""
        self.close()
        first = self.samples_seen // self.global_batch
        starts = [self.samples_seen + i * self.global_batch for i in range(max(0, self.steps - first))]
        self.feed = feed = open_feed(self.builder, self.micro_batch, self.workers, self.threads, self.device)
        upcoming = self._follow(starts)
        wanted = located(self.builder.dataset, chain.from_iterable(map(self.positions, starts)))
        batches = read_ahead(feed, wanted, self.prefetch * max(1, self.workers))
        try:
            yield from self._steps(first, starts, upcoming, batches)
        finally:
            self.close()

    def _steps(self, first: int, starts: Sequence[int], upcoming: Iterator[None], batches: Iterator[Micro]) -> Iterator[StepBatch]:
        """Yield the steps; on an accelerator the next one sets out for it before this one is computed, if it lies ready."""
        ahead: tuple[StepBatch, Arriving] | None = None
        micros = self.global_batch // (self.micro_batch * self.size)
        for i, start in enumerate(starts):
            if ahead is None:
                next(upcoming)
            step, arriving = ahead or self._step(first + i, start, batches)
            ahead = None
            step.micro = arriving.arrived()
            if self.transfer.ahead and i + 1 < len(starts) and self.feed is not None and self.feed.ready() >= micros:
                next(upcoming)
                ahead = self._step(first + i + 1, starts[i + 1], batches)
            yield step

    def statistics(self) -> LoaderStatistics:
        """Return a snapshot of what was read so far, how long it took, and how many micro-batches lie ready."""
        return LoaderStatistics.of(self._work, wait_s=self._wait_s, ready=self.feed.ready() if self.feed else 0)

    def _follow(self, starts: Sequence[int]) -> Iterator[None]:
        """Tell the cache of the node, now and then, what this rank will read; once a step, before its batch is waited for."""
        dataset = self.builder.dataset
        if not dataset.reader.is_cached:
            yield from repeat(None)
        forecast = Forecast(dataset.order, map(self.positions, starts))
        for step in count():
            if step % EXPECT_EVERY == 0:
                dataset.reader.expect(forecast.upcoming())
            yield None
            forecast.advance()

    def close(self) -> None:
        """End every thread and process; the batches handed out stay good."""
        feed, self.feed = self.feed, None
        if feed is not None:
            feed.close()

    def __enter__(self) -> StepLoader:
        """Return itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close."""
        self.close()

    def _step(self, step: int, start: int, batches: Iterator[Micro]) -> tuple[StepBatch, Arriving]:
        begin = time.perf_counter()
        found = list(islice(batches, self.global_batch // (self.micro_batch * self.size)))
        host = [m.batch for m in found]
        arriving = self.transfer.start(host)
        wait_s = time.perf_counter() - begin
        work = Work()
        for m in found:
            work += m.work
        self._wait_s += wait_s
        self._work += work
        quarantined = [q for m in found for q in m.quarantined]
        ready = self.feed.ready() if self.feed else 0
        return StepBatch(step, start + self.global_batch, arriving.batches, host, wait_s, quarantined, work, ready), arriving


def share(places: Sequence[int], micro_batch: int, rank: int, size: int) -> list[Sequence[int]]:
    """Return a rank's part of a step's positions: places `(a * size + rank) * micro_batch + [0, micro_batch)` for each micro-step a."""
    firsts = range(rank * micro_batch, len(places), size * micro_batch)
    return [places[first : first + micro_batch] for first in firsts]


def open_feed(builder: Builder, samples: int, workers: int, threads: int, device: torch.device) -> Feed:
    """Choose between threads of this process and worker processes."""
    pin = device.type == "cuda"
    if workers:
        return StartingFeed(builder, samples=samples, workers=workers, threads=threads, pin=pin)
    return ThreadFeed(builder, samples=samples, threads=threads, pin=pin)


def located(dataset: ShardDataset, wanted: Iterable[Sequence[int]]) -> Iterator[list[Place]]:
    """Find where the positions of micro-batches lie, those of several at once."""
    waiting = iter(wanted)
    while group := list(islice(waiting, LOCATED_TOGETHER)):
        places = iter(dataset.places([position for positions in group for position in positions]))
        for positions in group:
            yield list(islice(places, len(positions)))


def read_ahead(feed: Feed, wanted: Iterator[Sequence[Place]], depth: int) -> Iterator[Micro]:
    """Yield a micro-batch for each run of places, with so many asked for ahead."""
    asked = 0
    for places in islice(wanted, depth):
        feed.submit(places)
        asked += 1
    while asked:
        micro = feed.take()
        asked -= 1
        for places in islice(wanted, 1):
            feed.submit(places)
            asked += 1
        yield micro


def evaluation_batches(
    dataset: ShardDataset,
    collator: Collator,
    *,
    samples: int,
    batch: int,
    rank: int,
    size: int,
    threads: int = 1,
    prefetch: int = 2,
    device: torch.device | None = None,
    skip: Container[int] = (),
) -> Iterator[tuple[int, Batch, list[Quarantined]]]:
    """Yield this rank's share of the first samples of a data set, for evaluation.

    Ranks take turns by `batch` positions. Every rank yields the same number of batches, the last ones short or empty where there is
    nothing left, so that a model which all ranks must call together can be evaluated. A sample that does not decode is a row of weight 0.

    Args:
        dataset: opened with `shuffle=False`.
        collator: built with `training=False`.
        samples: how many; at most the whole data set.
        batch: samples a rank takes at once.
        rank: of this process.
        size: ranks.
        threads: decode threads.
        prefetch: batches read ahead.
        device: where the batches go.
        skip: numbers of the batches that are left out.

    Yields:
        The number of each batch of this rank, from 0, the batch, and what of it did not decode.
    """
    device = device or torch.device("cpu")
    total = min(samples, len(dataset))
    firsts = {n: start + rank * batch for n, start in enumerate(range(0, total, batch * size)) if n not in skip}
    feed = open_feed(Builder(dataset, collator), batch, 0, threads, device)
    try:
        wanted = located(dataset, (range(min(f, total), min(f + batch, total)) for f in firsts.values()))
        for number, micro in zip(firsts, read_ahead(feed, wanted, prefetch), strict=True):
            yield number, micro.batch.to(device), micro.quarantined
    finally:
        feed.close()
