"""The global order at scale, on paper: what it costs, what a node has to fetch, and how well it shuffles.

    python benchmarks/order.py [--shards 1000000] [--rows 10000] [--ranks 16384] [--batch 32768] [--steps 4000]
                               [--out benchmarks/results/order.json]

Nothing is read: the data set is a list of row counts. Steps are shared out as the trainer does, lane by lane; some nodes are followed
through all steps, each with a cache that evicts the shard that is needed last. `amplification` is what the nodes fetch over the bytes of
the samples they use. Shuffle quality is measured against a true permutation: how many shards the first samples come from, and, where
every shard has a random number that all its rows share (the worst case: shards that are each all of one kind), how far means of batches are
from the mean of all, in units of what they are in a true permutation, and how much of that stays from one batch to the next.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmscale.data.loader import share
from shards.order import GlobalOrder, Ints

SHARD_BYTES = 500_000_000
"""Of a shard of 10,000 samples of 50 kB."""
LOCATED = 32_768
STRETCHES, BATCHES = 20, 10
"""Places of the epoch that shuffling is judged at, and consecutive batches at each."""


def measure_cost(rows: list[int], seed: int) -> tuple[GlobalOrder, dict[str, float]]:
    """Seconds and bytes of an order: made, its first epoch laid out, positions located."""
    before = resident_bytes()
    start = time.perf_counter()
    order = GlobalOrder(rows, seed)
    order.locate([0])
    made = time.perf_counter() - start
    start = time.perf_counter()
    order.locate(np.arange(order.rows // 2, order.rows // 2 + LOCATED))
    located = time.perf_counter() - start
    start = time.perf_counter()
    order.by_lane(0, LOCATED)
    shared = time.perf_counter() - start
    return order, {
        "set_up_s": made,
        f"locate_{LOCATED}_s": located,
        f"by_lane_{LOCATED}_s": shared,
        "memory_bytes": resident_bytes() - before,
        "lanes": order.lanes,
        "block": order.block,
    }


def follow_nodes(order: GlobalOrder, words: argparse.Namespace, by_lane: bool) -> dict[str, Any]:
    """Follow some nodes through all steps: the shards they need, and what their caches fetch."""
    micro, nodes = words.batch // words.ranks, words.ranks // words.ranks_per_node
    chosen = np.linspace(0, nodes - 1, words.nodes).astype(int)
    needed: list[Ints] = []
    for step in range(words.steps):
        first = words.start * order.rows // 100 + step * words.batch
        places = order.by_lane(first, words.batch) if by_lane else np.arange(first, first + words.batch)
        mine = [share(places, micro, int(rank), words.ranks) for rank in _ranks(chosen, words.ranks_per_node)]
        needed.append(order.locate(np.concatenate([p for part in mine for p in part]))[1])
    shards_TNP = np.stack(needed).reshape(words.steps, words.nodes, -1)
    shards_TRP = np.stack(needed).reshape(words.steps, words.nodes * words.ranks_per_node, -1)
    caches = {str(size): [cache_fetches(shards_TNP[:, node], size) for node in range(words.nodes)] for size in words.cache_shards}
    reads = shards_TNP[:, 0].size
    used_bytes = reads / words.rows * SHARD_BYTES
    return {
        "steps": words.steps,
        "samples_a_node": reads,
        "shards_a_rank": float(np.mean([len(np.unique(shards_TRP[:, rank])) for rank in range(shards_TRP.shape[1])])),
        "shards_a_node": float(np.mean([len(np.unique(shards_TNP[:, node])) for node in range(words.nodes)])),
        "shards_a_node_in_a_step": float(np.mean([len(np.unique(step)) for step in shards_TNP[:, 0]])),
        "caches": {
            size: {
                "hit_rate": 1 - float(np.mean(fetches)) / reads,
                "bytes_a_node": float(np.mean(fetches)) * SHARD_BYTES,
                "amplification": float(np.mean(fetches)) * SHARD_BYTES / used_bytes,
            }
            for size, fetches in caches.items()
        },
    }


def cache_fetches(shards_TP: Ints, size: int) -> int:
    """Count the shards that a cache of so many fetches when it evicts the one that is needed last (Belady 1966)."""
    wanted = [np.unique(step).tolist() for step in shards_TP]
    following: dict[int, list[int]] = {}
    for step in range(len(wanted) - 1, -1, -1):
        for shard in wanted[step]:
            following.setdefault(shard, []).append(step)
    held: set[int] = set()
    fetched = 0
    for shards in wanted:
        for shard in shards:
            following[shard].pop()
            if shard not in held:
                fetched += 1
                if len(held) >= size:
                    held.remove(max(held, key=lambda s: following[s][-1] if following[s] else 1 << 60))
                held.add(shard)
    return fetched


def shuffle_quality(order: GlobalOrder, batch: int) -> dict[str, float]:
    """Compare stretches of the order with a true permutation, by the shards that samples come from."""
    generator = np.random.default_rng(0)
    value_s = generator.standard_normal(order.shards)
    firsts = generator.integers(0, order.rows // batch - BATCHES, STRETCHES) * batch
    ours = np.stack([order.locate(np.arange(first, first + BATCHES * batch))[1] for first in firsts])
    true = generator.integers(0, order.shards, ours.shape)  # rows of equal shards, drawn: the limit of a huge permutation
    result: dict[str, float] = {}
    for name, shards_SN in (("", ours), ("_true", true)):
        for count in (64, 1000, batch):
            result[f"shards_in_first_{count}{name}"] = len(np.unique(shards_SN[0, :count]))
        means_ST = value_s[shards_SN].reshape(STRETCHES, BATCHES, batch).mean(2)
        result[f"deviation_of_batch_means{name}"] = float(np.sqrt((means_ST**2).mean() * batch))
        result[f"correlation_of_next_batch{name}"] = correlation(means_ST[:, :-1].ravel(), means_ST[:, 1:].ravel())
        result[f"correlation_of_next_sample{name}"] = correlation(value_s[shards_SN[0, :-1]], value_s[shards_SN[0, 1:]])
    return result


def correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Pearson's correlation."""
    return float(np.corrcoef(a, b)[0, 1])


