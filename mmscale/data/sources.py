"""From the `data` section of a stage file to a data set: one folder, or a mixture of several."""

from __future__ import annotations

from collections.abc import Sequence

from mmscale.config import RunConfig
from mmscale.data.dataset import ShardDataset
from mmscale.data_config import DataConfig, SourceConfig, mixture_sources, source_name
from shards.errors import ConfigError
from shards.joined import JoinedReader
from shards.mixture import MixedOrder, Phase
from shards.order import GlobalOrder
from shards.read import ShardReader


def open_training_data(config: RunConfig) -> ShardDataset:
    """Open what a stage trains on, in its order.

    Raises:
        ConfigError: weights that do not fit the sources.
        ShardError: there is no finished data set at a path.
    """
    data, seed, size = config.data, config.train.seed, config.model.image_size
    sources = mixture_sources(data)
    if sources is None:
        reader = ShardReader(data.shards, store=config.store)
        return ShardDataset.over(reader, _order(reader, data, seed), size)
    readers = [ShardReader(source.path, store=config.store) for source in sources]
    weights = source_weights(sources, [len(reader) for reader in readers], data.temperature)
    phases = _phases(weights, data.weights_from, config.train.global_batch)
    mixed = MixedOrder([_order(reader, data, seed) for reader in readers], phases, seed)
    return ShardDataset.over(JoinedReader(readers, [source_name(source) for source in sources]), mixed, size)


def source_weights(sources: Sequence[SourceConfig], rows: Sequence[int], temperature: float) -> tuple[float, ...]:
    """Weigh the sources: as given, by epochs times rows, or by rows ** (1 / temperature) (Conneau and Lample 2019, section 3.1).

    Args:
        sources: of the mixture.
        rows: samples of each.
        temperature: 1 is by size.

    Raises:
        ConfigError: a temperature or a number that is not above 0.
    """
    if temperature <= 0:
        raise ConfigError(f"`data.temperature` must be above 0; got {temperature}.")
    for source in sources:
        if min(x for x in (source.weight, source.epochs, 0.0) if x is not None) < 0:
            raise ConfigError(f"`data.shards`: weight and epochs of {source_name(source)!r} must be at least 0; got {source}.")
    if sources[0].weight is not None:
        return tuple(float(source.weight or 0) for source in sources)
    if sources[0].epochs is not None:
        return tuple((source.epochs or 0) * count for source, count in zip(sources, rows, strict=True))
    return tuple(count ** (1 / temperature) for count in rows)


def describe_sources(dataset: ShardDataset, samples: int) -> list[str]:
    """Render a mixture, a line a source: how many of its samples a run of so many sees, and how often. Nothing for one data set."""
    if not isinstance(dataset.order, MixedOrder) or not isinstance(dataset.reader, JoinedReader):
        return []
    seen_k = dataset.order.consumed(samples)
    return [
        f"source      {name}: {rows:,} samples, {seen:,} seen ({seen / samples:.1%} of the run), {seen / rows:.2f} epochs"
        for name, rows, seen in zip(dataset.reader.names, dataset.order.rows_k.tolist(), seen_k.tolist(), strict=True)
    ]


def _order(reader: ShardReader, data: DataConfig, seed: int) -> GlobalOrder:
    return GlobalOrder(reader.rows_per_shard, seed, lanes=data.order.lanes, block=data.order.block)


def _phases(first: tuple[float, ...], later: dict[int, list[float]], global_batch: int) -> list[Phase]:
    by_step = {0: first} | {int(step): tuple(weights) for step, weights in later.items()}
    if min(by_step) < 0:
        raise ConfigError(f"`data.weights_from`: a step must be at least 0; got {min(by_step)}.")
    return [Phase(step * global_batch, by_step[step]) for step in sorted(by_step)]
