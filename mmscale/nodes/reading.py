"""What a node reads from where the shards lie, and what the steps need of it."""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from mmscale.config import RunConfig
from mmscale.data_config import training_places
from mmscale.run_folder import RunFolder, read_lines
from mmscale.world import resolve_precision
from shards.open_shard import stored
from shards.read import ShardReader
from shards.store.base import Tar

SECONDS = 1.0
READERS = 4
CHUNK_BYTES = 4 * 2**20
MOST_BYTES = 256 * 2**20
"""Of a shard."""
VOCABULARY = 30_522
"""Rows of the word table where it does not matter: BERT's."""
MOST_MFU = 0.6
"""Above what any published run of such models reaches, so that what it needs is not underestimated."""


def read_bytes_s(config: RunConfig, node: int) -> float:
    """Bytes a second that a few threads read from shards that are in no cache of ours, for about a second.

    Args:
        config: the stage.
        node: which one of the nodes, so that each reads other shards.
    """
    where = training_places(config.data)
    reader = ShardReader(where[node % len(where)], check_files=False, store=replace(config.store, cache=None))
    shards = [(node * READERS + number) % len(reader.manifest.shards) for number in range(READERS)]
    infos = [reader.manifest.shards[shard] for shard in dict.fromkeys(shards)]
    tars = [(reader.store_at(info.location).tar(stored(info)[0]), info.bytes) for info in infos]
    for tar, size in tars:
        tar.distrust(0, size)  # else what the system has kept would be measured
    start = time.perf_counter()
    with ThreadPoolExecutor(len(tars)) as pool:
        counts = list(pool.map(lambda opened: _read(opened[0], opened[1], start + SECONDS), tars))
    return sum(counts) / max(1e-6, time.perf_counter() - start)


def needed_bytes_s(config: RunConfig, size: int, device: torch.device) -> tuple[float, str] | None:
    """Bytes a second that all ranks together read in training, and where the figure is from; None where it is not known yet.

    Args:
        config: the stage.
        size: number of ranks.
        device: of a rank.
    """
    manifests = [ShardReader(place, check_files=False, store=config.store).manifest for place in training_places(config.data)]
    a_sample = sum(manifest.bytes for manifest in manifests) / max(1, sum(manifest.rows for manifest in manifests))
    newest = deque(read_lines(RunFolder(Path(config.run)).metrics), maxlen=1)
    if newest and newest[0].get("samples_per_s"):
        return newest[0]["samples_per_s"] * a_sample, "as the run has taken"
    if device.type == "cpu":
        return None
    from mmscale.flops import peak_flops

    peak = peak_flops(device, resolve_precision(config.train.precision, device))
    return None if peak is None else (size * peak * MOST_MFU / sample_flops(config) * a_sample, f"at {MOST_MFU:.0%} of the devices' peak")


def sample_flops(config: RunConfig) -> float:
    """Operations of forward and backward of a sample whose texts are as long as they may be.

    The model's modules are loaded here, which takes as long as the rest of a check: only where the figure is needed.
    """
    from mmscale.backward import Backward
    from mmscale.flops import training_flops
    from mmscale.outline import Typical, outline

    trainee = outline(config, VOCABULARY, len(config.data.labels or ()))
    counts = Typical.of(config, trainee, config.data.max_text_tokens).counts(64)
    return training_flops(trainee.model.config, counts, Backward.of(trainee.model)) / 64


def _read(tar: Tar, size: int, until: float) -> int:
    count = 0
    while count < min(size, MOST_BYTES) and time.perf_counter() < until:
        count += len(tar.read(count, min(CHUNK_BYTES, size - count)))
    return count