def resident_bytes() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _ranks(nodes: Sequence[int] | Ints, ranks_per_node: int) -> Ints:
    return (np.asarray(nodes)[:, None] * ranks_per_node + np.arange(ranks_per_node)).ravel()


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shards", type=int, default=1_000_000)
    parser.add_argument("--rows", type=int, default=10_000, help="rows of a shard")
    parser.add_argument("--ranks", type=int, default=16_384)
    parser.add_argument("--ranks-per-node", type=int, default=8)
    parser.add_argument("--batch", type=int, default=32_768)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--start", type=int, default=30, help="percent of an epoch to begin at")
    parser.add_argument("--nodes", type=int, default=16, help="nodes that are followed")
    parser.add_argument("--cache-shards", type=int, nargs="+", default=[8, 32, 128], help="sizes of a node's cache in shards")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "order.json")
    words = parser.parse_args()
    order, cost = measure_cost([words.rows] * words.shards, seed=1)
    report = {
        "benchmark": "order",
        "data": {"samples": order.rows, "shards": words.shards, "shard_bytes": SHARD_BYTES},
        "cluster": {"ranks": words.ranks, "nodes": words.ranks // words.ranks_per_node, "global_batch": words.batch},
        "cost": cost,
        "by_lane": follow_nodes(order, words, by_lane=True),
        "by_position": follow_nodes(order, words, by_lane=False),
        "shuffle": shuffle_quality(order, words.batch),
        "machine": {"cores": os.cpu_count(), "system": platform.platform()},
        "versions": {n: version(n) for n in ("mmscale", "numpy")} | {"python": platform.python_version()},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    words.out.parent.mkdir(parents=True, exist_ok=True)
    words.out.write_text(json.dumps(report, indent=1) + "\n")
    print(words.out.read_text())


if __name__ == "__main__":
    main()
